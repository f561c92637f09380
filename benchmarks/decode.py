"""How long does a decode step take, in each mode and in Hugging Face `generate`?

(time of a prompt with N new tokens, less the same with one) / (N - 1), over whole calls, wall time, medians. The prompt
is random ids; greedy; the same weights in every row of a model. Batches repeat the prompt's length with other ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import random_model, report, seconds
from transformers import PreTrainedModel

import hybridgen

MODES = ("eager", "jit")


def step_seconds(generate: Any, new: int, device: str, repeats: int) -> float:
    """Seconds per decode step of `generate(new_tokens)`."""
    long = seconds(lambda: generate(new), device, repeats)
    return (long - seconds(lambda: generate(1), device, repeats)) / (new - 1)


def huggingface(model: PreTrainedModel, ids: torch.Tensor, new: int, device: str, repeats: int) -> float:
    """Hugging Face `generate` with its default, dynamic cache."""
    mask = torch.ones_like(ids)

    def generate(count: int) -> Any:
        return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count)

    return step_seconds(generate, new, device, repeats)


def ours(model: PreTrainedModel, ids: torch.Tensor, new: int, device: str, repeats: int, mode: str) -> dict[str, Any]:
    batch, prompt = ids.shape
    prompts = ids.tolist()
    with hybridgen.Engine.load(model, mode=mode, max_batch=batch, max_context=prompt + new) as engine:

        def generate(count: int) -> Any:
            return engine.generate(prompts, max_new_tokens=count, ignore_eos=True, temperature=0)

        step = step_seconds(generate, new, device, repeats)
        stats = engine.stats()
        return {"step_s": step, "startup_s": dict(stats.startup), "late_compiles": stats.late_compiles,
                "fallbacks": dict(stats.fallbacks)}  # fmt: skip


def measure(name: str, batches: list[int], prompt: int, new: int, repeats: int, device: str) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(name, dtype, device)
    rows = []
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=generator).to(device)
        base = huggingface(model, ids, new, device, repeats)
        row: dict[str, Any] = {"model": name, "batch": batch, "prompt": prompt, "new": new}
        row["huggingface"] = {"step_s": base}
        for mode in MODES:
            row[mode] = ours(model, ids, new, device, repeats, mode)
            row[mode]["speedup"] = base / row[mode]["step_s"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "qwen3-0.6b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in ["tiny"] if arguments.smoke else arguments.models:
        shape = ([1, 2], 16, 8, 2) if arguments.smoke else (arguments.batches, 512, 128, 3)
        rows += measure(name, *shape, device)
    print(f"{'model':<14} {'batch':>5} {'HF ms':>8} {'eager ms':>9} {'jit ms':>8} {'jit / HF speed':>15}")
    for row in rows:
        print(
            f"{row['model']:<14} {row['batch']:>5} {row['huggingface']['step_s'] * 1e3:8.2f} "
            f"{row['eager']['step_s'] * 1e3:9.2f} {row['jit']['step_s'] * 1e3:8.2f} {row['jit']['speedup']:15.2f}"
        )
    report({"benchmark": "decode", "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
