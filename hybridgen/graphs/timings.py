"""What steps take without a graph, as far as it was measured."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

from hybridgen.graphs.key import GraphKey
from hybridgen.models.attention import Phase

_SAVING = 1 / 3
"""Of a token's time in a prefill call, which feeding it beside decode has to save: attention, which is not in the times
of recorded steps of padding, takes more of it there."""


class PlainTimings:
    """Measured seconds of steps without a graph, by their size; steps that differ in anything else are apart."""

    def __init__(self) -> None:
        self._seconds: defaultdict[GraphKey, dict[int, float]] = defaultdict(dict)

    def note(self, key: GraphKey, seconds: float) -> None:
        """A measurement; the last of a size counts."""
        self._seconds[_kind(key)][key.size] = seconds

    def forget(self, key: GraphKey) -> None:
        """A size is not known any more."""
        self._seconds[_kind(key)].pop(key.size, None)

    def estimate(self, key: GraphKey) -> float | None:
        """Seconds for a size: on the line between its measured neighbours, or the nearest; None without any."""
        known = self._seconds[_kind(key)]
        sizes = sorted(known)
        if not sizes:
            return None
        index = bisect_left(sizes, key.size)
        if index == len(sizes):
            return known[sizes[-1]]
        high = sizes[index]
        if index == 0 or high == key.size:
            return known[high]
        low = sizes[index - 1]
        share = (key.size - low) / (high - low)
        return known[low] + share * (known[high] - known[low])


def feeds_faster(seconds: Mapping[GraphKey, float], rows: int, room: int) -> bool:
    """Whether so many tokens of prompts take less in free rows of a decode step than in a prefill call.

    Args:
        seconds: what recorded steps take.
        rows: that decode.

    Returns:
        False where the times of such steps are not known.
    """
    decode = sorted((key.rows, took) for key, took in seconds.items() if key.phase is Phase.DECODE and not key.is_rest)
    alone = next((took for size, took in decode if size >= rows), None)
    filled = next((took for size, took in decode if size >= rows + room), None)
    prefill = max(((key.tokens, took) for key, took in seconds.items() if key.phase is Phase.PREFILL), default=None)
    if alone is None or filled is None or prefill is None:
        return False
    return (filled - alone) / room <= (1 - _SAVING) * prefill[1] / prefill[0]


def _kind(key: GraphKey) -> GraphKey:
    """The key without its size."""
    return key._replace(rows=0, tokens=0)
