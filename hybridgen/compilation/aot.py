"""Compiled layer functions that outlive the process: traced and compiled once, loaded without tracing.

`torch.compile` keeps what Inductor made, but traces again in every process. `aot_compile` (torch 2.11 and later) gives
an artifact that holds the traced bytecode, its guards and the compiled code. Weights are not in it: the layer is an
argument, and its parameters are read from it at each call.

A guard on an object's identity means nothing in another process, and torch cannot write it down; guards on tensors do
not survive with inference tensors. In their place a *structure* is compared, once per layer: classes, functions, and
the dtype, shape and strides of every tensor that the layer reaches. All other guards (numbers and flags of modules,
sizes, aliasing) are checked at each call, by torch; it does not look for hooks, so layers with hooks are not compiled.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.guards import CheckFunctionManager

from hybridgen.compilation.fingerprint import structure_of
from hybridgen.errors import described

logger = logging.getLogger(__name__)

INDEX = "units.json"
_NOT_KEPT = frozenset(CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES) | {"TENSOR_MATCH"}


@dataclass(eq=False)
class Unit:
    """One compiled function for layers of one structure."""

    name: str
    """`prefill_layer`, `decode_layer` or `decode_one_layer`."""
    structure: str
    """Digest of what the layer and the call look like."""
    function: Any
    """What `aot_compile` or `load_compiled_function` returned."""

    def takes(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether torch's guards hold for a call."""
        return bool(self.function.guard_check(layer, *args, **kwargs))


@dataclass(eq=False)
class LayerUnits:
    """The compiled units of one engine, in a directory."""

    directory: Path
    units: list[Unit] = field(default_factory=list)
    loaded: int = 0
    """Units that came from the directory."""
    _structures: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = field(default_factory=weakref.WeakKeyDictionary)
    """By layer and name: a layer's first call says what all of them look like."""

    def load(self) -> str | None:
        """Load what the directory holds; why something in it is not used, or None.

        Artifacts are code: the directory is a working copy that was checked file by file (`store.entry`).
        """
        path = self.directory / INDEX
        if not path.exists():
            return None
        try:
            rows = json.loads(path.read_text())["units"]
            changed = changed_source(rows)
            if changed is not None:
                return f"{changed} was traced and has changed since"
            for row in rows:
                data = (self.directory / row["file"]).read_bytes()
                with _own_settings():
                    function = torch.compiler.load_compiled_function(io.BytesIO(data))
                self.units.append(Unit(row["name"], row["structure"], function))
        except Exception as error:  # unpickling runs torch's code, which may raise anything
            logger.debug("compiled units are not used", exc_info=True)
            self.units.clear()
            return f"compiled units cannot be loaded ({described(error)})"
        self.loaded = len(self.units)
        return None

    def forget(self) -> None:
        """Use none of them any more."""
        self.units.clear()
        self.loaded = 0

    def find(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int) -> Any:
        """The compiled function for a call, or None."""
        structure = self._structure(name, layer, args, kwargs, tokens)
        for unit in self.units:
            if unit.name == name and unit.structure == structure and unit.takes(layer, args, kwargs):
                return unit.function.fn
        return None

    def _structure(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int
    ) -> str:
        by_name = self._structures.get(layer)
        if by_name is None:
            by_name = self._structures[layer] = {}
        structure = by_name.get(name)
        if structure is None:
            structure = by_name[name] = structure_of(layer, args, kwargs, tokens)
        return structure

    def make(
        self,
        name: str,
        function: Callable[..., Any],
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tokens: int,
    ) -> Any:
        """Compile a unit for a call.

        Args:
            function: the compile unit, with a code object of its own.

        Raises:
            Exception: whatever tracing and compiling raise.
        """
        structure = self._structure(name, layer, args, kwargs, tokens)
        with _own_settings():
            # Not dynamic=True: only what is marked so is.
            compiled: Any = torch.compile(
                function,
                fullgraph=True,
                dynamic=False,
                backend="inductor",
                options={"guard_filter_fn": _kept_guards},
            )
            unit = Unit(name, structure, compiled.aot_compile(((layer, *args), dict(kwargs))))
        self.units.append(unit)
        return unit.function.fn

    def save(self) -> str | None:
        """Write the units to the directory; why that was not possible, or None."""
        rows = []
        try:
            for number, unit in enumerate(self.units):
                file = f"{unit.name}-{number}.bin"
                unit.function.save_compiled_function(str(self.directory / file))
                row = {"file": file, "name": unit.name, "structure": unit.structure}
                rows.append(row | {"sources": _sources(unit.function)})
            (self.directory / INDEX).write_text(json.dumps({"units": rows}, indent=1))
        except Exception as error:  # pickling calls into whatever was traced
            logger.debug("compiled units are not kept", exc_info=True)
            for path in self.directory.glob("*"):  # none where the directory is gone
                path.unlink(missing_ok=True)
            return f"compiled units cannot be kept ({described(error)})"
        return None


def _kept_guards(entries: Sequence[Any]) -> list[bool]:
    """Which guards an artifact keeps: those that another process can check."""
    return [
        not (entry.is_global or entry.guard_type in _NOT_KEPT or any(t in _NOT_KEPT for t in entry.derived_guard_types))
        for entry in entries
    ]


def _own_settings() -> AbstractContextManager[Any]:
    """Torch 2.11 has `aot_compile` behind a switch that is off."""
    if hasattr(torch._dynamo.config, "enable_aot_compile"):
        return torch._dynamo.config.patch(enable_aot_compile=True)
    return nullcontext()


def _sources(function: Any) -> list[dict[str, Any]]:
    """What was traced: lines of modules, and their hash. Torch does not check it when it loads an artifact."""
    rows = set()
    for source in function.source_info().inlined_sources:
        digest = _lines_hash(source.module, source.firstlineno, source.lastlineno)
        if digest is not None:
            rows.add((source.module, source.firstlineno, source.lastlineno, digest))
    return [dict(zip(("module", "first", "last", "sha256"), row, strict=True)) for row in sorted(rows)]


def changed_source(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The first traced function whose source is another now; None if there is none."""
    for unit in rows:
        for source in unit["sources"]:
            if _lines_hash(source["module"], source["first"], source["last"]) != source["sha256"]:
                return f"{source['module']}, line {source['first']},"
    return None


def _lines_hash(module: str, first: int, last: int) -> str | None:
    """SHA-256 of lines of a module's file; None where it has none."""
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None:
        return None
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError:
        return None
    return hashlib.sha256(b"".join(lines[first - 1 : last])).hexdigest()
