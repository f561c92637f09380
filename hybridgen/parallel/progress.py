"""Where each rank is, in words of memory that all share: what rank 0 goes by when it decides that one stands still.

A thread that beats while the process lives says nothing about the thread that runs steps. That one leaves two words:
what it is doing, and a count that changes whenever it goes on, at each message and around each collective.

| state | what | how long without a change |
|---|---|---|
| `AWAY` | nothing to do | for ever, while nobody waits for it |
| `STEP` | runs what it has run before | a few seconds more than the longest stretch so far |
| `LONG` | loads, compiles, records, or runs a size for the first time | two minutes without using processor or disk |
| `WAITS` | in a collective, or waits for its device | while another one is in `STEP` or `LONG` |
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

STEP_SECONDS = 10.0
"""Between two changes of the words in a step, besides `_TIMES` the longest stretch so far."""
_TIMES = 4.0
LONG_SECONDS = 120.0
_PAUSE_SECONDS = 1.0
"""Between two looks: more than that, and whoever looks was itself stopped meanwhile."""


class State(IntEnum):
    """What a rank's thread does."""

    AWAY = 0
    STEP = 1
    LONG = 2
    WAITS = 3


class During:
    """A context in which a rank is in a state; the one before is back behind it."""

    __slots__ = ("_before", "_state", "_words")

    def __init__(self, words: np.ndarray, state: State) -> None:
        self._words, self._state = words, int(state)
        self._before: list[int] = []

    def __enter__(self) -> None:
        words = self._words
        self._before.append(int(words[0]))
        words[0] = self._state
        words[1] += 1

    def __exit__(self, *_: object) -> None:
        self._words[0] = self._before.pop()
        self._words[1] += 1


class Progress:
    """The words of one rank, as it writes them."""

    def __init__(self, words: np.ndarray | None = None) -> None:
        """
        Args:
            words: int64 [2], the state and the count; None: nobody looks.
        """
        self._words = np.zeros(2, dtype=np.int64) if words is None else words
        self.step = During(self._words, State.STEP)
        self.long = During(self._words, State.LONG)
        self.waits = During(self._words, State.WAITS)

    @property
    def state(self) -> State:
        """What it does."""
        return State(int(self._words[0]))

    def enter(self, state: State) -> None:
        """From now on it does this, outside of all contexts."""
        self._words[0] = int(state)
        self._words[1] += 1

    def move(self) -> None:
        """Say that it goes on."""
        self._words[1] += 1


class Worked:
    """Whether a process works: looked at by its thread that beats, because compilers and readers say nothing."""

    _SHARE = 0.02
    """Of a core: more than threads take that only look around."""

    def __init__(self) -> None:
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float, int]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return time.monotonic(), used.ru_utime + used.ru_stime, used.ru_majflt + used.ru_inblock

    def __call__(self) -> bool:
        """Whether it used the processor or read from a disk since the last call that was a second ago or more."""
        now, before = self._now(), self._last
        took = now[0] - before[0]
        if took < 1.0:
            return False
        self._last = now
        return now[1] - before[1] > self._SHARE * took or now[2] > before[2]


class _Seen(NamedTuple):
    state: State
    moves: int
    since: float


class Watch:
    """Finds the rank that stands still. Rank 0 itself is never blamed: what takes long there may be the user's own."""

    def __init__(self, size: int) -> None:
        self._seen = [_Seen(State.AWAY, -1, 0.0)] * size
        self._longest = 0.0
        """Seconds of the longest stretch in a step so far."""
        self._looked: float | None = None

    def look(self, words: Sequence[tuple[int, int]], now: float) -> str | None:
        """Look at the words of all ranks; who stands still, in words, or None.

        Args:
            words: state and count by rank.
            now: of a clock that does not go back, in seconds.
        """
        paused = 0.0 if self._looked is None or now - self._looked < _PAUSE_SECONDS else now - self._looked
        self._looked = now
        for rank, (state, count) in enumerate(words):
            seen = self._seen[rank]
            if (seen.state, seen.moves) != (state, count):
                if rank and seen.state is State.STEP:
                    self._longest = max(self._longest, now - paused - seen.since)
                self._seen[rank] = _Seen(State(state), count, now)
            elif paused:
                self._seen[rank] = seen._replace(since=seen.since + paused)
        return self._found(now)

    def _found(self, now: float) -> str | None:
        limit = STEP_SECONDS + _TIMES * self._longest
        for rank, seen in enumerate(self._seen[1:], 1):
            still = now - seen.since
            if seen.state is State.STEP and still > limit:
                return f"rank {rank} has stood still in a step for {still:.0f} seconds"
            if seen.state is State.LONG and still > LONG_SECONDS:
                return f"rank {rank} has done nothing for {still:.0f} seconds, where it loads, compiles or records"
        waiting = [rank for rank, seen in enumerate(self._seen) if seen.state is State.WAITS]
        if not waiting or any(seen.state in (State.STEP, State.LONG) for seen in self._seen):
            return None
        still = now - max(seen.since for seen in self._seen)  # nobody has changed since then
        if still <= limit:
            return None
        others = [str(rank) for rank in range(len(self._seen)) if rank not in waiting]
        whom = f"rank {' and '.join(others)}, which did not begin" if others else "each other"
        return f"rank {' and '.join(map(str, waiting))} waited {still:.0f} seconds for {whom}"
