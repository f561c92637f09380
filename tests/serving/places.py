"""Where sockets of tests lie."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path


def short_directory() -> Path:
    """A directory of our own with a path that is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="hg-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
