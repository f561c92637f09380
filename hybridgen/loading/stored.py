"""The quantised projections of a checkpoint's files: found, checked, and read one by one."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hybridgen.errors import CheckpointError, UnsupportedModelError
from hybridgen.loading.checks import TensorEntry, few, read_header
from hybridgen.loading.device_reads import LEAST, DeviceReads
from hybridgen.loading.formats import Format
from hybridgen.loading.formats.scheme import TINY, Damaged, Scheme
from hybridgen.models.quantised import QuantisedWeight

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}
"""Of what threads read; others are left to safetensors."""
_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "F4")
_LEFT_OUT = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "activation_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
    "q_scale",
    "output_scale",
)
"""Scales of activations and of the KV cache, which are kept in 16 bits here."""


class TensorFiles:
    """The tensors of safetensors files, by name."""

    by_threads = False
    """Whether large tensors are read onto a GPU by threads (`device_reads`). That has not run on one yet:
    `benchmarks/quantised_loading.py` times both ways."""

    def __init__(self, files: list[Path]) -> None:
        self.places: dict[str, Path] = {}
        self.entries: dict[str, TensorEntry] = {}
        for file in files:
            header = read_header(file)
            self.places |= dict.fromkeys(header, file)
            self.entries |= header
        self._open: dict[tuple[Path, str], Any] = {}
        self._reads: dict[torch.device, DeviceReads] = {}
        self._begins: dict[Path, int] = {}
        """Where the tensors of a file begin."""
        self._lock = threading.Lock()
        self._stack = ExitStack()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def _handle(self, name: str, device: torch.device) -> Any:
        key = self.places[name], str(device)
        if key not in self._open:
            handle: Any = safe_open(key[0], framework="pt", device=key[1])
            self._open[key] = self._stack.enter_context(handle)
        return self._open[key]

    def dtype_of(self, name: str) -> torch.dtype | None:
        """A tensor's dtype, if it is a usual one."""
        return _DTYPES.get(self.entries[name].dtype)

    def read(self, name: str, device: torch.device) -> Tensor:
        """A tensor's values, on a device."""
        entry = self.entries[name]
        dtype = _DTYPES.get(entry.dtype)
        threads = self.by_threads and device.type == "cuda" and hasattr(os, "preadv")
        if not threads or dtype is None or entry.end - entry.start < LEAST:
            return self._handle(name, device).get_tensor(name)
        return self._read_by_threads(name, entry, dtype, device)

    def _read_by_threads(self, name: str, entry: TensorEntry, dtype: torch.dtype, device: torch.device) -> Tensor:
        path = self.places[name]
        with self._lock:  # transformers asks for tensors on threads of its own
            if path not in self._begins:
                with path.open("rb") as file:
                    self._begins[path] = 8 + int.from_bytes(file.read(8), "little")
            if device not in self._reads:
                self._reads[device] = DeviceReads(device)
                self._stack.callback(self._reads[device].close)
            begin, reads = self._begins[path] + entry.start, self._reads[device]
        found = torch.empty(entry.shape, dtype=dtype, device=device)
        try:
            reads.read(path, begin, found.view(-1).view(torch.uint8))
        except OSError as error:
            raise CheckpointError(f"{path}: {name!r} cannot be read: {error.strerror or error}") from error
        return found

    def lazy(self, name: str, device: torch.device | None = None) -> Any:
        """What gives the tensor when it is indexed with `...`: on the CPU, or on a device."""
        if device is None or device.type == "cpu" or not self.by_threads:
            return self._handle(name, torch.device("cpu")).get_slice(name)
        return LazyTensor(self, name, device)


class LazyTensor:
    """A tensor of files that is read onto a device when it is indexed with `...`."""

    def __init__(self, files: TensorFiles, name: str, device: torch.device) -> None:
        self._files, self._name, self._device = files, name, device
        self.shape = torch.Size(files.entries[name].shape)

    def get_shape(self) -> list[int]:
        """As a safetensors slice has it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As a safetensors slice has it."""
        return self._files.entries[self._name].dtype

    def __getitem__(self, place: Any) -> Tensor:
        values = self._files.read(self._name, self._device)
        return values if place is Ellipsis else values[place]


