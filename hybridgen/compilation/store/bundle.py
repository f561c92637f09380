"""Entries in one file, to bring to another machine.

A bundle is code: whoever wrote it can run what they like in the process that uses it. Checksums find damage, not bad
intent, so that importing one has to be asked for with `trust`.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hybridgen.compilation.store.files import UnusableError, regular_files
from hybridgen.compilation.store.locks import locked
from hybridgen.compilation.store.manifest import MANIFEST, READY, Manifest
from hybridgen.compilation.store.store import Store, size_cap
from hybridgen.compilation.store.versions import DIGEST
from hybridgen.errors import CacheError, shown

_HEADER = "hybridgen-cache.json"
_FORMAT = 1
_HEADER_BYTES = 2**20
_LIST_BYTES = {MANIFEST: 2**24, READY: 2**10}
"""What is read as a whole must be small."""
_READ_BYTES = 2**17
"""In one read: more than what a file is copied by, less than what a header could use to fill the memory."""
_MEMBERS = 500_000


def export_bundle(store: Store, path: Path, digests: Sequence[str] | None = None) -> list[str]:
    """Write entries to a file; returns their digests. Those that cannot be used are left out.

    Args:
        digests: which, or the beginnings of their digests; None for all.

    Raises:
        CacheError: there is no such entry, or the file exists or cannot be written.
    """
    infos = [info for info in store.entries() if info.problem is None]
    for wanted in digests or ():
        if not any(info.digest.startswith(wanted) for info in infos):
            raise CacheError(f"the compile cache has no usable entry {shown(wanted)}; hybridgen cache list shows them")
    chosen = [info.digest for info in infos if digests is None or info.digest.startswith(tuple(digests))]
    if not chosen:
        raise CacheError(f"{store.root} has no usable entry to export; hybridgen cache warm makes one")
    try:
        with open(path, "xb") as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as bundle:
            header = {"format": _FORMAT, "entries": chosen}
            _add(bundle, _HEADER, json.dumps(header).encode())
            for digest in chosen:
                _export(store, bundle, digest)
    except FileExistsError:
        raise CacheError(f"{path} exists; name another file") from None
    except (OSError, UnusableError) as error:
        path.unlink(missing_ok=True)
        raise CacheError(f"{path} is not written: {error}") from error
    return chosen


def _export(store: Store, bundle: tarfile.TarFile, digest: str) -> None:
    directory = store.path_of(digest)
    with locked(store.lock_of(digest), shared=True, wait_seconds=60.0):  # else it could be replaced meanwhile
        manifest = Manifest.read(directory, digest)
        for name in manifest.files:
            _add(bundle, f"{digest}/{name}", manifest.read_file(directory, name))
        # Last, as in the store.
        for name in (MANIFEST, READY):
            _add(bundle, f"{digest}/{name}", (directory / name).read_bytes())


def _add(bundle: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o600
    bundle.addfile(member, io.BytesIO(data))


def import_bundle(store: Store, path: Path, *, trust: bool) -> tuple[list[str], dict[str, str]]:
    """Put a bundle's entries into the store; those that are there already stay as they are.

    Args:
        trust: that whoever made the bundle may run code as you.

    Returns:
        The digests that came in, and why others did not.

    Entries of the store that were used least recently make room, as when one is published.

    Raises:
        CacheError: `trust` was not given, the file is no bundle or damaged, or it holds more than the store may; then
            nothing comes in.
    """
    if not trust:
        raise CacheError(
            f"{path} is not imported: a compile cache is code and pickle, and whoever made it can run anything as you. "
            "If you made it, or trust who did, say so with --trust"
        )
    stage = store.entries_directory / f".new-{uuid.uuid4().hex[:12]}"
    try:
        stage.mkdir(mode=0o700)
        digests = _unpack(path, stage, size_cap())
        for digest in digests:
            _check(stage / digest, digest)
        moved = _move_in(store, stage, digests)
    except CacheError:
        raise
    except Exception as error:  # what a damaged archive makes tarfile, gzip, zlib and json raise is not to be listed
        raise CacheError(
            f"{path} is no bundle of a compile cache, or damaged: {type(error).__name__}: {error}"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    store.prune()
    return moved


def _check(directory: Path, digest: str) -> None:
    """Check an unpacked entry: it holds what its manifest names, as it was written, and nothing else.

    Raises:
        UnusableError: it does not.
    """
    manifest = Manifest.read(directory, digest)
    for name in manifest.files:
        manifest.check_file(directory, name)
    more = next((name for name in regular_files(directory) if name not in {*manifest.files, MANIFEST, READY}), None)
    if more is not None:
        raise UnusableError(f"{shown(more)} is not named by the {MANIFEST} of entry {digest[:12]}")


class _Limited:
    """A bundle's bytes for `tarfile`, which reads each header of a member as a whole, however long it says it is."""

    def __init__(self, file: gzip.GzipFile, most: int) -> None:
        self._file = file
        self._most = most
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        """Raises `ValueError` where too much is asked for, or where the bundle goes on for too long."""
        if not 0 <= size <= _READ_BYTES:
            raise ValueError(f"it has a header of {size} bytes")
        if self._file.tell() + size > self._most:
            raise ValueError(f"it has more than {self._most} bytes")
        return self._file.read(size)


