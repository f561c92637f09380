"""What steps take without a graph, as far as it was measured."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

from hybridgen.graphs.key import GraphKey


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


def _kind(key: GraphKey) -> GraphKey:
    """The key without its size."""
    return key._replace(rows=0, tokens=0)
