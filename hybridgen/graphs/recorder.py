"""How a step becomes something that can be replayed."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hybridgen.graphs.key import GraphKey

_TIMED = 3
_TOLERANCE = 0.25
"""By which a time may differ from that of an earlier process."""
_threads = threading.local()


def this_thread() -> object:
    """Something that stands for the calling thread and, unlike its identifier, is not given to a later one."""
    if not hasattr(_threads, "token"):
        _threads.token = object()
    return _threads.token


def median_seconds(call: Callable[[], object], wait: Callable[[], object], runs: int = _TIMED) -> float:
    """Median wall time of a call with its wait, of a few."""
    times = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def checked_seconds(call: Callable[[], object], wait: Callable[[], object], known: float | None) -> float:
    """What a call takes: what an earlier process measured, where one run or a few agree with it about; else measured.

    The device is the same, but clocks, power limits and the host's other work may not be.
    """
    if known is None:
        return median_seconds(call, wait)
    if _agree(median_seconds(call, wait, 1), known):
        return known
    seconds = median_seconds(call, wait)
    return known if _agree(seconds, known) else seconds


def _agree(seconds: float, known: float) -> bool:
    return abs(seconds - known) <= _TOLERANCE * known


@dataclass(frozen=True)
class Recorded:
    """A step that can be replayed."""

    replay: Callable[[], None]
    """Runs the step on its static buffers, on the current stream."""
    release: Callable[[], None]
    """Frees what the recording holds; it is not replayed afterwards."""
    owner: str
    """What replays it: `cuda graph`, `cudagraph tree`, `compiled step` or `stand-in`."""
    plain_seconds: float
    """What the same step takes without the recording (a padded batch with short contexts)."""
    seconds: float
    """What a replay takes, measured alike."""
    bytes: int
    """Device memory that recording it took."""
    exact: bool = True
    """Whether a replay gives the bits of the step without it. Else other code computes the same, and rounds elsewhere:
    its first replay is compared with the step."""
    is_graph: bool = False
    """Whether a replay is one launch of a graph, and runs nothing in Python or in torch."""
    thread: object = None
    """`this_thread()` of the only thread that can replay it; None: any."""


class NotReadyError(Exception):
    """A recording is being made while steps go on."""


class Recorder(Protocol):
    """Records steps."""

    owner: str

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        """Warm up and record a step, staged with padding. What goes wrong is raised, and harms no other recording.

        Args:
            known: `plain_seconds` and `seconds` of an earlier process on the same device: one run each checks them, and
                what is far from them is measured again.

        Raises:
            NotReadyError: it is being made while steps go on; ask again. `close()` stops that.
        """
        ...

    def close(self) -> None:
        """Free what all recordings share; they have been released."""
        ...
