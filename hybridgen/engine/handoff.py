"""Who may step the loop: a lock that is handed over between threads, and Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import _signal
import threading
import time
from typing import Any

_PATIENCE = 0.01
"""Seconds that a thread waits for others to take the lock before it takes it again itself."""


class TurnLock:
    """A re-entrant lock for a thread that takes it again and again, and for others that want it now and then.

    Python's own lock goes to the first thread that asks after its release. That is nearly always the one that released
    it, and the others hardly ever get it. A thread that calls `give_way()` first lets them have it.
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
        """Wait until the threads that wait for the lock have had it. Do not call this while holding it."""
        if self._waiting:
            end = time.perf_counter() + _PATIENCE
            while self._waiting and time.perf_counter() < end:
                time.sleep(1e-5)


class interrupts_deferred:
    """Hold back a Ctrl-C that arrives inside until the end. A second one is taken at once.

    Only the main thread gets signals; elsewhere, and where SIGINT has no Python handler, this does nothing.
    """

    # The module `signal` makes enums of what `_signal` returns. That takes longer than a whole step of the loop.

    __slots__ = ("_handler", "_received")

    def __enter__(self) -> None:
        self._handler: Any = None
        self._received: list[tuple[int, Any]] = []
        if threading.current_thread() is not threading.main_thread():
            return
        handler = _signal.getsignal(_signal.SIGINT)
        if callable(handler) and not isinstance(getattr(handler, "__self__", None), interrupts_deferred):
            self._handler = handler
            _signal.signal(_signal.SIGINT, self._defer)

    def __exit__(self, *_: object) -> None:
        if self._handler is None:
            return
        _signal.signal(_signal.SIGINT, self._handler)
        if self._received:
            self._handler(*self._received[0])

    def _defer(self, number: int, frame: Any) -> None:
        self._received.append((number, frame))
        if len(self._received) > 1:
            self._handler(number, frame)
