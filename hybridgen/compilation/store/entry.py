"""One entry while an engine uses it.

Compilers never work in the store. They get a working copy, each file of which was checked as it was copied, and what
they add comes into the store as a new version of the entry, whole (`Store.publish`).
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hybridgen.compilation.store.files import UnusableError, read_json, regular_files, write_json
from hybridgen.compilation.store.key import Key
from hybridgen.compilation.store.locks import FileLock
from hybridgen.compilation.store.manifest import PARTS, Manifest
from hybridgen.compilation.store.relocation import local

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_MADE = ".new-"
"""Before the name of a working copy that has no lock yet, so that nobody takes it for one of a killed process."""
_MADE_SECONDS = 60.0
_LEFT_OUT = re.compile(r"(^|/)(tmp\.[^/]*|[^/]*\.lock|[^/]*\.tmp|lock|locks/.*|[^/]*\.gch|\.[^/]*)($|/)")
"""What compilers leave that is of no use to others: unfinished files, locks, precompiled headers."""


Identity = tuple[int, int]
"""Of a version's directory in the store."""
Stamp = tuple[int, int]
"""Bytes of a file, and when it was last written."""


class Version(NamedTuple):
    """The version of an entry that a working copy was made of."""

    identity: Identity
    files: Mapping[str, tuple[int, str]]
    """Bytes and SHA-256 by relative name."""


class Changes(NamedTuple):
    """A working copy's files at one moment, against what the store had when they were taken or published."""

    files: Mapping[str, Stamp]
    before: Mapping[str, Stamp]
    base: Mapping[str, tuple[int, str]]

    def is_behind(self, name: str, there: tuple[int, str]) -> bool:
        """Whether the store has another file by now, and this one is as it was."""
        return name in self.base and self.base[name] != there and self.files[name] == self.before.get(name)


