"""How long does prefill of many prompts take, and a decode step of many rows?

- prefill: whole calls for one token of each prompt of random ids, fresh in every call, without the prefix cache: wall
  time from the call to its return, ids read, sampled and handed back; median.
- decode: (time of a call for N new tokens, less the same call for one) / (N - 1), of as many rows.

Mode `hybrid`, random weights, greedy, end-of-sequence ignored; the engine has vLLM's defaults of the comparison in
`results/vllm-h200.json`: 256 slots and contexts of 4,608 tokens.

    python benchmarks/prefill.py --models qwen3-0.6b llama-3.2-1b llama-3.1-8b [--output results.json]
    python benchmarks/prefill.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from common import how_it_ran, random_model, random_prompts, release, report, shape_dtype, synchronize, this_device

from hybridgen import Engine


def measure(
    name: str, batches: list[int], decode: list[int], prompt: int, new: int, repeats: int, options: dict[str, Any]
) -> dict[str, Any]:
    """A model's row.

    Args:
        batches: numbers of prompts.
        decode: of which decode is timed too.
        prompt: tokens of each prompt.
        new: tokens that are generated for decode.
    """
    device = this_device()
    model = random_model(name, shape_dtype(name, device), device)
    row: dict[str, Any] = {"model": name, "prompt": prompt, "new": new, "repeats": repeats}
    seeds = iter(range(1000))
    with Engine.load(model, prefix_cache=False, **options) as engine:

        def call(batch: int, count: int) -> float:
            ids = random_prompts(batch, prompt, model.config.vocab_size, seed=next(seeds))
            synchronize(device)
            start = time.perf_counter()
            engine.generate(ids, max_new_tokens=count, temperature=0, ignore_eos=True)
            synchronize(device)
            return time.perf_counter() - start

        def median(batch: int, count: int) -> float:
            return statistics.median(call(batch, count) for _ in range(repeats))

        for batch in batches:
            timed = batch in decode
            call(batch, new if timed else 1)  # what it missed is recorded
            while engine.idle():
                pass
            call(batch, 1)
            once = median(batch, 1)
            row[f"prefill_ms_{batch}"] = once * 1e3
            row[f"prefill_tokens_per_s_{batch}"] = batch * prompt / once
            print(f"{name:<14} prefill {batch:4} x {prompt}: {once * 1e3:9.1f} ms", flush=True)
            if timed:
                step = (median(batch, new) - once) / (new - 1)
                row[f"step_ms_{batch}"] = step * 1e3
                print(f"{name:<14} decode  {batch:4} rows: {step * 1e3:9.3f} ms a step", flush=True)
        row["how"] = how_it_ran(engine)
    release()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--decode", nargs="*", type=int, default=[128, 256], help="batches of which decode is timed")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    parser.add_argument(
        "--lazy", action="store_true", help="start sooner: nothing is recorded or tuned that these calls do not run"
    )
    arguments = parser.parse_args()
    sizes: tuple[Any, ...] = arguments.batches, arguments.decode, arguments.prompt, arguments.new, arguments.repeats
    options: dict[str, Any] = {"mode": "hybrid", "max_batch": 256, "max_context": 4608, "progress": False}
    if arguments.lazy:
        options |= {"capture_at_start": False, "fused_decode": False}
    models = arguments.models
    if arguments.smoke:
        models, sizes = ["tiny"], ([2, 3], [3], 16, 4, 1)
        options |= {"max_batch": 4, "max_context": 64, "kv_memory": "16MiB", "compile_backend": "eager"}
    report({"benchmark": "prefill", "rows": [measure(name, *sizes, options) for name in models]}, arguments.output)


if __name__ == "__main__":
    main()
