"""What stands in for graphs where there are none.

A CPU has no graphs. The stand-in keeps everything around them: buckets, padding, static buffers, the store and its
decisions. A replay calls the step. It is named as what it is in the statistics, and no speed is claimed for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hybridgen.execution.graphs.recorder import Recorded
from hybridgen.execution.steps import StepKey

OWNER = "stand-in"


class StandInRecorder:
    """Records a step by keeping it."""

    owner = OWNER

    def record(self, key: StepKey, step: Callable[[], None], known: tuple[float, float] | None = None) -> Recorded:
        """Run the step twice, as a capture would, and keep it."""
        step()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        plain, replay = known or (seconds, seconds)
        return Recorded(replay=step, release=_nothing, owner=OWNER, plain_seconds=plain, seconds=replay, bytes=0)

    def close(self) -> None:
        return None


def _nothing() -> None:
    return None