class Entry:
    """The working copy of one entry: directories for compilers and documents by name."""

    def __init__(
        self, key: Key, place: WorkingDirectory, *, hit: bool, reason: str, version: Version | None = None
    ) -> None:
        """Use `Store.open`."""
        self.key = key
        self._place = place
        self.directory = directory = place.path
        self.hit = hit
        """Whether the store had it."""
        self.reason = reason
        """Why not, in words; or where it is from."""
        self.reads: dict[str, bool] = {}
        """Documents that were asked for, and whether they were there."""
        self.origin = None if version is None else version.identity
        """The version in the store that this was copied from or published as."""
        for part in PARTS:
            (directory / part).mkdir(mode=0o700, exist_ok=True)
        self._published = self._snapshot()
        self._base = {} if version is None else dict(version.files)

    @property
    def inductor(self) -> Path:
        """`TORCHINDUCTOR_CACHE_DIR`."""
        return self.directory / "inductor"

    @property
    def triton(self) -> Path:
        """`TRITON_CACHE_DIR`."""
        return self.directory / "triton"

    @property
    def aot(self) -> Path:
        """Compiled units that need no tracing."""
        return self.directory / "aot"

    @property
    def kernels(self) -> Path:
        """A directory for compiled kernels of our own (cubins), by names of the caller's choice."""
        return self.directory / "kernels"

    def read_document(self, name: str) -> dict[str, Any] | None:
        """A JSON document; None where there is none.

        Raises:
            ValueError: the name is none.
        """
        path = self._document(name)
        value = None
        if path.exists():
            try:
                value = read_json(path, name)
            except UnusableError as error:
                logger.debug("document %s: %s", name, error)
        self.reads[name] = value is not None
        return value

    def write_document(self, name: str, document: dict[str, Any]) -> None:
        """Keep a JSON document; it is in the store once the entry is published (at the end of start-up, at close).

        Raises:
            ValueError: the name is none, or the document is not JSON.
            OSError: it cannot be written.
        """
        write_json(self._document(name), _checked(name, document))

    def close(self) -> None:
        """Delete the working copy: nothing can be published any more. What is loaded of it stays loaded."""
        self._place.close()

    def _document(self, name: str) -> Path:
        return self.directory / "documents" / f"{checked_name(name)}.json"

    @property
    def changed(self) -> bool:
        """Whether there is something that was not published."""
        return self._snapshot() != self._published

    def changes(self) -> Changes:
        """What a new version is made of."""
        return Changes(self._snapshot(), self._published, self._base)

    def note_published(self, changes: Changes, written: Mapping[str, tuple[int, str]], origin: Identity | None) -> None:
        """These files are in the store; others of these changes were left to what it had."""
        self._published, self.origin = dict(changes.files), origin
        self._base.update(written)

    def files(self) -> list[str]:
        """Relative names of what is worth keeping."""
        return [name for name in regular_files(self.directory) if _kept(name)]

    def _snapshot(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name in self.files():
            try:
                info = os.stat(self.directory / name)
            except FileNotFoundError:
                continue
            found[name] = info.st_size, info.st_mtime_ns
        return found


class MemoryEntry:
    """An entry of no store: documents and kernels live as long as it does."""

    hit = False
    changed = False

    def __init__(self, reason: str) -> None:
        """`reason` says why there is no store."""
        self.reason = reason
        self.reads: dict[str, bool] = {}
        self._documents: dict[str, dict[str, Any]] = {}
        self._kernels: Path | None = None
        self._undo: Any = None

    @property
    def kernels(self) -> Path:
        """A private directory that is deleted with the entry."""
        if self._kernels is None:
            self._kernels = Path(tempfile.mkdtemp(prefix="hybridgen-kernels-"))
            self._undo = weakref.finalize(self, delete, self._kernels, os.getpid())
        return self._kernels

    def close(self) -> None:
        """Delete the directory of kernels, if there is one. What is loaded of it stays loaded."""
        if self._undo is not None:
            self._undo()

    def read_document(self, name: str) -> dict[str, Any] | None:
        """What `write_document` was given; None before.

        Raises:
            ValueError: the name is none.
        """
        found = self._documents.get(checked_name(name))
        self.reads[name] = found is not None
        return copy.deepcopy(found)

    def write_document(self, name: str, document: dict[str, Any]) -> None:
        """Keep a JSON document.

        Raises:
            ValueError: the name is none, or the document is not JSON.
        """
        self._documents[checked_name(name)] = copy.deepcopy(_checked(name, document))


class WorkingDirectory:
    """A directory for a working copy, deleted by `close()`, when it is dropped, or when the process ends; what a killed
    process left is deleted by others."""

    def __init__(self, work: Path | None) -> None:
        """Make one in `work`, or among the temporary files where that cannot be written.

        Raises:
            OSError: nothing can be written anywhere.
        """
        self.outside: str | None = None
        """Why it is not in the store."""
        try:
            if work is None:
                raise PermissionError(0, "it is read-only")
            work.mkdir(mode=0o700, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=_MADE, dir=work))
        except OSError as error:
            self.outside = f"the store cannot be written ({error.strerror})"
            self.path = Path(tempfile.mkdtemp(prefix="hybridgen-cache-"))
        self._lock = FileLock(self.path / ".lock")
        self._lock.take()
        if self.outside is None:  # from here on others see it, and that it is locked
            self.path = self.path.rename(self.path.with_name(self.path.name.removeprefix(_MADE)))
        self._undo = weakref.finalize(self, _give_up, self.path, self._lock, os.getpid())

    def close(self) -> None:
        """Delete it and let go of its lock. Closing twice is fine."""
        self._undo()


def _give_up(path: Path, lock: FileLock, owner: int) -> None:
    delete(path, owner)  # before its lock, or another process could take it for a leftover meanwhile
    if os.getpid() == owner:
        lock.release()


def sweep(work: Path) -> None:
    """Delete the working copies of processes that are gone."""
    try:
        found = [path for path in work.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return
    for path in found:
        lock = FileLock(path / ".lock")
        try:
            if path.name.startswith(_MADE) and time.time() - os.lstat(path).st_mtime < _MADE_SECONDS:
                continue
            # One without its lock is being deleted.
            if (path / ".lock").exists() and lock.take():
                shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            logger.debug("%s stays: %s", path, error)
        finally:
            lock.release()


def copy_checked(source: Path, manifest: Manifest, destination: Path) -> None:
    """Copy an entry's files, each checked as it is read.

    Raises:
        UnusableError: one of them is not what was written.
        OSError: the copy cannot be written.
    """
    for name in manifest.files:
        data = local(name, manifest.read_file(source, name), destination)
        path = destination / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)


def checked_name(name: str) -> str:
    """A document's name.

    Raises:
        ValueError: it is not made of lower-case letters, digits, '.', '_' and '-'.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a document; use lower-case letters, digits, '.', '_' and '-'")
    return name


def _checked(name: str, document: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ValueError(f"document {name!r} is a {type(document).__name__}; give a dict")
    try:
        json.dumps(document)
    except TypeError as error:
        raise ValueError(f"document {name!r} is not JSON: {error}") from error
    return document


def _kept(name: str) -> bool:
    return name.split("/", 1)[0] in PARTS and not _LEFT_OUT.search(name)


def delete(path: Path, owner: int) -> None:
    """Delete a directory of this process; nothing in a child that was forked."""
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
