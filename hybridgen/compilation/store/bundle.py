"""Entries in one file, to bring to another machine.

A bundle is code: whoever wrote it can run what they like in the process that uses it. Checksums find damage, not bad
intent, so that importing one has to be asked for with `trust`.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from hybridgen.compilation.store.files import UnusableError
from hybridgen.compilation.store.locks import locked
from hybridgen.compilation.store.manifest import MANIFEST, READY, Manifest
from hybridgen.compilation.store.store import DIGEST, Store
from hybridgen.errors import CacheError, shown

_HEADER = "hybridgen-cache.json"
_FORMAT = 1
_MOST_BYTES = 64 * 2**30


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

    Raises:
        CacheError: `trust` was not given, or the file is no bundle or damaged; then nothing comes in.
    """
    if not trust:
        raise CacheError(
            f"{path} is not imported: a compile cache is code and pickle, and whoever made it can run anything as you. "
            "If you made it, or trust who did, say so with --trust"
        )
    stage = store.entries_directory / f".new-{uuid.uuid4().hex[:12]}"
    try:
        stage.mkdir(mode=0o700)
        digests = _unpack(path, stage)
        for digest in digests:
            manifest = Manifest.read(stage / digest, digest)
            for name in manifest.files:
                manifest.read_file(stage / digest, name)
        return _move_in(store, stage, digests)
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, UnusableError, OSError) as error:
        raise CacheError(f"{path} is no bundle of a compile cache, or damaged: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _unpack(path: Path, stage: Path) -> list[str]:
    """Write the members to `stage`; only regular files below the directories of the entries that it names."""
    total = 0
    with tarfile.open(path, mode="r:gz") as bundle:
        first = bundle.next()
        data = bundle.extractfile(first) if first is not None and first.name == _HEADER else None
        header = json.loads(data.read(2**20)) if data is not None else {}
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
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
            content = bundle.extractfile(member)
            if total > _MOST_BYTES or content is None:
                raise ValueError(f"its files have more than {_MOST_BYTES} bytes")
            target = stage / digest / name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(target, "xb") as file:
                shutil.copyfileobj(content, file)
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
