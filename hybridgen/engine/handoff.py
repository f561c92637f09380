"""A lock that is handed over."""

from __future__ import annotations

import threading
import time

_PATIENCE = 0.01
"""Seconds that a thread waits for others to take the lock before it takes it again itself."""


class TurnLock:
    """A re-entrant lock for a thread that takes it again and again, and for others that want it now and then.

    Python's own lock goes to whoever asks first after its release, which is nearly always the thread that released it:
    the others starve. `give_way()` lets them have it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: set[int] = set()

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            return
        me = threading.get_ident()
        self._waiting.add(me)
        try:
            self._lock.acquire()
        finally:
            self._waiting.discard(me)

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def give_way(self) -> None:
        """Wait until those who wait for the lock have it; not to be called by who holds it."""
        if self._waiting:
            end = time.perf_counter() + _PATIENCE
            while self._waiting and time.perf_counter() < end:
                time.sleep(1e-5)
