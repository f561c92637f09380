"""How long it took to import what an engine needs: torch, transformers and our own modules."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_seconds = 0.0


@contextmanager
def timed() -> Iterator[None]:
    """Add the time of the imports inside."""
    global _seconds
    start = time.perf_counter()
    try:
        yield
    finally:
        _seconds += time.perf_counter() - start


def take_seconds() -> float:
    """Seconds that the imports took, for the first engine of the process. 0 for later engines, and where the caller had
    imported all of it before."""
    global _seconds
    seconds, _seconds = _seconds, 0.0
    return seconds
