"""Checks the files of a checkpoint directory before their weights are read.

Only headers and indexes are read, so the cost does not grow with the weights. Transformers reports a broken
weight file without its name, or as something else; here each error names the file.

The safetensors format: 8 bytes header length (little-endian), a JSON header with dtype, shape and byte range
of each tensor, then the tensors' bytes, contiguous from 0
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridgen.errors import CheckpointError

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library sets."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as a safetensors header describes it."""

    dtype: str
    """The format's name, for example `BF16`."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def validate_directory(path: Path, allow_pickle: bool, weights_name: str | None = None) -> list[Path]:
    """Finds the weight files of a checkpoint directory and checks that they are whole.

    Looks for the same names in the same order as transformers: one safetensors file, a safetensors index, and
    with `allow_pickle` one `.bin` file or a `.bin` index. Of `.bin` files only presence and frame count.

    Args:
        path: the directory.
        allow_pickle: whether `.bin` files may be used.
        weights_name: a safetensors file or index to use instead (`transformers_weights` in a config).

    Returns:
        The weight files.

    Raises:
        CheckpointError: files missing, truncated, corrupt or contradictory; the message names the file.
    """
    names = weight_names(allow_pickle, weights_name)
    for name in names:
        file = path / name
        if file.is_file():
            files = _check_index(file) if name.endswith(".json") else [file]
            for weights in files:
                if weights.suffix == ".safetensors":
                    read_header(weights)
                else:
                    _check_pickle(weights)
            return files
    raise CheckpointError(_no_weights(path, names, allow_pickle))


def weight_names(allow_pickle: bool, weights_name: str | None) -> list[str]:
    """The names to look for, in order. Arguments and errors as in `validate_directory`."""
    if weights_name is not None:
        return [_plain_name(weights_name, "config.json")]
    return [SAFETENSORS, SAFETENSORS_INDEX, *((PICKLE, PICKLE_INDEX) if allow_pickle else ())]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name, after checking that the header and the file's size agree.

    Raises:
        CheckpointError: the file is missing, no safetensors file, truncated or corrupt.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(len(_LFS_POINTER))
            _reject_pointer(file, prefix)
            if size < 8:
                raise CheckpointError(f"{file} is truncated: {size} bytes, a safetensors file has more than 8")
            length = int.from_bytes(prefix[:8], "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{file} is no safetensors file: its header would have {length} bytes")
            if 8 + length > size:
                raise CheckpointError(
                    f"{file} is truncated: its header needs {8 + length} bytes, it has {size}; fetch it again"
                )
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    return _parse_header(file, raw, size - 8 - length)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, unreadable, a Git LFS pointer, or holds no JSON object.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    _reject_pointer(file, raw)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}; fetch or write it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}, not an object; fetch or write it again")
    return value


def _parse_header(file: Path, raw: bytes, data_size: int) -> dict[str, TensorEntry]:
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        entries = {name: _entry(value) for name, value in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is corrupt: its header cannot be read ({error}); fetch it again") from error
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position or entry.end < entry.start:
            raise CheckpointError(f"{file} is corrupt: the bytes of {name!r} do not follow those before it")
        bits = _BITS.get(entry.dtype)
        if bits is not None and entry.numel * bits != (entry.end - entry.start) * 8:
            raise CheckpointError(
                f"{file} is corrupt: {name!r} is {entry.dtype} {list(entry.shape)} in "
                f"{entry.end - entry.start} bytes; fetch it again"
            )
        position = entry.end
    if position > data_size:
        raise CheckpointError(
            f"{file} is truncated: its tensors need {position} bytes after the header, it has {data_size}; "
            "fetch it again"
        )
    if position < data_size:
        raise CheckpointError(f"{file} is corrupt: {data_size - position} bytes follow its last tensor")
    return entries


def _entry(value: Any) -> TensorEntry:
    start, end = value["data_offsets"]
    shape = tuple(value["shape"])
    for number in (start, end, *shape):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{number!r} where a size is expected")
    return TensorEntry(str(value["dtype"]), shape, start, end)


def _check_index(index: Path) -> list[Path]:
    """The shards that an index names, after checking that they exist and hold the tensors it promises."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to files; fetch or write it again")
    by_file: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index} gives {name!r} as the file of {tensor!r}; fetch or write it again")
        by_file.setdefault(_plain_name(name, str(index)), []).append(tensor)
    missing = [name for name in sorted(by_file) if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(by_file)} files, of which {len(missing)} are missing: {few(missing)}; fetch them"
        )
    for name, tensors in by_file.items():
        if not name.endswith(".safetensors"):
            continue
        lacking = sorted(set(tensors) - read_header(index.parent / name).keys())
        if lacking:
            raise CheckpointError(
                f"{index} promises tensors in {name} that it does not have: {few(lacking)}; fetch both files again"
            )
    return [index.parent / name for name in sorted(by_file)]


def _check_pickle(file: Path) -> None:
    with open(file, "rb") as stream:
        prefix = stream.read(len(_LFS_POINTER))
    _reject_pointer(file, prefix)
    # torch.save writes a zip archive, whose directory is at its end; older versions wrote a bare pickle.
    if prefix.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is truncated: the end of its archive is missing; fetch it again")
    if not prefix.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{file} is not a file of PyTorch weights; fetch it again")


def _plain_name(name: str, where: str) -> str:
    """Refuses names that lead out of the directory."""
    if os.path.isabs(name) or ".." in Path(name).parts or not name:
        raise CheckpointError(f"{where} names the weight file {name!r}, which is outside its directory")
    return name


def _reject_pointer(file: Path, prefix: bytes) -> None:
    if prefix.startswith(_LFS_POINTER):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory")


def _no_weights(path: Path, names: list[str], allow_pickle: bool) -> str:
    for each in (path / name for name in names):
        if each.is_symlink() and not each.exists():
            return f"{each} is a link to {os.readlink(each)!r}, which is not there; fetch it again, or mend the link"
        if each.exists() and not each.is_file():
            return f"{each} is no file; put the weights there"
    message = f"{path} has no weights: no {' or '.join(names)}"
    if not allow_pickle and any((path / name).is_file() for name in (PICKLE, PICKLE_INDEX)):
        return (
            f"{message}, only {PICKLE.removesuffix('.bin')}*.bin, whose loading can run code; convert it to "
            "safetensors, or set allow_pickle=True if you trust it"
        )
    others = sorted(p.name for p in path.glob("*") if p.suffix in (".safetensors", ".gguf", ".bin", ".pth", ".pt"))
    return f"{message} (found: {few(others)})" if others else f"{message}; complete the download or the copy"


def few(names: list[str], limit: int = 4) -> str:
    """The first names of a list, for a message."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
