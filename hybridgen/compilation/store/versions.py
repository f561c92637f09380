"""Versions of entries as directories: one is written beside the entry, put in its place whole, and never changed.

Who calls holds the entry's lock, shared or alone as each method says.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import time
import uuid
from pathlib import Path

from hybridgen.compilation.store.entry import Changes, Identity
from hybridgen.compilation.store.files import UnusableError, sha256
from hybridgen.compilation.store.key import Key
from hybridgen.compilation.store.manifest import Manifest
from hybridgen.compilation.store.relocation import portable

logger = logging.getLogger(__name__)

DIGEST = re.compile(r"[0-9a-f]{32}")
_LEFTOVER_SECONDS = 3600.0
_OLD = ".old-"
"""Before an entry's digest: the version that a new one replaces, as long as both are there."""

Files = dict[str, tuple[int, str]]
"""Bytes and SHA-256 by relative name."""


class Versions:
    """The directory of all entries."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path_of(self, digest: str) -> Path:
        """The directory of an entry."""
        return self.directory / digest

    def replace(self, key: Key, changes: Changes, source: Path, there: Manifest | None) -> tuple[Manifest, Files]:
        """Write a new version and put it in the place of the one there. Alone.

        Args:
            changes: what is new in the working copy.
            source: the working copy.
            there: the version there, whose other files are kept; None where there is none.

        Returns:
            The new version's manifest, and the files that are the working copy's.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        directory = self.path_of(key.digest)
        stage = self.directory / f".new-{uuid.uuid4().hex[:12]}"
        stage.mkdir(mode=0o700)
        try:
            try:
                written, theirs = _write(changes, source, stage, there, directory)
            except UnusableError as error:
                logger.debug("nothing is kept of %s: %s", directory, error)
                shutil.rmtree(stage)
                stage.mkdir(mode=0o700)
                written, theirs = _write(changes, source, stage, None, directory)
            manifest = Manifest(key, {**written, **theirs})
            manifest.write(stage)
            self._swap(stage, directory)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        return manifest, written

    def _swap(self, stage: Path, directory: Path) -> None:
        old = self.directory / f"{_OLD}{directory.name}-{uuid.uuid4().hex[:12]}"
        self.forget_old(directory.name)
        if os.path.lexists(directory):
            os.rename(directory, old)
        os.rename(stage, directory)  # killed before this, `put_back` finds the old one
        remove(old)

    def put_back(self, digest: str) -> None:
        """Where a process was killed between the two steps of `_swap`: the old version is the entry again.

        Under the entry's lock, shared or not: nobody is between them now.
        """
        directory = self.path_of(digest)
        if os.path.lexists(directory):
            return
        for old in sorted(self.directory.glob(f"{_OLD}{digest}-*"), key=_changed_at, reverse=True):
            try:
                os.rename(old, directory)
                logger.info("%s: a process was killed while it published; what was there is used", digest)
                return
            except OSError as error:  # read-only, or another reader was first
                logger.debug("%s stays where it is: %s", old, error)

    def forget_old(self, digest: str) -> None:
        """Delete versions of an entry that were replaced by a process that was killed after it. Alone."""
        for old in self.directory.glob(f"{_OLD}{digest}-*"):
            remove(old)

    def delete(self, digest: str) -> None:
        """Delete an entry. Alone.

        Raises:
            OSError: it cannot be deleted.
        """
        self.forget_old(digest)  # it would be put back
        gone = self.directory / f".gone-{uuid.uuid4().hex[:12]}"
        os.rename(self.path_of(digest), gone)
        remove(gone)

    def delete_leftovers(self) -> None:
        """Delete what processes that were killed while they published left here, apart from the only version of an
        entry. No lock is needed."""
        for path in self.directory.glob(".*"):
            digest = path.name.removeprefix(_OLD)[:32]
            if DIGEST.fullmatch(digest) and not os.path.lexists(self.path_of(digest)):
                continue
            if time.time() - _changed_at(path) > _LEFTOVER_SECONDS:
                remove(path)


def identity(directory: Path) -> Identity | None:
    """What tells the versions of an entry apart; None where there is none."""
    try:
        info = os.lstat(directory)
    except FileNotFoundError:
        return None
    return info.st_ino, info.st_mtime_ns


def remove(path: Path) -> None:
    """Delete a file or a tree, as far as it can be."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _write(changes: Changes, source: Path, stage: Path, there: Manifest | None, directory: Path) -> tuple[Files, Files]:
    """Write the files of a new version; returns those of the working copy, and those of the version there.

    Raises:
        UnusableError: a file of the version there is not what was written.
    """
    files = {} if there is None else there.files
    written: Files = {}
    theirs: Files = {}
    for name in changes.files:
        if name in files and changes.is_behind(name, files[name]):
            continue
        try:
            data = portable(name, (source / name).read_bytes())
        except FileNotFoundError:  # a compiler's temporary file
            continue
        written[name] = _put(stage / name, data)
    if there is not None:
        for name in files.keys() - written.keys():
            theirs[name] = _put(stage / name, there.read_file(directory, name))
    return written, theirs


def _put(path: Path, data: bytes) -> tuple[int, str]:
    """Write a file of a version that nobody sees yet. Not synced: what a power cut leaves of it fails its check."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return len(data), sha256(data)


def _changed_at(path: Path) -> float:
    try:
        return os.lstat(path).st_mtime
    except FileNotFoundError:
        return math.inf
