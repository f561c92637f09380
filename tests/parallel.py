"""How `pytest -n 3` divides the tests: by file, and those marked `apart` while nothing else runs.

conftest.py imports it where pytest-xdist runs, and nowhere else.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

BY_PARAMETER = "test_families.py"
"""The one file that is divided further: by family, each with its checkpoint and reference."""


class ByFile(LoadScopeScheduling):
    """A file's tests run in one process, in order, because they share what their fixtures made.

    Files with many tests start first. The families are last, in small pieces, so that all processes end together.
    """

    def _split_scope(self, nodeid: str) -> str:
        path, _, name = nodeid.partition("::")
        if not path.endswith(BY_PARAMETER):
            return path
        return f"{path}[{name.rstrip(']').rpartition('[')[2].rpartition('-')[2]}]"


class Turns:
    """Tests of several processes side by side, or one test alone, by locks on files that all of them open."""

    def __init__(self, directory: Path) -> None:
        """Of all processes that give this directory."""
        self._gate, self._tests = (os.open(directory / name, os.O_RDWR | os.O_CREAT) for name in ("gate", "tests"))

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Wait for the turn of one test. Who waits to be alone keeps the gate, so that nobody new gets in before."""
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._tests, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Explicitly, because a test's forks may still have the file open.
            fcntl.flock(self._tests, fcntl.LOCK_UN)
