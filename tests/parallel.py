"""How `pytest -n 3` divides the tests: by file.

conftest.py imports it where pytest-xdist runs, and nowhere else.
"""

from __future__ import annotations

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
