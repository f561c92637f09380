"""How long it took to import what an engine needs: torch, transformers and our own modules."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_seconds = 0.0


def engine() -> None:
    """Import `hybridgen.engine`, and note what that took."""
    if "hybridgen.engine" in sys.modules:
        return
    with timed():
        importlib.import_module("hybridgen.engine")


@contextmanager
def timed() -> Iterator[None]:
    """Add what is imported inside."""
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