@dataclass(frozen=True, eq=False)
class Stored:
    """A quantised projection in the files."""

    name: str
    """As the files have it, without what follows for its tensors."""
    scheme: Scheme
    entries: Mapping[str, TensorEntry]
    """Its tensors by part."""
    names: Mapping[str, str]
    """Their names in the files, by part."""
    outputs: int
    inputs: int
    target: str
    """Name of its weight in a checkpoint that is not quantised."""
    dense_shape: tuple[int, ...]
    small: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Scales and the like, once they are checked; on the CPU."""
    dequantised: str | None = None
    """Why it cannot be run as it is stored; known once it is checked."""

    def checked(self, files: TensorFiles) -> Stored:
        """Itself with its small tensors, after checking their values.

        Raises:
            CheckpointError: a value is out of its range; names tensor and file.
        """
        cpu = torch.device("cpu")
        parts = self.scheme.parts(self.outputs, self.inputs)
        small = {part: files.read(name, cpu) for part, name in self.names.items() if parts[part].small}
        try:
            reason = self.scheme.check(small, self.outputs, self.inputs)
        except Damaged as damaged:
            raise self.damaged(damaged, files) from None
        return replace(self, small=small, dequantised=reason)

    def read(self, files: TensorFiles, device: torch.device, dtype: torch.dtype) -> QuantisedWeight | Tensor:
        """Its weight on a device. Call it on what `checked` returned.

        Raises:
            CheckpointError: codes are out of their range; names tensor and file.
        """
        try:
            return self.scheme.weight(self.tensors(files, device), self.outputs, self.inputs, dtype)
        except Damaged as damaged:
            raise self.damaged(damaged, files) from None

    def tensors(self, files: TensorFiles, device: torch.device) -> dict[str, Tensor]:
        """Its tensors on a device, by part."""
        return {
            part: self.small[part].to(device) if part in self.small else files.read(name, device)
            for part, name in self.names.items()
        }

    def damaged(self, damaged: Damaged, files: TensorFiles) -> CheckpointError:
        """The error for a tensor of this projection."""
        return _damaged(self.names.get(damaged.part, f"{self.name}.{damaged.part}"), damaged, files, self.names)


class Lazy:
    """A stored weight that is dequantised when it is indexed with `...`, as transformers does with each tensor."""

    def __init__(self, stored: Stored, files: TensorFiles, device: torch.device, dtype: torch.dtype) -> None:
        self._arguments = stored, files, device, dtype
        self.shape = torch.Size(stored.dense_shape)
        self.dtype = dtype

    def get_shape(self) -> list[int]:
        """As a safetensors slice has it."""
        return list(self.shape)

    def __getitem__(self, place: Any) -> Tensor:
        stored, files, device, dtype = self._arguments
        weight = stored.read(files, device, dtype)
        values = weight.dequantise() if isinstance(weight, QuantisedWeight) else weight
        return values if place is Ellipsis else values[place]


def find_stored(
    files: TensorFiles, layout: Format
) -> tuple[dict[str, Stored], dict[str, TensorEntry], tuple[str, ...]]:
    """The quantised projections of files.

    Returns:
        They by name; all tensors as a checkpoint that is not quantised would have them, whose weights are called BF16;
        the scales of activations and caches that are left out.

    Raises:
        CheckpointError: a projection's tensor is missing, or has another shape or dtype; names it and its file.
    """
    owners: dict[str, dict[str, str]] = {}
    for name in files.entries:
        split = layout.split(name)
        if split is not None:
            owners.setdefault(split[0], {})[split[1]] = name
    stored: dict[str, Stored] = {}
    taken: set[str] = set()
    for owner, names in owners.items():
        if set(names) == {"weight"} and files.entries[names["weight"]].dtype not in _CODES:
            continue
        stored[owner] = _stored(owner, names, files, layout)
        taken |= set(names.values())
    left_out = tuple(name for name in files.entries if name not in taken and name.rpartition(".")[2] in _LEFT_OUT)
    plain = {name: entry for name, entry in files.entries.items() if name not in taken and name not in left_out}
    plain |= {each.target: TensorEntry("BF16", each.dense_shape, 0, 0) for each in stored.values()}
    return stored, plain, left_out


def _stored(owner: str, names: dict[str, str], files: TensorFiles, layout: Format) -> Stored:
    scheme = layout.scheme(owner)
    first = next(iter(names.values()))
    if scheme is None:
        raise CheckpointError(
            f"{files.places[first]}: {first!r} is of a quantised weight, and the config says that {owner} is not "
            "quantised (quantization_config); they do not belong together"
        )
    entries = {part: files.entries[name] for part, name in names.items()}
    cpu = torch.device("cpu")
    tiny = {part: files.read(names[part], cpu) for part in TINY if part in names}
    try:
        outputs, inputs = scheme.sizes(entries, tiny)
        parts = scheme.parts(outputs, inputs)
        for part, expected in parts.items():
            entry = entries.get(part)
            if entry is None:
                if not expected.optional:
                    raise Damaged(part, "is missing")
            elif entry.dtype not in expected.dtypes:
                raise Damaged(part, f"is {entry.dtype}, and must be {' or '.join(expected.dtypes)}")
            elif expected.shape is not None and entry.shape != expected.shape:
                raise Damaged(part, f"is {list(entry.shape)}, and must be {list(expected.shape)}")
    except Damaged as damaged:
        raise _damaged(names.get(damaged.part, f"{owner}.{damaged.part}"), damaged, files, names) from None
    others = sorted(names[part] for part in names if part not in parts)
    if others:
        raise UnsupportedModelError(
            f"{files.places[first]} has beside a quantised weight what is not known here: {few(others)}; load a "
            "checkpoint in one of the formats of docs/quantisation.md, or a float32, bfloat16 or float16 one"
        )
    shape = layout.dense_shape(entries, outputs, inputs)
    return Stored(owner, scheme, entries, names, outputs, inputs, layout.target(owner), shape)


def _damaged(name: str, damaged: Damaged, files: TensorFiles, names: Mapping[str, str]) -> CheckpointError:
    file = files.places.get(name) or files.places[next(iter(names.values()))]
    return CheckpointError(f"{file}: {name!r} {damaged}; fetch the file again, or quantise the model again")


def check_files(files: list[Path], why: str) -> None:
    """Weights that are quantised, or are to be, are read from safetensors files alone.

    Raises:
        UnsupportedModelError: there are others.
    """
    others = [file.name for file in files if file.suffix != ".safetensors"]
    if others:
        raise UnsupportedModelError(
            f"the weights are in {few(others)}, and here ({why}) they are read from safetensors files alone; convert "
            "them with transformers' save_pretrained()"
        )
