"""Estimates of steps without a graph."""

from __future__ import annotations

import pytest
from store_cases import GREEDY, SAMPLED, decode, prefill

from hybridgen.graphs.timings import PlainTimings


def test_nothing_measured_is_no_estimate() -> None:
    times = PlainTimings()
    times.note(prefill(16), 1.0)
    assert times.estimate(decode(16)) is None
    assert times.estimate(prefill(16, 1, SAMPLED)) is None
    assert times.estimate(prefill(16)._replace(executor="chain")) is None
    assert times.estimate(decode(16)._replace(query_len=2)) is None
    assert times.estimate(prefill(16)) == times.estimate(prefill(16, 4)) == 1.0


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0), (5, 3.0), (6, 4.0), (8, 6.0), (9, 6.0), (99, 6.0)]
)
def test_on_the_line_between_neighbours(rows: int, seconds: float) -> None:
    times = PlainTimings()
    for size, value in ((8, 6.0), (2, 1.0), (4, 2.0)):
        times.note(decode(size), value)
    assert times.estimate(decode(rows)) == pytest.approx(seconds)


def test_the_last_measurement_counts() -> None:
    times = PlainTimings()
    times.note(decode(4, GREEDY), 9.0)
    times.note(decode(4, GREEDY), 2.0)
    assert times.estimate(decode(4, GREEDY)) == 2.0
    times.forget(decode(4, GREEDY))
    assert times.estimate(decode(4, GREEDY)) is None
