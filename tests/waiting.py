"""How long tests wait for what must come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

HANGS = 120.0
"""Seconds after which something hangs. What tests wait for takes far less, also where other programs use the cores."""


def until(true: Callable[[], Any], seconds: float = HANGS) -> None:
    """Wait for something; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def with_longer(test: Callable[[float], None], seconds: Iterable[float]) -> None:
    """Try a short limit of time; where that fails, longer ones: the machine may be too slow for the first."""
    *short, longest = seconds
    for each in short:
        with suppress(Exception):
            test(each)
            return
    test(longest)
