"""What steps take without a graph, as far as it was measured."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

from hybridgen.models.attention import Phase
from hybridgen.sampling import SamplerPlan


class PlainTimes:
    """Measured seconds of steps without a graph, by phase, sampler and size."""

    def __init__(self) -> None:
        self._seconds: defaultdict[tuple[Phase, SamplerPlan | None], dict[int, float]] = defaultdict(dict)

    def note(self, phase: Phase, plan: SamplerPlan | None, tokens: int, seconds: float) -> None:
        """A measurement; the last of a size counts."""
        self._seconds[phase, plan][tokens] = seconds

    def forget(self, phase: Phase, plan: SamplerPlan | None, tokens: int) -> None:
        """A size is not known any more."""
        self._seconds[phase, plan].pop(tokens, None)

    def estimate(self, phase: Phase, plan: SamplerPlan | None, tokens: int) -> float | None:
        """Seconds for a size: on the line between its measured neighbours, or the nearest; None without any."""
        known = self._seconds[phase, plan]
        sizes = sorted(known)
        if not sizes:
            return None
        index = bisect_left(sizes, tokens)
        if index == len(sizes):
            return known[sizes[-1]]
        high = sizes[index]
        if index == 0 or high == tokens:
            return known[high]
        low = sizes[index - 1]
        share = (tokens - low) / (high - low)
        return known[low] + share * (known[high] - known[low])
