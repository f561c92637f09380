"""The file that says that a server listens."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from hybridgen.errors import ServerError


def check_ready_file(path: Path) -> None:
    """Remove what a server before this one left, and check that a file can be written there.

    Raises:
        ServerError: it cannot, or something is there that is no file.
    """
    remove_ready_file(path)
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise ServerError(f"--ready-file {path} cannot be written: {error.strerror}") from error


def write_ready_file(path: Path, text: str) -> None:
    """Write it so that whoever sees it sees all of it.

    Raises:
        ServerError: it cannot be written.
    """
    part = _part(path)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise ServerError(f"--ready-file {path} cannot be written: {error.strerror}") from error


def remove_ready_file(path: Path) -> None:
    """Remove it, if it is there.

    Raises:
        ServerError: it cannot be removed, or is no file.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ServerError(f"--ready-file {path} is there and is no file; name another")
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ServerError(f"--ready-file {path} cannot be removed: {error.strerror}") from error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
