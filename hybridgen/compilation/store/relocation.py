"""Triton's group files name their members by absolute path, and find nothing where the cache was moved.

An entry keeps the members' names alone; the working copy gets the paths that they have there (Triton 3.6 and 3.7,
`runtime/cache.py`, `FileCacheManager.get_group`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_PREFIX = "__grp__"


def portable(name: str, data: bytes) -> bytes:
    """A file as an entry keeps it."""
    return _rewritten(name, data, "")


def local(name: str, data: bytes, root: Path) -> bytes:
    """A file of an entry as it is in the working copy at `root`."""
    return _rewritten(name, data, str((root / name).parent))


def _rewritten(name: str, data: bytes, directory: str) -> bytes:
    if not (name.startswith("triton/") and os.path.basename(name).startswith(_PREFIX)):
        return data
    try:
        group = json.loads(data)
        members = {member: os.path.join(directory, os.path.basename(p)) for member, p in group["child_paths"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return data  # another format than we know: Triton finds nothing in it and compiles
    return json.dumps(group | {"child_paths": members}).encode()
