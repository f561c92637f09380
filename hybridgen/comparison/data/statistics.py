"""Quantiles, the confidence interval of a median, and agreement of tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hybridgen.fields import about, described

GRID = tuple(range(0, 101, 2))
"""Percentiles that a summary keeps, for plots."""


def quantile(ordered: Sequence[float], share: float) -> float:
    """A quantile of sorted values by nearest rank; NaN of none."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def median_ranks(count: int, confidence: float) -> tuple[int, int] | None:
    """Ranks (from 0) of the order statistics that hold the median with at least this confidence.

    The number of values below the median is binomial(count, 1/2), whatever the distribution is. None where even the
    smallest and the largest value do not reach the confidence: 5 values or fewer at 95 %.
    """
    tail = (1 - confidence) / 2
    below, rank = 0.0, -1
    # P(X <= k) = sum of C(count, i) / 2^count; in logarithms, for counts at which a power of two is no float.
    for k in range(count // 2):
        below += math.exp(
            math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        )
        if below > tail:
            break
        rank = k
    return None if rank < 0 else (rank, count - 1 - rank)


class Interval(NamedTuple):
    """A confidence interval of a median."""

    low: float
    high: float

    def share(self, median: float) -> float:
        """How far its further end is from the median, as a share of that."""
        return max(self.high - median, median - self.low) / median if median > 0 else math.inf


def median_interval(values: Sequence[float], confidence: float) -> Interval | None:
    """The confidence interval of a median from order statistics; None with too few values."""
    ranks = median_ranks(len(values), confidence)
    if ranks is None:
        return None
    ordered = sorted(values)
    return Interval(ordered[ranks[0]], ordered[ranks[1]])


def settled(values: Sequence[float], *, confidence: float, tolerance: float) -> bool:
    """Whether the median's confidence interval is within `tolerance` of it."""
    interval = median_interval(values, confidence)
    return interval is not None and interval.share(statistics.median(values)) <= tolerance


@described
@dataclass(frozen=True, kw_only=True)
class Summary:
    """A sample in a few numbers, in the sample's unit."""

    count: int = field(metadata=about("How many values."))
    mean: float = field(metadata=about("Their mean."))
    std: float = field(metadata=about("Standard deviation of the sample; 0 of one value."))
    p50: float = field(metadata=about("Their median."))
    p95: float = field(metadata=about("Their 95th percentile."))
    p99: float = field(metadata=about("Their 99th percentile."))
    low: float | None = field(metadata=about("The confidence interval of the median; None with too few values."))
    high: float | None = field(metadata=about("Its other end."))
    grid: tuple[float, ...] = field(default=(), metadata=about("The percentiles `GRID`."))

    @property
    def interval_share(self) -> float | None:
        """How far the interval's further end is from the median, as a share of it."""
        if self.low is None or self.high is None:
            return None
        return Interval(self.low, self.high).share(self.p50)


def summarise(values: Sequence[float], confidence: float, per_call: Sequence[float] | None = None) -> Summary | None:
    """A summary; None of no values.

    Args:
        per_call: one value per call, for the interval: values of one call are not independent of each other.
    """
    if not values:
        return None
    ordered = sorted(values)
    interval = median_interval(values if per_call is None else per_call, confidence)
    return Summary(
        count=len(ordered),
        mean=statistics.fmean(ordered),
        std=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        p50=statistics.median(ordered),
        p95=quantile(ordered, 0.95),
        p99=quantile(ordered, 0.99),
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        grid=tuple(quantile(ordered, share / 100) for share in GRID),
    )


class Agreement(NamedTuple):
    """How alike two lists of outputs are."""

    share: float
    """Equal tokens at equal places, of all."""
    first_difference: tuple[int, int] | None
    """(prompt, token) where they first differ: the smallest token index; None where they are equal."""


def agreement(outputs: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> Agreement:
    """Compare outputs with a reference, token by token; a missing token differs."""
    total = equal = 0
    first: tuple[int, int] | None = None
    for index in range(max(len(outputs), len(reference))):
        ours = outputs[index] if index < len(outputs) else ()
        theirs = reference[index] if index < len(reference) else ()
        for place in range(max(len(ours), len(theirs))):
            total += 1
            if place < len(ours) and place < len(theirs) and ours[place] == theirs[place]:
                equal += 1
            elif first is None or place < first[1]:
                first = (index, place)
    return Agreement(equal / total if total else 1.0, first)
