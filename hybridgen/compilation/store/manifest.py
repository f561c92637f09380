"""An entry's list of files: what was written, and the proof that all of it was."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hybridgen.compilation.store.files import (
    UnusableError,
    check_owned,
    read_checked,
    read_json,
    sha256,
    write_json,
    write_whole,
)
from hybridgen.compilation.store.key import Key, describe

FORMAT = 1
MANIFEST, READY = "manifest.json", "ready"
PARTS = ("inductor", "triton", "aot", "kernels", "documents")
"""The directories of an entry."""


@dataclass(frozen=True)
class Manifest:
    """What an entry holds."""

    key: Key
    files: Mapping[str, tuple[int, str]]
    """Bytes and SHA-256 by relative name."""
    created: float = field(default_factory=time.time)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def write(self, directory: Path) -> None:
        """Write it, and after it the marker that says that the entry is whole.

        Raises:
            OSError: it cannot be written.
        """
        value = {
            "format": FORMAT,
            "key": self.key.digest,
            "parts": dict(self.key.parts),
            "created": self.created,
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()},
        }
        write_json(directory / MANIFEST, value)
        write_whole(directory / READY, sha256((directory / MANIFEST).read_bytes()).encode())

    @classmethod
    def read(cls, directory: Path, digest: str) -> Manifest:
        """Read and check it; the files are checked as they are read (`read_file`).

        Raises:
            UnusableError: the entry is not whole, another user's, of another format, or for another key than its name.
        """
        if directory.is_symlink():
            raise UnusableError("the entry is a symbolic link")
        try:
            check_owned(os.lstat(directory), "the entry")
        except FileNotFoundError:
            raise UnusableError("the entry is missing") from None
        marker = read_checked(directory / READY, READY)
        if sha256(read_checked(directory / MANIFEST, MANIFEST)).encode() != marker.strip():
            raise UnusableError(f"{MANIFEST} is not the one that {READY} is for; it was cut off or changed")
        value = read_json(directory / MANIFEST, MANIFEST)
        if value.get("format") != FORMAT:
            raise UnusableError(f"{MANIFEST} has format {value.get('format')!r}, and this version reads {FORMAT}")
        try:
            key = Key(dict(value["parts"]))
            files = {_checked(name): (int(f["bytes"]), str(f["sha256"])) for name, f in value["files"].items()}
            created = float(value["created"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UnusableError(f"{MANIFEST} lacks what it should have") from None
        parents = {parent for name in files for parent in Path(name).parents}
        both = next((name for name in sorted(files) if Path(name) in parents), None)
        if both is not None:
            raise UnusableError(f"{MANIFEST} names {both} as a file and as a directory")
        linked = next((parent for parent in sorted(parents) if (directory / parent).is_symlink()), None)
        if linked is not None:
            raise UnusableError(f"{linked} is a symbolic link")
        if key.digest != digest:
            raise UnusableError(f"it was made for the key {key.digest[:12]}, not for the one that it is named after")
        return cls(key, files, created)

    def read_file(self, directory: Path, name: str) -> bytes:
        """The bytes of one of its files.

        Raises:
            UnusableError: they are not those that were written.
        """
        size, digest = self.files[name]
        data = read_checked(directory / name, name)
        if len(data) != size:
            raise UnusableError(f"{name} has {len(data)} bytes and should have {size}")
        if sha256(data) != digest:
            raise UnusableError(f"{name} has other contents than were written (SHA-256 differs)")
        return data

    def check_file(self, directory: Path, name: str) -> None:
        """As `read_file`, without holding the file's bytes.

        Raises:
            UnusableError: they are not those that were written.
        """
        size, digest = self.files[name]
        path = directory / name
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            there = os.stat(path).st_size
        except OSError as error:
            raise UnusableError(f"{name} cannot be read ({error.strerror})") from None
        if there != size or found != digest:
            raise UnusableError(f"{name} has other contents than were written")

    def check_for(self, key: Key) -> None:
        """Raise unless it is for this key.

        Raises:
            UnusableError: parts differ; the message names them.
        """
        differing = key.differences(self.key.parts)
        if differing:
            raise UnusableError(f"it was made for something else: {describe(differing)}")


def _checked(name: Any) -> str:
    """A relative name that stays inside one of an entry's directories."""
    path = PurePosixPath(name)
    os.fsencode(name)  # a lone surrogate is a ValueError
    if "\0" in name or path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or path.parts[0] not in PARTS:
        raise ValueError(name)
    return str(path)
