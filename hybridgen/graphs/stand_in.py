"""What stands in for graphs where there are none.

A CPU has no graphs. The stand-in keeps everything around them: buckets, padding, static buffers, the store and its
decisions. A replay calls the step. It is named as what it is in the statistics, and no speed is claimed for it.
"""

from __future__ import annotations

from collections.abc import Callable

from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import Recorded, checked_seconds, median_seconds

OWNER = "stand-in"


class StandInRecorder:
    """Records a step by keeping it."""

    owner = OWNER

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        """Run the step twice, as a capture would, and keep it."""
        step()
        if known is None:
            plain = seconds = median_seconds(step, _nothing, 1)
        else:
            plain, seconds = (checked_seconds(step, _nothing, time) for time in known)
        return Recorded(replay=step, release=_nothing, owner=OWNER, plain_seconds=plain, seconds=seconds, bytes=0)

    def close(self) -> None:
        return None


def _nothing() -> None:
    return None
