"""Whether the generator goes on, or hangs."""

from __future__ import annotations

import math
import time
from typing import Any

from hybridgen.errors import ServerError
from hybridgen.serving.service.generator import Generator


class Watch:
    """Watches how long the generator has been at a piece of work."""

    def __init__(self, generator: Generator, seconds: float) -> None:
        """`seconds`: a piece of work that takes longer hangs."""
        self.stuck = False
        """Whether it hung at the last look."""
        self.seconds = seconds
        self._generator = generator
        self._longest_tick = math.inf
        self._ticked = self._thawed = time.monotonic()

    def start(self, longest_tick: float) -> None:
        """Begin; `longest_tick`: seconds between two calls of `look()`, if the process does not stand still."""
        self._longest_tick = longest_tick
        self._ticked = time.monotonic()

    def look(self, now: float, *, loading: bool) -> bool:
        """Look again; True when `stuck` has changed. While a model loads, nothing hangs."""
        self._ticked = now
        before, self.stuck = self.stuck, not loading and self.work_age > self.seconds
        return before != self.stuck

    def thaw(self, now: float) -> None:
        """The process stood still until now."""
        self._ticked = self._thawed = now

    @property
    def work_age(self) -> float:
        """For how long it has been at a piece of work, without time in which the process stood still."""
        working = self._generator.pulse.working
        if working is None:
            return 0.0
        return max(0.0, min(time.monotonic(), self._ticked + self._longest_tick) - max(working, self._thawed))

    def facts(self) -> dict[str, Any]:
        """What a ping tells of it."""
        pulse, age = self._generator.pulse, self.work_age
        return {
            "healthy": age <= self.seconds,
            "steps": pulse.steps,
            "step_age": round(max(0.0, time.monotonic() - pulse.since), 6),
            "working": pulse.working is not None,
            "work_age": round(age, 6),
        }

    def error(self) -> ServerError:
        """What everybody is told while it hangs."""
        return ServerError(
            f"the model has not finished a step for {self.seconds:g} s; if ping stays unhealthy, start the server "
            "again",
            "stuck",
        )
