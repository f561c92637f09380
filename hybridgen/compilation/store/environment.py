"""The two variables that say where Inductor and Triton keep what they make.

Both read them whenever they need a path, so they can be set after an import. Inductor also writes its default into the
environment when it is first asked (`torch/_inductor/runtime/cache_dir_utils.py`), which is not a user's setting.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hybridgen.compilation.store.entry import Entry, delete

logger = logging.getLogger(__name__)

INDUCTOR, TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
_MARK = "_HYBRIDGEN_SET_"
"""Before the name of a variable: what we set it to, so that a child process does not take it for the user's."""
_ours: dict[str, str] = {}
"""What we set last, by variable; for Triton also where its files are once the entry is closed."""
_aside: list[Path] = []
"""The directory of what Triton compiled for closed entries, once there is one."""


def direct_to(entry: Entry) -> list[str]:
    """Send Inductor and Triton to an entry's directories; returns what stays as the user set it, in words."""
    notes = []
    before = _ours.get(TRITON)
    for variable, directory in ((INDUCTOR, entry.inductor), (TRITON, entry.triton)):
        if _is_users(variable):
            notes.append(f"{variable}={os.environ[variable]} is the user's own; its files are not in the entry")
            continue
        os.environ[variable] = os.environ[_MARK + variable] = _ours[variable] = str(directory)
    if INDUCTOR in _ours and "torch._inductor.utils" in sys.modules:
        _forget_compiled()
    if before is not None and before != _ours.get(TRITON):
        # What Triton compiled for an earlier engine is loaded, so it would not be compiled into this entry.
        _copy_missing(Path(before), entry.triton)
    return notes


def restore(entry: Entry) -> None:
    """Unset what was set, unless a later engine has sent compilers elsewhere. The entry can then be closed: what Triton
    compiled for it is put aside for the process's next entry, since what is loaded is not compiled again."""
    for variable, directory in ((INDUCTOR, entry.inductor), (TRITON, entry.triton)):
        if os.environ.get(variable) == str(directory):
            del os.environ[variable]
            os.environ.pop(_MARK + variable, None)
    if _ours.get(TRITON) == str(entry.triton):
        if any(entry.triton.iterdir()):
            _ours[TRITON] = str(_put_aside(entry.triton))
        elif _aside:
            _ours[TRITON] = str(_aside[0])
        else:
            del _ours[TRITON]


def _put_aside(triton: Path) -> Path:
    """Copy Triton's files to one directory of this process, which is deleted when it ends."""
    if not _aside:
        _aside.append(Path(tempfile.mkdtemp(prefix="hybridgen-triton-")))
        atexit.register(delete, _aside[0], os.getpid())
    _copy_missing(triton, _aside[0])
    return _aside[0]


def _is_users(variable: str) -> bool:
    value = os.environ.get(variable)
    if value is None or value == _ours.get(variable) or value == os.environ.get(_MARK + variable):
        return False
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    default = os.path.abspath(default_cache_dir())
    # Inductor's kernels set Triton's directory to one inside its own.
    inside = [default, *_ours.values()] if variable == TRITON else [default]
    return not any(value == path or value.startswith(path + os.sep) for path in inside)


def _forget_compiled() -> None:
    """Inductor keeps what it loaded by content: a second entry would lack its files."""
    utils: Any = sys.modules["torch._inductor.utils"]
    clear = getattr(utils, "clear_caches", None) or getattr(utils, "clear_inductor_caches", None)
    if clear is None:
        logger.debug("this torch has no way to clear Inductor's caches of loaded code")
        return
    clear()


def _copy_missing(source: Path, destination: Path) -> None:
    try:
        for path in source.iterdir():
            if path.is_dir() and not (destination / path.name).exists():
                shutil.copytree(path, destination / path.name)
                for group in (destination / path.name).glob("__grp__*"):
                    group.write_text(group.read_text().replace(str(source), str(destination)))
    except OSError as error:
        logger.debug("Triton's files of the last engine are not copied: %s", error)