def _unpack(path: Path, stage: Path, most: int) -> list[str]:
    """Write the members to `stage`; only regular files below the directories of the entries that it names.

    Args:
        most: bytes of all files.
    """
    total = members = 0
    # Each file is padded and has headers.
    stream_bytes = most + most // 16 + 2**24
    with (
        gzip.open(path, "rb") as unzipped,
        tarfile.open(fileobj=cast(Any, _Limited(unzipped, stream_bytes)), mode="r:") as bundle,
    ):
        first = bundle.next()
        if first is None or first.name != _HEADER or first.size > _HEADER_BYTES:
            raise ValueError("it has no header")
        data = bundle.extractfile(first)
        header = json.loads(data.read()) if data is not None else {}
        if not isinstance(header, dict) or header.get("format") != _FORMAT or not isinstance(header["entries"], list):
            raise ValueError("it has no header of a format that this version reads")
        digests = [str(digest) for digest in header["entries"]]
        for digest in digests:
            if not DIGEST.fullmatch(digest):
                raise ValueError(f"it names an entry that no store has: {shown(digest)}")
            (stage / digest).mkdir(mode=0o700)  # not as a parent of a file: those have the umask's mode
        for member in bundle:
            if member.name == _HEADER:
                continue
            digest, _, name = member.name.partition("/")
            if not member.isreg() or digest not in digests or ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"it has a member that no bundle has: {shown(member.name)}")
            total += member.size
            members += 1
            if total > most or members > _MEMBERS:
                raise CacheError(
                    f"{path} is not imported: its files take more than {most} bytes, which is the size cap of the "
                    "store; set HYBRIDGEN_CACHE_MAX_BYTES, or export fewer entries with --entry"
                )
            content = bundle.extractfile(member)
            if content is None or member.size > _LIST_BYTES.get(name, most):
                raise ValueError(f"its {shown(member.name)} has {member.size} bytes")
            target = stage / digest / name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(target, "xb") as file:
                shutil.copyfileobj(content, file, _READ_BYTES)  # Python 3.14 asks for more by itself
            target.chmod(0o600)
    return digests


def _move_in(store: Store, stage: Path, digests: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    imported: list[str] = []
    left: dict[str, str] = {}
    for digest in digests:
        with locked(store.lock_of(digest), shared=False, wait_seconds=60.0):
            if store.path_of(digest).exists():
                left[digest] = "the store has it already"
                continue
            (stage / digest).rename(store.path_of(digest))
            imported.append(digest)
    return imported, left
