"""What do cudagraph trees bring between the manual buckets: `graphs="both"` against `graphs="manual"`?

At batch sizes between the buckets, mode `hybrid`, random weights, greedy, on the same weights:

| owner | what runs a size between two buckets |
|---|---|
| manual | the next bucket's graph, padded |
| exact | a graph captured by hand at that size: the sizes are named in `decode_buckets` |
| both | `graphs="both"`: a tree of that size, recorded while idle; by hand where a fused kernel serves the size |

- a step: (time of a call for N new tokens, less the same call for one) / (N - 1), wall time, medians, once everything
  that the size wants is recorded; with what ran it.
- mix: requests of random lengths that are all known in advance, generated tokens per second of the whole call, the
  best of the runs after one that is not counted.
- start: seconds of `Engine.load()`, by part; bytes: device memory that the engine took by then and in the end, and what
  its graphs took.

    python benchmarks/trees.py --budget 225 --output benchmarks/results/trees-h200.json
    python benchmarks/trees.py --smoke          # a tiny model, anywhere; without CUDA the owners manual and exact
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    how_it_ran,
    random_model,
    random_prompts,
    release,
    report,
    seconds,
    shape_dtype,
    synchronize,
    this_device,
)
from transformers import PreTrainedModel

import hybridgen
from hybridgen.graphs.buckets import decode_buckets

OWNERS = ("manual", "exact", "both")


class Sizes(NamedTuple):
    """How much is run."""

    batches: tuple[int, ...] = (3, 5, 12, 20, 33, 50)
    most: int = 64
    """`max_batch`."""
    prompt: int = 128
    new: int = 64
    repeats: int = 3
    requests: int = 128
    longest: int = 256
    """Tokens of a prompt, and of an output, of the mix at most."""
    runs: int = 2


def options_of(owner: str, sizes: Sizes) -> dict[str, Any]:
    """Fields of `EngineConfig`; prefill is not recorded, because it is the same for all owners."""
    options: dict[str, Any] = {"mode": "hybrid", "max_batch": sizes.most, "prefill_buckets": []}
    if owner == "exact":
        options["decode_buckets"] = sorted({*decode_buckets(sizes.most), *sizes.batches})
    elif owner == "both":
        options["graphs"] = "both"
    return options


def used_bytes(device: str) -> int | None:
    """Device memory that is taken now, by whomever."""
    if device != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def mix(sizes: Sizes, vocab: int) -> tuple[list[list[int]], list[hybridgen.SamplingParams]]:
    """Prompts and how many tokens each gets."""
    draw = random.Random(0)
    longest = sizes.longest
    prompts = [[draw.randrange(3, vocab) for _ in range(draw.randint(8, longest))] for _ in range(sizes.requests)]
    params = [
        hybridgen.SamplingParams(max_new_tokens=draw.randint(4, longest), temperature=0, ignore_eos=True)
        for _ in range(sizes.requests)
    ]
    return prompts, params


def settle(engine: hybridgen.Engine) -> float:
    """Record whatever is wanted; the seconds that it took."""
    start = time.perf_counter()
    while engine.idle():
        pass
    return time.perf_counter() - start


def measure(
    model: PreTrainedModel, name: str, owner: str, sizes: Sizes, device: str, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for the start and the mix, and one for each size."""
    vocab = model.config.vocab_size
    before = used_bytes(device)
    begun = time.perf_counter()
    with hybridgen.Engine.load(model, **options_of(owner, sizes), **options) as engine:
        whole: dict[str, Any] = {"model": name, "owner": owner, "what": "start and mix"}
        whole["start_s"] = time.perf_counter() - begun
        whole["start_bytes"] = None if before is None else (used_bytes(device) or 0) - before
        rows, idle = [], 0.0
        for batch in sizes.batches:
            prompts = random_prompts(batch, sizes.prompt, vocab, batch)

            def generate(count: int, prompts: list[list[int]] = prompts) -> Any:
                return engine.generate(prompts, max_new_tokens=count, ignore_eos=True, temperature=0)

            generate(8)
            idle += settle(engine)
            long, short = (seconds(lambda n=n: generate(n), device, sizes.repeats) for n in (sizes.new, 1))
            ran = [step for step in generate(sizes.new)[0].steps if step.phase == "decode"]
            row = {"model": name, "owner": owner, "what": "decode", "batch": batch}
            row |= {"step_us": (long - short) / (sizes.new - 1) * 1e6}
            row |= {"by": [[step.count, step.kind, step.reason] for step in ran]}
            rows.append(row)
            print(
                f"{name:<14} {owner:<8} {batch:5} {row['step_us']:10.1f}  {ran[-1].kind}, {ran[-1].reason}", flush=True
            )
        prompts, params = mix(sizes, vocab)
        times = []
        for _ in range(sizes.runs + 1):
            synchronize(device)
            start = time.perf_counter()
            outs = engine.generate(prompts, params)
            times.append(time.perf_counter() - start)
            idle += settle(engine)
        tokens = sum(len(out.token_ids) for out in outs)
        stats = engine.stats()
        whole |= {"mix_s": times, "mix_tokens_per_s": tokens / min(times[1:]), "idle_s": idle}
        whole |= {"end_bytes": None if before is None else (used_bytes(device) or 0) - before}
        whole |= {"graph_bytes": stats.graphs.bytes, "graphs": len(stats.graphs.graphs), "fused": dict(stats.fused)}
        whole["replay_us"] = {
            str(row.tokens): [row.owner, row.seconds * 1e6, row.plain_seconds * 1e6]
            for row in stats.graphs.graphs
            if row.phase == "decode" and row.tokens in sizes.batches
        }
        whole["engine"] = how_it_ran(engine)
        print(
            f"{name:<14} {owner:<8} start {whole['start_s']:.1f} s, idle {idle:.1f} s, {whole['graphs']} graphs of "
            f"{stats.graphs.bytes / 2**20:.0f} MiB, mix {whole['mix_tokens_per_s']:.0f} tokens/s",
            flush=True,
        )
    release()
    return [whole, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "qwen3-0.6b"])
    parser.add_argument("--owners", nargs="+", choices=OWNERS, default=list(OWNERS))
    parser.add_argument("--budget", type=float, help="seconds after which no other engine is begun")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, anywhere")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    device = this_device()
    sizes, options = Sizes(), {"max_context": 512}
    models, owners = arguments.models, arguments.owners
    if arguments.smoke:
        models, sizes = ["tiny"], Sizes((3, 5), 8, 8, 4, 1, 6, 12, 1)
        options = {"max_context": 64, "capture_after": 1}
        if device == "cpu":
            options["compile_backend"] = "eager"
            owners = [owner for owner in owners if owner != "both"]
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    for name in models:
        model = random_model(name, shape_dtype(name, device), device)
        for owner in owners:
            if arguments.budget is not None and rows and time.perf_counter() - begun > arguments.budget:
                left.append(f"{name}, {owner}")
                continue
            rows += measure(model, name, owner, sizes, device, options)
        del model
        release()
    if left:
        print(f"not run, the budget of {arguments.budget:g} s is over: {'; '.join(left)}", flush=True)
    median = {
        f"{name}: {owner} over manual": statistics.median(ratios)
        for name in models
        for owner in owners
        if owner != "manual" and (ratios := _over_manual(rows, name, owner))
    }
    results = {"benchmark": "trees", "sizes": sizes._asdict(), "rows": rows, "ratios": median, "not_run": left}
    report(results, arguments.output)


def _over_manual(rows: list[dict[str, Any]], model: str, owner: str) -> list[float]:
    """Of each size, the owner's step over that of manual buckets."""
    steps = {(r["owner"], r["batch"]): r["step_us"] for r in rows if r["what"] == "decode" and r["model"] == model}
    return [
        step / steps["manual", batch]
        for (by, batch), step in steps.items()
        if by == owner and ("manual", batch) in steps
    ]


if __name__ == "__main__":
    main()
