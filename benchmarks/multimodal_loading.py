"""Does a multimodal checkpoint load like its text part alone?

Writes a checkpoint of random weights, a decoder of text with an encoder of images (LLaVA's classes, 16 bits), and one
of the same decoder and head alone. Each is loaded in processes of its own, in turn: seconds of opening and of reading
weights, as `Engine.stats().startup` has them, and the most memory that was resident, less what was before the load.
Files are in the page cache, and pages of a file that are read count as resident. Beside it transformers' own
`from_pretrained` of the whole model, which reads values only once they are used. Tokens that both checkpoints generate
have to be equal.

    python benchmarks/multimodal_loading.py [--rounds 5] [--output loading.json]
    python benchmarks/multimodal_loading.py --smoke          # tiny: checks the script
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import report
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import hybridgen

WHOLE, TEXT, TRANSFORMERS = "whole checkpoint", "text alone", "whole checkpoint, transformers"
PROMPT = [5, 6, 7, 8]


def write(directory: Path, smoke: bool) -> dict[str, Any]:
    """Both checkpoints; the bytes of their parts."""
    hidden, layers, wide = (64, 2, 1) if smoke else (1024, 8, 24)
    text = LlamaConfig(
        vocab_size=1024 if smoke else 32000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=wide, num_attention_heads=8, image_size=64,
        patch_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=text.vocab_size - 1)
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(directory / "whole")
    alone = LlamaForCausalLM._from_config(text, dtype=torch.bfloat16).eval()
    alone.model.load_state_dict(model.get_decoder().state_dict())
    alone.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    alone.save_pretrained(directory / "text")
    sizes = [sum(each.numel() * each.element_size() for each in part.parameters()) for part in (model, alone)]
    return {"text_bytes": sizes[1], "others_bytes": sizes[0] - sizes[1]}


def resident() -> int:
    """Bytes, at most so far in this program. (`getrusage` would count its parent's from before.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def load(what: str, directory: Path) -> dict[str, Any]:
    """In a process of its own: what a load takes."""
    torch.set_num_threads(1)
    before, start = resident(), time.perf_counter()
    if what == TRANSFORMERS:
        AutoModelForImageTextToText.from_pretrained(directory / "whole", dtype=torch.bfloat16)
        return {"load_s": time.perf_counter() - start, "resident_bytes": resident() - before, "tokens": None}
    path = directory / ("whole" if what == WHOLE else "text")
    with hybridgen.Engine.load(path, mode="eager", max_batch=1, kv_memory="16MiB", progress=False) as engine:
        whole, after = time.perf_counter() - start, resident()
        startup = engine.stats().startup
        tokens = list(engine.generate(PROMPT, max_new_tokens=4, ignore_eos=True).token_ids)
    phases = {f"{name.replace(' ', '_')}_s": startup[name] for name in ("open model", "load weights")}
    return {"load_s": whole, **phases, "resident_bytes": after - before, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="loads of each, in turn")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny, one round")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(load(arguments.child[0], Path(arguments.child[1]))))
        return
    if arguments.smoke:
        arguments.rounds = 1
    found: dict[str, list[dict[str, Any]]] = {WHOLE: [], TEXT: [], TRANSFORMERS: []}
    with tempfile.TemporaryDirectory() as directory:
        sizes = write(Path(directory), arguments.smoke)
        for _ in range(arguments.rounds):
            for what, results in found.items():
                command = [sys.executable, __file__, "--child", what, directory]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
    if any(each["tokens"] != found[TEXT][0]["tokens"] for what in (WHOLE, TEXT) for each in found[what]):
        raise SystemExit(f"other tokens: {found}")
    rows = []
    for what, results in found.items():
        names = [name for name in results[0] if name != "tokens"]
        rows.append({"what": what, **{name: statistics.median(each[name] for each in results) for name in names}})
        shown = ", ".join(f"{name} {rows[-1][name]:.4g}" for name in names)
        print(f"{what:32} {shown}", flush=True)
    report({"benchmark": "multimodal_loading", "rounds": arguments.rounds, **sizes, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
