"""Estimates of steps without a graph."""

from __future__ import annotations

import pytest

from hybridgen.graphs.timings import PlainTimes
from hybridgen.models.attention import Phase


def test_nothing_measured_is_no_estimate() -> None:
    times = PlainTimes()
    times.note(Phase.PREFILL, True, 16, 1.0)
    assert times.estimate(Phase.DECODE, True, 16) is None
    assert times.estimate(Phase.PREFILL, False, 16) is None
    assert times.estimate(Phase.PREFILL, True, 16) == 1.0


@pytest.mark.parametrize(
    ("tokens", "seconds"), [(1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0), (5, 3.0), (6, 4.0), (8, 6.0), (9, 6.0), (99, 6.0)]
)
def test_on_the_line_between_neighbours(tokens: int, seconds: float) -> None:
    times = PlainTimes()
    for size, value in ((8, 6.0), (2, 1.0), (4, 2.0)):
        times.note(Phase.DECODE, True, size, value)
    assert times.estimate(Phase.DECODE, True, tokens) == pytest.approx(seconds)


def test_the_last_measurement_counts() -> None:
    times = PlainTimes()
    times.note(Phase.DECODE, False, 4, 9.0)
    times.note(Phase.DECODE, False, 4, 2.0)
    assert times.estimate(Phase.DECODE, False, 4) == 2.0
