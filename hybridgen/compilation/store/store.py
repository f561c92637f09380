"""The store: entries by key, documents by device; opening, publishing, listing, pruning."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridgen.compilation.store.devices import DeviceDocuments
from hybridgen.compilation.store.entry import (
    Entry,
    Identity,
    Version,
    WorkingDirectory,
    checked_name,
    copy_checked,
    sweep,
)
from hybridgen.compilation.store.files import UnusableError, tree_bytes
from hybridgen.compilation.store.key import Key, describe
from hybridgen.compilation.store.location import candidates, make_private
from hybridgen.compilation.store.locks import FileLock, locked
from hybridgen.compilation.store.manifest import READY, Manifest
from hybridgen.compilation.store.versions import DIGEST, Versions, identity, remove

logger = logging.getLogger(__name__)

MAX_BYTES = 8 * 2**30
"""Of all entries together, when a new one is published; `$HYBRIDGEN_CACHE_MAX_BYTES` is another number."""
_WAIT_SECONDS = 600.0
"""For another process that compiles the same."""
_LOCK_SECONDS = 60.0
"""For another process that copies or publishes an entry."""
_QUARANTINED = 4
"""Entries that are kept after they were moved aside."""
Update = Callable[[dict[str, Any] | None], dict[str, Any]]
"""A document, made of what the store has under its name."""


@dataclass(frozen=True)
class EntryInfo:
    """An entry as `hybridgen cache list` shows it."""

    digest: str
    manifest: Manifest | None
    problem: str | None
    """Why it cannot be used; its files are not read for this."""
    used: float
    """When it was last used, in seconds since 1970."""
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """Whether there is an entry for a key, and what stands in the way."""

    key: Key
    hit: bool
    reason: str
    nearest: str | None = None
    """The digest of the entry that differs in the fewest parts."""
    differences: dict[str, tuple[Any, Any]] | None = None
    """By part: (wanted, there)."""


class Store:
    """A private directory with entries."""

    def __init__(self, root: Path, *, device: str = "cpu") -> None:
        """
        Args:
            device: what `documents` are about: the GPU's name and driver.

        Raises:
            UnusableError: the directory is not private and cannot be made so.
        """
        make_private(root)
        self.root = root
        self.device = device
        self.documents = DeviceDocuments(root, device)
        """What is known about this GPU with this driver."""
        self.entries_directory, self.work, self._locks = (root / name for name in ("entries", "work", "locks"))
        self._versions = Versions(self.entries_directory)
        self.writable = os.access(root, os.W_OK)
        for directory in (self.entries_directory, self.work, self._locks):
            try:
                directory.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                self.writable = False
                logger.debug("%s: %s", directory, error)

    @classmethod
    def find(cls, configured: Any = True, *, device: str = "cpu") -> tuple[Store | None, list[str]]:
        """The first of the places that can be used, and why those before it cannot.

        Args:
            configured: `EngineConfig.compile_cache`.
        """
        problems: list[str] = []
        for path in candidates(configured):
            try:
                return cls(path, device=device), problems
            except UnusableError as error:
                problems.append(str(error))
        return None, problems

    @contextmanager
    def open(self, key: Key, *, wait: bool = True) -> Iterator[Entry]:
        """A working copy of the entry for a key. Where there is none it is empty, and other processes that want it wait
        until this one leaves the block, so that only one compiles.

        Args:
            wait: whether to wait likewise.

        Raises:
            OSError: no working copy can be written.
        """
        sweep(self.work)
        build = FileLock(self._locks / f"{key.digest}.build")
        try:
            entry = self._open(key)
            if not entry.hit and wait and self.writable:
                entry = self._wait_or_build(key, build, entry)
            yield entry
        finally:
            build.release()

    def _wait_or_build(self, key: Key, build: FileLock, empty: Entry) -> Entry:
        """Take the right to build an entry; where another process has it, wait and look again."""
        try:
            if build.take():
                # Between our look and the lock, another may have published.
                found = self._open(key)
                return found if found.hit else empty
            logger.info("another process compiles the same (%s); waiting for it", key.digest[:12])
            if not build.take(wait_seconds=_WAIT_SECONDS):
                logger.warning("another process has compiled the same for %.0f s; this one does too", _WAIT_SECONDS)
                return empty
        except OSError as error:
            logger.debug("no lock: %s", error)
            return empty
        found = self._open(key)
        if found.hit:
            build.release()  # nothing to build: the others need not wait for us
            return found
        return empty

    def _open(self, key: Key) -> Entry:
        place = WorkingDirectory(self.work if self.writable else None)
        found = self._copy_to(place.path, key)
        if isinstance(found, Version):
            return Entry(key, place, hit=True, reason=place.outside or "found", version=found)
        return Entry(key, place, hit=False, reason=found)

    def _copy_to(self, destination: Path, key: Key) -> Version | str:
        """Copy the entry for a key; returns which version that was, or why there is none to copy."""
        directory = self.path_of(key.digest)
        with locked(self.lock_of(key.digest), shared=True, wait_seconds=_LOCK_SECONDS) as held:
            if held:
                self._versions.put_back(key.digest)
            seen = identity(directory)
            if seen is None:
                return self.explain(key).reason
            try:
                manifest = Manifest.read(directory, key.digest)
                manifest.check_for(key)
                copy_checked(directory, manifest, destination)
                _touch(directory)
                return Version(seen, manifest.files)
            except UnusableError as error:
                reason = str(error)
        for name in os.listdir(destination):
            if name != ".lock":
                shutil.rmtree(destination / name, ignore_errors=True)
        self.move_aside(key.digest, reason, only=seen)
        return f"the entry was moved aside: {reason}"

    def path_of(self, digest: str) -> Path:
        """The directory of an entry."""
        return self._versions.path_of(digest)

    def lock_of(self, digest: str) -> Path:
        """The lock of an entry: shared to copy it, alone to change it."""
        return self._locks / f"{digest}.lock"

    def publish(self, entry: Entry, updates: Mapping[str, Update] | None = None) -> int:
        """Make the working copy the new version of its entry; returns its bytes, 0 where nothing changed.

        Of the version there, files are kept that the working copy lacks, or that another process has published since
        this one took or published its own and did not change it.

        Args:
            updates: documents to write first, each made of what the version there has under that name (or None):
                nobody publishes in between, so that nothing of what several processes add up is lost.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        updates = updates or {}
        if not updates and (not entry.changed or not entry.files()):
            return 0
        key, directory = entry.key, self.path_of(entry.key.digest)
        self._versions.delete_leftovers()
        with locked(self.lock_of(key.digest), shared=False, wait_seconds=_LOCK_SECONDS) as held:
            if not held:
                raise OSError(0, "the store is read-only, or another process holds the entry's lock")
            self._versions.put_back(key.digest)
            there = self._version_there(key.digest)
            for name, make in updates.items():
                entry.write_document(name, make(self._document_of(there, directory, name)))
            changes = entry.changes()
            manifest, written = self._versions.replace(key, changes, entry.directory, there)
            entry.note_published(changes, written, identity(directory))
        self.prune(keep=key.digest)
        return manifest.size

    def _version_there(self, digest: str) -> Manifest | None:
        try:
            return Manifest.read(self.path_of(digest), digest)
        except UnusableError as error:
            logger.debug("nothing is kept of %s: %s", digest, error)
            return None

    @staticmethod
    def _document_of(there: Manifest | None, directory: Path, name: str) -> dict[str, Any] | None:
        path = f"documents/{checked_name(name)}.json"
        if there is None or path not in there.files:
            return None
        try:
            value = json.loads(there.read_file(directory, path))
        except (UnusableError, ValueError) as error:
            logger.debug("document %s: %s", name, error)
            return None
        return value if isinstance(value, dict) else None

    def move_aside(self, digest: str, reason: str, *, only: Identity | None = None) -> None:
        """Put an entry where nobody uses it, if it can be moved; the oldest of those there are deleted.

        Args:
            only: which version; another stays where it is. None: any.
        """
        aside = self.root / "quarantine"
        target = aside / f"{digest}.{time.time_ns():x}"
        with locked(self.lock_of(digest), shared=False, wait_seconds=_LOCK_SECONDS) as held:
            if not held or (only is not None and identity(self.path_of(digest)) != only):
                logger.debug("%s stays where it is: it is in use, or another version by now", digest)
                return
            self._versions.forget_old(digest)
            try:
                aside.mkdir(mode=0o700, exist_ok=True)
                os.rename(self.path_of(digest), target)
                if target.is_dir() and not target.is_symlink():
                    (target / "reason.txt").write_text(reason + "\n")
                for path in sorted(aside.iterdir(), key=lambda path: path.name.rpartition(".")[2])[:-_QUARANTINED]:
                    remove(path)
            except OSError as error:  # read-only: it is a miss all the same
                logger.debug("%s stays where it is: %s", digest, error)

    def entries(self) -> list[EntryInfo]:
        """All of them, the last used first."""
        found = []
        try:
            names = os.listdir(self.entries_directory)
        except OSError:
            names = []
        for digest in filter(DIGEST.fullmatch, names):
            directory = self.path_of(digest)
            manifest, problem = None, None
            try:
                manifest = Manifest.read(directory, digest)
            except UnusableError as error:
                problem = str(error)
            try:
                used = os.lstat(directory / READY).st_mtime
            except OSError:
                used = 0.0
            found.append(EntryInfo(digest, manifest, problem, used, tree_bytes(directory)))
        return sorted(found, key=lambda info: info.used, reverse=True)

    def explain(self, key: Key) -> Explanation:
        """Hit or miss, and which parts differ from those of the nearest entry. The files are not read."""
        usable = {info.digest: info.manifest for info in self.entries() if info.manifest is not None}
        if key.digest in usable:
            return Explanation(key, True, "the store has an entry for this key")
        broken = next((info.problem for info in self.entries() if info.digest == key.digest), None)
        if broken is not None:
            return Explanation(key, False, broken)
        if not usable:
            return Explanation(key, False, "the store is empty")
        compared = {digest: key.differences(manifest.key.parts) for digest, manifest in usable.items()}
        nearest = min(compared, key=lambda digest: len(compared[digest]))
        reason = f"no entry for this key; the nearest, {nearest[:12]}, differs in {describe(compared[nearest])}"
        if "hybridgen sources" in compared[nearest]:
            reason += "; hybridgen's own code has changed since it was made"
        return Explanation(key, False, reason, nearest, compared[nearest])

    def check(self, key: Key) -> Explanation:
        """As `explain()`, and every file of the entry is read and checked. Nothing is moved aside."""
        directory = self.path_of(key.digest)
        with locked(self.lock_of(key.digest), shared=True, wait_seconds=_LOCK_SECONDS) as held:
            if held:
                self._versions.put_back(key.digest)
            found = self.explain(key)
            if not found.hit:
                return found
            try:
                manifest = Manifest.read(directory, key.digest)
                for name in manifest.files:
                    manifest.read_file(directory, name)
            except UnusableError as error:
                return Explanation(key, False, str(error))
        return found

    def prune(self, max_bytes: int | None = None, *, keep: str | None = None) -> list[str]:
        """Delete entries, the least recently used first, until the rest fits; returns their digests."""
        limit = size_cap() if max_bytes is None else max_bytes
        infos = self.entries()
        total = sum(info.bytes for info in infos)
        deleted = []
        for info in reversed(infos):
            if total <= limit:
                break
            if info.digest != keep and self.delete(info.digest):
                total -= info.bytes
                deleted.append(info.digest)
        return deleted

    def delete(self, digest: str) -> bool:
        """Delete an entry; False where it is in use this moment or cannot be deleted."""
        with locked(self.lock_of(digest), shared=False, wait_seconds=1.0) as held:
            if not held:
                return False
            try:
                self._versions.delete(digest)
            except OSError as error:
                logger.debug("%s is not deleted: %s", digest, error)
                return False
        return True

    def clear(self) -> int:
        """Delete all entries, device documents and what was moved aside; returns how many entries that were."""
        count = sum(self.delete(info.digest) for info in self.entries())
        for path in (*self.entries_directory.glob(".*"), self.root / "quarantine", self.root / "devices"):
            remove(path)
        return count


def size_cap() -> int:
    """The size cap of all entries together."""
    text = os.environ.get("HYBRIDGEN_CACHE_MAX_BYTES", "")
    return int(text) if text.isdigit() else MAX_BYTES


def _touch(directory: Path) -> None:
    try:
        os.utime(directory / READY)
    except OSError as error:
        logger.debug("%s: its last use is not noted: %s", directory, error)
