"""How busy a device is."""

from __future__ import annotations

import pytest

from hybridgen.comparison.measuring.utilisation import busy


@pytest.mark.parametrize(
    ("spans", "covered"),
    [([], 0), ([(0, 2), (3, 4)], 3), ([(0, 5), (1, 2)], 5), ([(3, 6), (0, 4)], 6), ([(1, 1)], 0)],
)
def test_overlapping_work_counts_once(spans: list[tuple[float, float]], covered: float) -> None:
    assert busy(spans) == covered
