"""How near is decode of one row to the read ceiling in long contexts, counting its keys and values alone?

A decode step at a context is (time of the last token less that of the first) / (tokens - 1) of one call of `generate()`
after a prompt of that length, as the host saw the tokens; the middle of `--calls` calls. What the cache takes is the
step's time less that of a step after the first context, a short one; its share of the ceiling is the bytes of keys and
values that the longer one has more, over that time and over the read ceiling measured in the same run.

    python benchmarks/contexts.py [--model llama-3.1-8b] [--contexts 512 32768 130900] [--output results.json]
    python benchmarks/contexts.py --smoke          # a tiny model, anywhere
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from common import how_it_ran, random_model, random_prompts, report, shape_dtype, this_device

from hybridgen import Engine


def step_seconds(engine: Engine, prompt: list[int], new: int, calls: int) -> float:
    """Seconds of a decode step behind a prompt."""
    took = []
    for _ in range(calls):
        times = engine.generate(prompt, max_new_tokens=new, temperature=0, ignore_eos=True).timing.token_times
        took.append((times[-1] - times[0]) / (len(times) - 1))
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape of common.shape_config")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 32768, 130900], help="a short one first")
    parser.add_argument("--new", type=int, default=129)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--backend", default="eager", help="of prefill, which is not measured")
    parser.add_argument("--kv-dtype", help="fp8: keys and values in 8 bits")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    args = parser.parse_args()
    device = this_device()
    if args.smoke:
        args.model, args.contexts, args.new, args.calls = "tiny", [16, 64], 9, 1
    model = random_model(args.model, shape_dtype(args.model, device), device)
    options: dict[str, Any] = {"mode": "hybrid", "max_batch": 1, "max_context": args.contexts[-1] + args.new}
    options["kv_dtype"] = args.kv_dtype
    rows: list[dict[str, Any]] = []
    with Engine.load(model, compile_backend=args.backend, prefix_cache=False, progress=False, **options) as engine:
        traffic = engine.traffic
        for context in args.contexts:
            began = time.perf_counter()
            prompt = random_prompts(1, context, model.config.vocab_size, seed=context)[0]
            step = step_seconds(engine, prompt, args.new, args.calls)
            row: dict[str, Any] = {"context": context, "step_us": step * 1e6, "share_of_ceiling_percent": None}
            if rows and traffic.ceiling:
                more = traffic.step_bytes(1, context) - traffic.step_bytes(1, rows[0]["context"])
                took = step - rows[0]["step_us"] / 1e6
                row |= {"cache_bytes": more, "cache_us": took * 1e6}
                row["share_of_ceiling_percent"] = 100 * more / took / traffic.ceiling
            rows.append(row)
            print(row, f"{time.perf_counter() - began:.1f} s", flush=True)
        ran = how_it_ran(engine) | {"fused": dict(engine.stats().fused)}
    ceiling = None if traffic.ceiling is None else traffic.ceiling / 1e9
    results = {"benchmark": "contexts", "model": args.model, "kv_dtype": args.kv_dtype}
    results |= {"read_ceiling_gb_per_s": ceiling, "rows": rows}
    report({**results, "engine": ran}, args.output)


if __name__ == "__main__":
    main()
