"""Statistics on samples whose answers are known."""

from __future__ import annotations

import math
import random

import pytest

from hybridgen.comparison.data.statistics import (
    GRID,
    agreement,
    median_interval,
    median_ranks,
    quantile,
    settled,
    summarise,
)


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.01, 1), (0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100)])
def test_quantiles_are_nearest_ranks(share: float, value: int) -> None:
    assert quantile(range(1, 101), share) == value


def test_a_quantile_of_few_values_is_one_of_them() -> None:
    assert quantile([3.0], 0.99) == 3.0
    assert quantile([1.0, 2.0], 0.99) == 2.0
    assert math.isnan(quantile([], 0.5))


@pytest.mark.parametrize(
    ("count", "ranks"),
    # The tables of order-statistic intervals for a median at 95 %, as ranks from 0.
    [(5, None), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (10, (1, 8)), (20, (5, 14)), (50, (17, 32)), (100, (39, 60))],
)
def test_ranks_are_those_of_the_tables(count: int, ranks: tuple[int, int] | None) -> None:
    assert median_ranks(count, 0.95) == ranks


def test_ranks_of_a_large_sample_are_found() -> None:
    low, high = median_ranks(5000, 0.95) or (0, 0)
    assert low + high == 4999
    assert abs((high - low) - 1.96 * math.sqrt(5000)) < 3  # the normal approximation


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(1)
    inside = 0
    for _ in range(2000):
        interval = median_interval([draw.expovariate(1.0) for _ in range(25)], 0.95)
        assert interval is not None
        inside += interval.low <= math.log(2) <= interval.high
    assert 0.945 <= inside / 2000 <= 0.98  # at least what was asked for: order statistics come in whole ranks


def test_a_median_is_settled_when_its_interval_is_narrow() -> None:
    narrow = [100.0 + i % 3 for i in range(12)]
    assert settled(narrow, confidence=0.95, tolerance=0.02)
    assert not settled(narrow, confidence=0.95, tolerance=0.005)
    assert not settled(narrow[:5], confidence=0.95, tolerance=0.5)  # too few to say
    assert not settled([0.0] * 12, confidence=0.95, tolerance=0.02)


def test_one_outlier_does_not_unsettle_a_median() -> None:
    assert settled([1.0] * 14 + [50.0], confidence=0.95, tolerance=0.02)


def test_a_summary_has_known_answers() -> None:
    found = summarise([float(i) for i in range(1, 101)], 0.95)
    assert found is not None
    assert (found.count, found.mean, found.p50, found.p95, found.p99) == (100, 50.5, 50.5, 95.0, 99.0)
    assert found.std == pytest.approx(29.0115, abs=1e-4)
    assert (found.low, found.high) == (40.0, 61.0)
    assert found.interval_share == pytest.approx(10.5 / 50.5)
    assert len(found.grid) == len(GRID)
    assert found.grid[-1] == 100.0


def test_the_interval_is_of_the_calls_where_values_of_one_depend_on_each_other() -> None:
    found = summarise([1.0, 9.0] * 40, 0.95, per_call=[5.0] * 8)
    assert found is not None
    assert (found.low, found.high) == (5.0, 5.0)
    assert summarise([1.0, 2.0], 0.95, per_call=()).interval_share is None  # type: ignore[union-attr]


def test_no_values_have_no_summary() -> None:
    assert summarise([], 0.95) is None
    one = summarise([2.0], 0.95)
    assert one is not None
    assert (one.std, one.low) == (0.0, None)


def test_agreement_counts_places_and_finds_the_first_difference() -> None:
    assert agreement([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == (1.0, None)
    assert agreement([[1, 2, 9], [3, 8, 5]], [[1, 2, 3], [3, 4, 5]]) == (4 / 6, (1, 1))


def test_missing_tokens_and_outputs_differ() -> None:
    assert agreement([[1]], [[1, 2]]) == (0.5, (0, 1))
    assert agreement([[1, 2]], [[1, 2], [3, 4]]) == (0.5, (1, 0))
    assert agreement([], []) == (1.0, None)
