"""What does choosing a token cost: with the sampler's ops, with the torch functions that sort, with an argmax alone?

Normal random logits in bfloat16, every row with the same parameters. `flat` has standard deviation 1, so that top-p
0.95 keeps most of the vocabulary, as models with random weights have it; `peaked` has 3 and one row in which 20 tokens
hold nearly all of the mass, as trained models have it. Device time per call of many calls in a CUDA graph, by events
around a replay, median; the logits stay in the L2 cache, as after a head that has just written them. `over greedy` is
the difference to the op's greedy row. `agree` is the share of rows with the torch functions' token. On a CPU the op is
the torch functions, and a call is timed by the clock.

    python benchmarks/sampling.py [--vocab 128256] [--batches 1 8 64] [--output results.json]
    python benchmarks/sampling.py --smoke          # on the CPU: checks the script
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from common import report, seconds
from torch import Tensor

from hybridgen.device.timing import graph_seconds
from hybridgen.sampling.choice import choose_greedy, choose_sampled, reference_greedy, reference_sampled

CASES: dict[str, tuple[float, float, float, int]] = {
    # temperature, top-p, min-p, top-k
    "greedy": (0.0, 1.0, 0.0, 0),
    "temperature": (0.8, 1.0, 0.0, 0),
    "min-p": (0.8, 1.0, 0.05, 0),
    "top-p": (0.8, 0.95, 0.0, 0),
    "top-k": (0.8, 1.0, 0.0, 50),
    "top-k, top-p": (0.8, 0.95, 0.0, 50),
}
Row = dict[str, str | int | float | None]


def make_logits(kind: str, batch: int, vocab: int, dtype: torch.dtype, device: str) -> Tensor:
    """[batch, vocab]; see the module."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, vocab, generator=generator) * (1 if kind == "flat" else 3)
    if kind == "peaked":
        logits[:, torch.randperm(vocab, generator=generator)[:20]] += 20
    return logits.to(device=device, dtype=dtype)


def ways(case: str, logits: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The ways to choose, by name."""
    temperature, top_p, min_p, top_k = CASES[case]
    if not temperature:
        return {
            "op": lambda: choose_greedy(logits),
            "torch": lambda: reference_greedy(logits),
            "argmax": lambda: logits.argmax(-1),
        }
    batch, device = logits.shape[0], logits.device
    line = [temperature, top_p, math.log(min_p) if min_p else -math.inf]
    reals = torch.tensor([line] * batch, device=device)
    integers = torch.tensor([[seed, top_k] for seed in range(batch)], device=device)
    slots = torch.arange(batch, device=device)
    arguments = logits, reals, integers, slots, slots + 100, top_k > 0, top_p < 1, min_p > 0
    return {"op": lambda: choose_sampled(*arguments), "torch": lambda: reference_sampled(*arguments)}


def measure(batches: list[int], vocab: int, dtype: torch.dtype, device: str, repeats: int) -> list[Row]:
    """A row per kind of logits, batch, case and way."""
    rows: list[Row] = []
    for kind in ("flat", "peaked"):
        for batch in batches:
            logits = make_logits(kind, batch, vocab, dtype, device)
            greedy = math.nan
            for case in CASES:
                expected = ways(case, logits)["torch"]()
                for way, call in ways(case, logits).items():
                    agree = (call() == expected).double().mean().item()
                    if device == "cuda":
                        # The torch sampler is some hundred launches: few calls keep the graph small.
                        time = graph_seconds(call, repeats, 10 if way == "torch" else 200)
                    else:
                        time = seconds(call, device, repeats)
                    if (case, way) == ("greedy", "op"):
                        greedy = time
                    rows.append(
                        {
                            "logits": kind,
                            "batch": batch,
                            "case": case,
                            "way": way,
                            "us": time * 1e6,
                            "over_greedy_us": (time - greedy) * 1e6,
                            "agree": agree,
                        }
                    )
    return rows


def table(rows: list[Row]) -> None:
    print(f"{'logits':<7} {'batch':>5} {'case':<13} {'way':<7} {'us':>9} {'over greedy':>12} {'agree':>6}")
    for row in rows:
        print(
            f"{row['logits']:<7} {row['batch']:>5} {row['case']:<13} {row['way']:<7} {row['us']:9.2f} "
            f"{row['over_greedy_us']:12.2f} {row['agree']:6.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, a small vocabulary")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.vocab, arguments.batches = 500, [1, 2]
    device = "cpu" if arguments.smoke else "cuda"
    dtype = getattr(torch, arguments.dtype)
    rows = measure(arguments.batches, arguments.vocab, dtype, device, 2 if arguments.smoke else 30)
    table(rows)
    result = {"benchmark": "sampling", "vocab": arguments.vocab, "dtype": arguments.dtype, "rows": rows}
    report(result, arguments.output)


if __name__ == "__main__":
    main()
