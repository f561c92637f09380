"""Whether the process stood still (SIGSTOP, a suspended machine), or was only busy."""

from __future__ import annotations

import time
from collections.abc import Callable


class Standstill:
    """Looks at the time every now and then, and tells when the process stood still in between.

    A gap between two looks is not enough: a client whose messages take long to read makes one too. The process stood
    still when its CPU clock did, but for what an ordinary interval takes.
    """

    def __init__(
        self,
        interval: float,
        now: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        """
        Args:
            interval: seconds between two looks, as a rule.
            now, cpu: the clocks, in seconds.
        """
        self.longest = 3 * interval
        """A gap that is no longer than this is nothing special."""
        self._interval = interval
        self._now = now
        self._cpu = cpu
        self._last, self._used = now(), cpu()
        self._rate = 0.0

    def look(self) -> tuple[float, float]:
        """The time, and the seconds that the process stood still since the last look: 0 if it did not."""
        now, used = self._now(), self._cpu()
        gap, busy = now - self._last, used - self._used
        self._last, self._used = now, used
        if gap <= self.longest:
            self._rate = busy / gap if gap > 0 else 0.0
            return now, 0.0
        return now, gap if busy <= 1.5 * self._interval * max(0.1, self._rate) else 0.0
