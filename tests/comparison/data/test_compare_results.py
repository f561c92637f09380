"""Results as plain values."""

from __future__ import annotations

import math

from compare_cases import comparison


def test_nan_does_not_reach_a_file() -> None:
    found = comparison(measured_seconds=math.nan)
    assert found.as_dict()["measured_seconds"] is None
