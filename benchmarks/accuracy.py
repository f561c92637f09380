"""How far are half-precision logits from float32, in Hugging Face's forward and in ours?

The same weights and tokens everywhere: a prompt, then tokens fed one by one (teacher forcing). The error is
||logits - reference|| / ||reference|| over all positions, against Hugging Face's forward of the same (rounded)
weights in float32. Prefill covers every position of the prompt, decode every fed token. Beside it stands the share of
positions whose likeliest token is the reference's (`top1`): random weights leave tokens close to each other. Layers
whose states a second prefill would change are not for this script.

    python benchmarks/accuracy.py [--models deepseek-v2-lite] [--layers 8] [--modes eager] [--output accuracy.json]
    python benchmarks/accuracy.py --smoke          # tiny, anywhere
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import provenance, random_model, release, report, write
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import hybridgen
from hybridgen.demo import model_path
from hybridgen.execution.plan import PrefillChunk
from hybridgen.graphs.key import GraphKey
from hybridgen.models.mixers import cache_keyword

MODES = ("eager", "jit", "hybrid")


def load(name: str, dtype: torch.dtype, device: str, layers: int | None) -> PreTrainedModel:
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype).to(device).eval()
    return random_model(name, dtype, device, layers=layers)


@torch.inference_mode()
def huggingface(model: PreTrainedModel, ids: torch.Tensor, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [prompt, V] of one prefill and [T - prompt, V] of decoding the rest."""
    cache = {cache_keyword(model): DynamicCache(config=model.config)}
    prefill = model(input_ids=ids[None, :prompt], **cache).logits[0].float()
    steps = [model(input_ids=ids[None, i : i + 1], **cache).logits[0].float() for i in range(prompt, len(ids))]
    return prefill, torch.cat(steps)


@torch.inference_mode()
def ours(model: PreTrainedModel, ids: torch.Tensor, prompt: int, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through the engine's own steps."""
    options = {"mode": mode, "max_batch": 2, "max_context": len(ids), "kv_memory": "1GiB", "capture_at_start": False}
    with hybridgen.Engine.load(model, **options) as engine:
        runner, tokens = engine._runner, ids.tolist()
        pages = list(range(1, 1 + -(-len(tokens) // engine.config.page_size)))
        runner.state.block_table.assign_all([0], [pages])

        runner.steps.keep_logits()

        def decode(position: int) -> torch.Tensor:
            """Run a decode step that ends at its logits."""
            runner.state.table[:, 0] = torch.tensor([tokens[position], position, 0])
            runner.steps.run(GraphKey.decode(1, None))
            return runner.steps.logits[:1].to(torch.float32, copy=True)

        runner.steps.stage_prefill([PrefillChunk(0, tokens[:prompt], 0, prompt, 0, True)], prompt, 1)
        runner.steps.run(GraphKey.prefill(prompt, 1, None))
        # The same again for all positions: what the attention reads is set, and K and V are written as they are.
        prefill = runner.bound.forward(ids[:prompt], runner.steps.metadata, None).float()
        runner.steps.stage_decode((0,))
        return prefill, torch.cat([decode(position) for position in range(prompt, len(tokens))])


def error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return ((logits - reference).norm() / reference.norm()).item()


def same_choice(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of positions whose likeliest token is the reference's."""
    return (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()


def measure(
    name: str, dtype: torch.dtype, device: str, prompt: int, new: int, modes: Sequence[str], layers: int | None
) -> dict[str, Any]:
    model = load(name, dtype, device, layers)
    vocab = model.config.vocab_size
    ids = torch.randint(3, vocab, (prompt + new,), generator=torch.Generator().manual_seed(0)).to(device)
    hf = huggingface(model, ids, prompt)
    row: dict[str, Any] = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
    row["layers"] = model.config.num_hidden_layers
    found = {mode: ours(model, ids, prompt, mode) for mode in modes}
    model = model.float()
    model.set_experts_implementation("eager")  # the others are made for 16 bits
    reference = huggingface(model, ids, prompt)
    for index, phase in enumerate(("prefill", "decode")):
        row[phase] = {"huggingface": error(hf[index], reference[index])}
        row[phase]["top1"] = {"huggingface": same_choice(hf[index], reference[index])}
        for mode, logits in found.items():
            row[phase][mode] = error(logits[index], reference[index])
            row[phase][f"{mode}_ratio"] = row[phase][mode] / row[phase]["huggingface"]
            row[phase]["top1"][mode] = same_choice(logits[index], reference[index])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "qwen3-0.6b", "demo"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--layers", type=int, help="only so many of each model")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models, prompt, new = (["tiny"], 20, 4) if arguments.smoke else (arguments.models, 512, 64)
    heads = "".join(f"{mode:>9} {'/ HF':>6} {'top1':>6}" for mode in arguments.modes)
    print(f"{'model':<17} {'phase':<8} {'Hugging Face':>13} {'top1':>6}{heads}")
    rows: list[dict[str, Any]] = []
    results = {"benchmark": "accuracy", "rows": rows}
    for name in models:
        row = measure(name, torch.bfloat16, device, prompt, new, arguments.modes, arguments.layers)
        rows.append(row)
        for phase in ("prefill", "decode"):
            e, top1 = row[phase], row[phase]["top1"]
            figures = "".join(f"{e[mode]:9.5f} {e[f'{mode}_ratio']:6.3f} {top1[mode]:6.3f}" for mode in arguments.modes)
            print(f"{name:<17} {phase:<8} {e['huggingface']:13.5f} {top1['huggingface']:6.3f}{figures}", flush=True)
        write({"provenance": provenance()} | results, arguments.output)
        release()
    report(results, arguments.output)


if __name__ == "__main__":
    main()
