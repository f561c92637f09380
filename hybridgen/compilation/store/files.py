"""Files of a private directory: read without following links, checked for their owner, written as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UnusableError(Exception):
    """Why something in the store is not used, in words. Never reaches a user as an exception: it becomes a reason."""


def check_owned(info: os.stat_result, what: str) -> None:
    """Raise unless we own it and nobody else can write to it.

    Raises:
        UnusableError: it is another user's, or others may write to it.
    """
    if info.st_uid != os.getuid():
        raise UnusableError(f"{what} belongs to user {info.st_uid}, and this is user {os.getuid()}")
    if info.st_mode & OTHERS_WRITE:
        raise UnusableError(f"{what} can be written by others (mode {stat.S_IMODE(info.st_mode):o})")


def read_checked(path: Path, name: str) -> bytes:
    """The bytes of a regular file of ours; a link is not followed.

    Raises:
        UnusableError: it is missing, a link, no regular file, another user's, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UnusableError(f"{name} is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise UnusableError(f"{name} is a symbolic link") from None
        raise UnusableError(f"{name} cannot be read ({error.strerror})") from None
    try:
        # Looked at first: a directory can be opened, and only Python's file object refuses it.
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise UnusableError(f"{name} is not a regular file")
        check_owned(info, name)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise UnusableError(f"{name} cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object of a file of ours.

    Raises:
        UnusableError: see `read_checked`; or it holds no JSON object.
    """
    try:
        value = json.loads(read_checked(path, name))
    except (ValueError, RecursionError):
        raise UnusableError(f"{name} is not JSON") from None
    if not isinstance(value, dict):
        raise UnusableError(f"{name} holds no JSON object")
    return value


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as `write_whole` does."""
    write_whole(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def regular_files(root: Path) -> Iterator[str]:
    """Relative names of the regular files below a directory, sorted; links and what vanishes meanwhile are left out."""
    found = []
    for directory, names, files in os.walk(root, followlinks=False):
        names.sort()
        for name in files:
            path = os.path.join(directory, name)
            try:
                if stat.S_ISREG(os.lstat(path).st_mode):
                    found.append(os.path.relpath(path, root))
            except FileNotFoundError:
                continue
    return iter(sorted(found))


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def tree_bytes(root: Path) -> int:
    """Bytes of the regular files below a directory."""
    total = 0
    for name in regular_files(root):
        try:
            total += os.lstat(root / name).st_size
        except FileNotFoundError:
            continue
    return total
