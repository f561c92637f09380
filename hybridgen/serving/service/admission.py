"""How much runs and waits, and whether there is room for more."""

from __future__ import annotations

import time
from collections import deque

from hybridgen.errors import ServerBusyError
from hybridgen.serving.service.generator import Submit
from hybridgen.serving.service.limits import Limits


class Admission:
    """Counts completions and memory of the requests that were accepted and have not ended."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.in_flight = 0
        """Completions."""
        self._held = 0
        self._ends: deque[float] = deque(maxlen=64)

    def check(self, submit: Submit) -> None:
        """
        Raises:
            ServerBusyError: there is no room for a request now.
        """
        room = self._limits.queue - self.in_flight
        if submit.size > room:
            raise ServerBusyError(
                f"the queue has room for {room} of {submit.size} completion(s); try again", self._hint(submit.size)
            )
        if self._held and self._held + submit.weight > self._limits.held:
            raise ServerBusyError("the requests in the queue take too much memory; try again", self._hint(submit.size))

    def take(self, submit: Submit) -> None:
        """A request was accepted."""
        self.in_flight += submit.size
        self._held += submit.weight

    def release(self, submit: Submit) -> None:
        """A request has ended, or is not wanted any more."""
        self.in_flight -= submit.size
        self._held -= submit.weight

    def completed(self, now: float) -> None:
        """A completion ended, which says how fast there will be room."""
        self._ends.append(now)

    def _hint(self, size: int) -> float:
        """Seconds until there may be room, from how fast completions ended lately."""
        if len(self._ends) < 2:
            return 0.5
        rate = len(self._ends) / max(1e-3, time.monotonic() - self._ends[0])
        excess = max(1, self.in_flight + size - self._limits.queue)
        return round(min(30.0, max(0.02, excess / rate)), 3)
