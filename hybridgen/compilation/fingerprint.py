"""What a layer and a call of it look like to a compiler, without their values."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn

from hybridgen.models.attention import LayerBinding, StepMetadata
from hybridgen.models.experts import ExpertsBinding
from hybridgen.models.few_rows import RowsBinding
from hybridgen.models.latent import LatentBinding
from hybridgen.models.mixers import MixerBinding
from hybridgen.models.mixtures import MixtureBinding
from hybridgen.models.routers import RouterBinding

_TORCH_INTERNALS = frozenset({"_parameters", "_buffers", "_modules", "_compiled_call_impl"})


def structure_of(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int) -> str:
    """A digest that is equal for layers and calls that one compiled function can serve, as far as classes, functions
    and tensors tell; numbers and flags of modules are left to torch's guards.

    Args:
        tokens: how many the call has; the dimension of an input that has them has any length.
    """
    lines: list[str] = []
    _describe_module("layer", layer, tokens, lines)
    _describe("args", args, tokens, lines)
    _describe("kwargs", dict(kwargs), tokens, lines)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def token_dimension(tensor: torch.Tensor) -> int | None:
    """Where a layer's input has the step's tokens; None where it has none.

    Dim 1 of [1, T, ...], dim 0 of [T], and dim 2 of [1, 1, T, ...], a factor for the queries of all heads (Beam).
    """
    if tensor.dim() > 3 and tensor.shape[0] == tensor.shape[1] == 1:
        return 2
    if tensor.dim() > 1:
        return 1 if tensor.shape[0] == 1 else None
    return 0 if tensor.dim() == 1 else None


def _describe_module(path: str, module: nn.Module, tokens: int, lines: list[str]) -> None:
    kind = type(module)
    forwards = _code(kind.forward), _code(getattr(kind, "_hybridgen_forward", None))
    lines.append(f"{path}: {kind.__module__}.{kind.__qualname__} {forwards} {'training' * module.training}")
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        lines.append(f"{path}.{name}: {'None' if tensor is None else _tensor(tensor, ())}")
    for name, value in sorted(vars(module).items()):
        if name in _TORCH_INTERNALS:
            continue
        if isinstance(value, torch.Tensor):
            lines.append(f"{path}.{name}: {_tensor(value, ())}")
        elif isinstance(value, LayerBinding):
            _describe_binding(f"{path}.{name}", value, tokens, lines)
        elif isinstance(value, LatentBinding):
            lines.append(f"{path}.{name}.latents: {_tensor(value.latents, (0,))}")
            _describe(f"{path}.{name}.step", value.step, tokens, lines)
        elif isinstance(value, MixerBinding):
            for state in ("convolution", "recurrent"):
                _describe(f"{path}.{name}.{state}", getattr(value, state), 1, lines)
            _describe(f"{path}.{name}.step", value.step, tokens, lines)
        elif isinstance(value, ExpertsBinding):
            lines.append(f"{path}.{name}.form: {value.form}")
            _describe(f"{path}.{name}.step", value.step, tokens, lines)
        elif isinstance(value, RowsBinding):
            lines.append(f"{path}.{name}: a few rows by an op")
            _describe(f"{path}.{name}.step", value.step, tokens, lines)
        elif isinstance(value, MixtureBinding):
            lines.append(f"{path}.{name}: {value}")
            _describe(f"{path}.{name}.step", value.step, tokens, lines)
        elif isinstance(value, RouterBinding):
            lines.append(f"{path}.{name}.form: {value.form} {value.chosen}")
            _describe(f"{path}.{name}.step", value.step, tokens, lines)
        elif isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type)):
            lines.append(f"{path}.{name}: {value.__module__}.{value.__qualname__} {_code(value)}")
    for name, child in module._modules.items():
        if child is not None:
            _describe_module(f"{path}.{name}", child, tokens, lines)


def _code(function: Any) -> str:
    """A hash of a function's code: classes are patched at run time, under the same names."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    if code is None:
        return "-"
    # A set's order is another one in each process.
    constants = [
        sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
        for constant in code.co_consts
        if not isinstance(constant, types.CodeType)
    ]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()[:16]


def _describe_binding(path: str, binding: LayerBinding, tokens: int, lines: list[str]) -> None:
    # How many pages there are depends on free memory; it is marked as dynamic (`CompiledLayers`).
    lines.append(f"{path}.keys: {_tensor(binding.keys, (0,))}")
    lines.append(f"{path}.values: {_tensor(binding.values, (0,))}")
    lines.append(f"{path}.factors: {binding.factors is not None}")
    lines.append(f"{path}.sees: {binding.sees}")
    lines.append(f"{path}.schedule: {_tensor(binding.schedule, ())}")
    _describe(f"{path}.step", binding.step, tokens, lines)


def _describe(path: str, value: Any, tokens: int, lines: list[str]) -> None:
    """Arguments of a call: tensors, constants, and containers of them."""
    if isinstance(value, torch.Tensor):
        dim = token_dimension(value)
        dynamic = (dim,) if tokens > 1 and dim is not None and value.shape[dim] == tokens else ()
        lines.append(f"{path}: {_tensor(value, dynamic)}")
    elif isinstance(value, StepMetadata):
        lines.append(f"{path}: {value.phase}")
        # Not among the sizes that are compared with the number of tokens: they have the same length in every step.
        for name in ("block_table", "query_starts"):
            lines.append(f"{path}.{name}: {_tensor(getattr(value, name), ())}")
        for name in ("slots", "positions", "rope_lengths", "state_places"):
            _describe(f"{path}.{name}", getattr(value, name), tokens, lines)
    elif isinstance(value, nn.Module):
        _describe_module(path, value, tokens, lines)
    elif isinstance(value, Mapping):
        for name in value:
            _describe(f"{path}[{name!r}]", value[name], tokens, lines)
    elif isinstance(value, (list, tuple)):
        lines.append(f"{path}: {type(value).__qualname__} of {len(value)}")
        for index, inner in enumerate(value):
            _describe(f"{path}[{index}]", inner, tokens, lines)
    elif value is None or isinstance(value, (bool, int, float, str, Enum)):
        lines.append(f"{path}: {value!r}")
    else:
        lines.append(f"{path}: {type(value).__module__}.{type(value).__qualname__}")


def _tensor(tensor: torch.Tensor, dynamic: tuple[int, ...]) -> str:
    """A tensor without its values; `dynamic` dimensions have any size, and strides outside of them any length."""
    shape = ["?" if index in dynamic else size for index, size in enumerate(tensor.shape)]
    first = min(dynamic, default=-1)
    strides = ["?" if index < first else stride for index, stride in enumerate(tensor.stride())]
    flags = [name for name in ("requires_grad",) if getattr(tensor, name)] + ["inference"] * tensor.is_inference()
    return f"{type(tensor).__qualname__} {tensor.dtype} {tensor.device} {shape} {strides} {' '.join(flags)}"
