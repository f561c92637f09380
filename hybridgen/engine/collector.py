"""Python's garbage collector while an engine is loaded."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLD = 20_000
"""New objects from which on it looks; Python's own is 700 to 2,000."""

_lock = threading.Lock()
_inside = 0
_before = gc.get_threshold()


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Meanwhile the garbage collector looks less often, in all threads.

    Building a model and tracing its layers makes millions of objects, most of which live. Each time that their number
    has grown by a quarter, Python looks at all objects of the process, those of imported libraries too. A collector
    that is off, or looks less often anyway, stays as it is.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = gc.get_threshold()
            if 0 < _before[0] < THRESHOLD:
                gc.set_threshold(THRESHOLD, *_before[1:])
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                gc.set_threshold(*_before)
