"""What do the prompts of a large call cost the host, before the device gets them?

By part, for 256 prompts of 512 ids (131,072 in all): requests are made of them (ids checked, parameters resolved), they
are admitted and planned in prefill calls, and these calls' metadata is laid out for the device. Ids are given as lists,
numpy arrays or tensors. CPU time of this process, the least of several runs, so that other work on the machine counts
little.

    python benchmarks/host_prefill.py [--output results.json]
    python benchmarks/host_prefill.py --smoke          # few prompts: checks the script
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import report

import hybridgen
from hybridgen.cache import PageManager, pages_for_tokens
from hybridgen.demo import model_path
from hybridgen.engine.requests import Request
from hybridgen.engine.scheduler import Schedule, Scheduler

PAGE_SIZE = 64
NEW = 16
SHAPES: dict[str, Callable[[list[int]], Any]] = {
    "lists": list,
    "arrays": lambda ids: torch.tensor(ids).numpy(),
    "tensors": torch.tensor,
}


def planned(requests: list[Request], budget: int, shares: bool) -> list[Schedule]:
    """Queue and admit requests, and plan all of their prefill calls."""
    pages = pages_for_tokens(len(requests[0].prompt_ids) + NEW, PAGE_SIZE)
    scheduler = Scheduler(
        pages=PageManager(1 + len(requests) * pages, PAGE_SIZE, shares=shares),
        max_batch=len(requests),
        token_budget=budget,
    )
    for request in scheduler.in_order(requests, streamed=False):
        scheduler.add(request)
    schedules = []
    while any(request.prefilled < len(request.prompt_ids) for request in requests):
        schedules.append(scheduler.schedule())
    return schedules


def least(call: Callable[[], Any], runs: int) -> float:
    """Milliseconds of CPU time, of the fastest run."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times) * 1e3


def measure(count: int, length: int, budget: int, runs: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    sizes = {"max_batch": count, "token_budget": budget, "max_context": length + NEW, "page_size": PAGE_SIZE}
    rows: list[dict[str, Any]] = []
    with hybridgen.Engine.load(model_path(), mode="eager", device="cpu", kv_memory="64MiB", **sizes) as engine:
        vocab = engine.checkpoint.vocab_size
        ids = [[draw.randrange(10, vocab) for _ in range(length)] for _ in range(count)]

        def made(prompts: list[Any]) -> list[Request]:
            return engine.make_requests(prompts, None, {"max_new_tokens": NEW, "temperature": 0.0})

        for shape, convert in SHAPES.items():
            prompts = [convert(prompt) for prompt in ids]
            rows.append({"part": "make requests", "ids": shape, "ms": least(lambda p=prompts: made(p), runs)})
        for shares in (True, False):
            # A request can be planned once.
            fresh = iter([made(ids) for _ in range(runs)])
            took = least(lambda f=fresh, s=shares: planned(next(f), budget, s), runs)
            rows.append({"part": "admit and plan", "prefix_cache": shares, "ms": took})
        schedules = planned(made(ids), budget, True)
        calls = [schedule.plan.prefill for schedule in schedules if schedule.plan.prefill]
        steps = engine._runner.steps

        def stage() -> None:
            for chunks in calls:
                tokens = sum(len(chunk.tokens) for chunk in chunks)
                steps.stage_prefill(chunks, tokens, sum(chunk.last for chunk in chunks))

        rows.append({"part": "lay out for the device", "calls": len(calls), "ms": least(stage, runs)})
    for row in rows:
        row |= {"prompts": count, "length": length}
        print({**row, "ms": round(row["ms"], 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few prompts")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    sizes = (4, 80, 128, 2) if args.smoke else (256, 512, 8192, 300)
    report({"benchmark": "host_prefill", "rows": measure(*sizes)}, args.output)


if __name__ == "__main__":
    main()
