"""When requests reach an engine and when its steps run: clocks around the loop of steps, for `serving_mix.py`.

python benchmarks/clocks.py FILE serve MODEL ...

runs the `hybridgen` command with these clocks and writes what they saw to FILE, a line of JSON each time the engine has
nothing to do. Times are of `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hybridgen.engine.loop import StepLoop
from hybridgen.engine.scheduler import Schedule, Scheduler


class Step(NamedTuple):
    """One call of `StepLoop.step()`."""

    start: float
    end: float
    cpu: float
    """Seconds of its thread."""
    prompt_tokens: int
    """That it launched a prefill for."""
    rows: int
    """That it launched a decode for."""


class Clocks:
    """What the engines of this process do from now on. There is no way back: for processes that measure."""

    def __init__(self) -> None:
        self.submitted: list[float] = []
        """When each request was with the engine."""
        self.steps: list[Step] = []
        self._launched = (0, 0)
        submit, step, schedule = StepLoop.submit, StepLoop.step, Scheduler.schedule

        def clocked_submit(loop: StepLoop, requests: Sequence[Any], **options: Any) -> None:
            submit(loop, requests, **options)
            self.submitted += [time.monotonic()] * len(requests)

        def clocked_schedule(scheduler: Scheduler) -> Schedule:
            found = schedule(scheduler)
            self._launched = sum(len(chunk.tokens) for chunk in found.plan.prefill), len(found.plan.decode)
            return found

        def clocked_step(loop: StepLoop) -> None:
            self._launched = (0, 0)
            start, cpu = time.monotonic(), time.thread_time()
            step(loop)
            self.steps.append(Step(start, time.monotonic(), time.thread_time() - cpu, *self._launched))

        StepLoop.submit = clocked_submit  # type: ignore[method-assign]
        StepLoop.step = clocked_step  # type: ignore[method-assign]
        Scheduler.schedule = clocked_schedule  # type: ignore[method-assign]

    def take(self) -> dict[str, Any]:
        """What was seen since the last call."""
        seen = {"submitted": self.submitted, "steps": self.steps}
        self.submitted, self.steps = [], []
        return seen


def summary(seen: dict[str, Any], start: float) -> dict[str, float]:
    """What happened when, in seconds since `start`, and how long steps took together."""
    submitted, steps = sorted(seen["submitted"]), [Step(*step) for step in seen["steps"]]
    if not submitted or not steps:
        return {}
    filling = [step for step in steps if step.prompt_tokens]
    others = [step for step in steps if not step.prompt_tokens]
    full = max(step.rows for step in steps)
    at_full = [step.end - step.start for step in others if step.rows == full]
    return {
        "first_request": submitted[0] - start,
        "middle_request": submitted[len(submitted) // 2] - start,
        "last_request": submitted[-1] - start,
        "first_step": steps[0].start - start,
        "last_prefill": filling[-1].end - start if filling else 0.0,
        "last_step": steps[-1].end - start,
        "prefill_calls": len(filling),
        "seconds_of_steps_with_prefill": sum(step.end - step.start for step in filling),
        "other_steps": len(others),
        "seconds_of_other_steps": sum(step.end - step.start for step in others),
        "seconds_between_steps": sum(b.start - a.end for a, b in pairwise(steps)),
        "rows_of_a_full_step": full,
        "seconds_of_a_full_step": median(at_full) if at_full else 0.0,
        "cpu_seconds_of_steps": sum(step.cpu for step in steps),
    }


def read(path: Path, requests: int, seconds: float) -> dict[str, Any]:
    """What a process wrote to its file, once it has as many requests in it; the file is empty then.

    Args:
        seconds: for which to wait for them.
    """
    until = time.monotonic() + seconds
    while True:
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
        seen = {name: [each for line in lines for each in line[name]] for name in ("submitted", "steps")}
        if len(seen["submitted"]) >= requests or time.monotonic() > until:
            path.write_text("")
            return seen
        time.sleep(0.02)


def main() -> int:
    path, clocks = Path(sys.argv[1]), Clocks()
    from hybridgen.cli import main as command
    from hybridgen.serving.service.adapter import EngineModel

    idle = EngineModel.idle

    def clocked_idle(model: EngineModel) -> bool:
        if clocks.submitted:
            with path.open("a") as file:
                file.write(json.dumps(clocks.take()) + "\n")
        return idle(model)

    EngineModel.idle = clocked_idle  # type: ignore[method-assign]
    return command(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
