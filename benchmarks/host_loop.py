"""What does the host do in one decode step, apart from launching it?

Time of `StepLoop.step()` while the batch stays the same: schedule, bookkeeping, and tokens handed to their requests.
The runner is a stub whose steps have their tokens ready. Nothing of it depends on the model or the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from pathlib import Path
from typing import Any

from common import report
from transformers import AutoTokenizer

from hybridgen.cache import PageManager, pages_for_tokens
from hybridgen.demo import model_path
from hybridgen.engine.loop import StepLoop
from hybridgen.engine.requests import Request
from hybridgen.engine.scheduler import Scheduler
from hybridgen.execution.plan import StepOutput
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve
from hybridgen.telemetry.statistics import Counters

PROMPT = array("i", (5, 6, 7))
PAGE_SIZE = 16
WARM_UP = 50


class ReadyStep:
    """A launched step whose tokens have arrived."""

    kind, reason, scores, hidden = "stub", "nothing runs", None, None

    def __init__(self, tokens: list[int]) -> None:
        self._output = StepOutput([[token] for token in tokens], None)
        self.rows = len(tokens)

    def read(self) -> StepOutput:
        return self._output


class StubRunner:
    """Launches nothing; every step brings the same tokens."""

    def __init__(self, batch: int) -> None:
        self._step = ReadyStep(list(range(70, 70 + batch)))

    def admit(self, *_: Any) -> None:
        pass

    def prefill(self, chunks: list[Any]) -> ReadyStep:
        return self._step

    def decode(self, slots: tuple[int, ...]) -> ReadyStep:
        return self._step


def step_seconds(batch: int, steps: int, run_ahead: int, **delivery: Any) -> float:
    """Median seconds of a step.

    Args:
        delivery: `events` keeps an event for each token; the other names are fields of `SamplingParams`.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    events = delivery.pop("events", False)
    new = WARM_UP + steps + 10
    pages = PageManager(1 + batch * pages_for_tokens(len(PROMPT) + new, PAGE_SIZE), PAGE_SIZE)
    scheduler = Scheduler(pages=pages, max_batch=batch, token_budget=8192)
    runner: Any = StubRunner(batch)
    loop = StepLoop(runner, scheduler, Counters(), tokenizer=tokenizer, run_ahead=run_ahead)
    sampling = resolve(SamplingParams(max_new_tokens=new, **delivery), None, [0], 4096)
    loop.submit([Request(PROMPT, sampling, index) for index in range(batch)], keep_events=events)
    for _ in range(WARM_UP):
        loop.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loop.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--smoke", action="store_true", help="a few steps, for the tests")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    batches, steps = ([1, 4], 20) if args.smoke else (args.batches, args.steps)
    rows = []
    print(f"{'batch':>5} {'run-ahead':>9} {'text at the end':>16} {'stop string':>12} {'events':>8}  (us per step)")
    for batch in batches:
        for run_ahead in (0, 1):
            plain = step_seconds(batch, steps, run_ahead)
            stop = step_seconds(batch, steps, run_ahead, stop=["\n\nclass"])
            events = step_seconds(batch, steps, run_ahead, events=True)
            row = {"batch": batch, "run_ahead": run_ahead, "plain_s": plain, "stop_string_s": stop, "events_s": events}
            rows.append(row)
            print(f"{batch:5} {run_ahead:9} {plain * 1e6:16.1f} {stop * 1e6:12.1f} {events * 1e6:8.1f}")
    report({"rows": rows}, args.output)


if __name__ == "__main__":
    main()
