"""Quantised weights of a live module, read as they are: the same storage, under a `QuantisedLinear` of the twin.

Known are transformers' `FP8Linear` (fine-grained FP8, or one scale for all) and `nn.Linear` layers whose weight is an
`Int8Tensor` or a `Float8Tensor` of torchao. Their own layers also round activations, or may; here weights alone are.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridgen.errors import UnsupportedModelError
from hybridgen.kernels.linear.layout import Block, power_of_two
from hybridgen.models.quantised import QuantisedLinear, QuantisedWeight
from hybridgen.models.twin import Twin

METHODS = ("fp8", "torchao")
"""`quant_method` of configs of models that may have such layers."""
ACTIVATIONS = "activations are not quantised, as the model's own layers may do: weights alone are"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_of(module: nn.Module, dtype: torch.dtype) -> QuantisedWeight | None:
    """The quantised weight of a module; None where it is none of those known here.

    Args:
        dtype: what it is multiplied in.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind == "transformers.integrations.finegrained_fp8.FP8Linear" and weight.dtype == torch.float8_e4m3fn:
        return _fine_grained(module, weight.detach(), dtype)
    if type(module) is nn.Linear and type(weight).__module__.startswith("torchao."):
        return _torchao(weight, dtype)
    return None


def _fine_grained(module: Any, weight: Tensor, dtype: torch.dtype) -> QuantisedWeight:
    outputs, inputs = weight.shape
    block = Block(outputs, inputs) if module.block_size is None else Block(*module.block_size)
    scales = module.weight_scale_inv.detach()
    if scales.element_size() == 1:  # exponents
        scales = power_of_two(scales.view(torch.uint8))
    return QuantisedWeight("fp8", weight, scales.reshape(block.grid(outputs, inputs)), None, inputs, block, dtype)


def _torchao(weight: Any, dtype: torch.dtype) -> QuantisedWeight | None:
    name = type(weight).__name__
    if name not in ("Int8Tensor", "Float8Tensor") or weight.dim() != 2:
        return None
    codes, scales = weight.qdata.detach(), weight.scale.detach()
    outputs, inputs = codes.shape
    if scales.dim() != 2 or scales.shape[0] not in (1, outputs) or inputs % scales.shape[1]:
        return None
    block = Block(outputs if scales.shape[0] == 1 else 1, inputs // scales.shape[1])
    if name == "Float8Tensor":
        known = codes.dtype == torch.float8_e4m3fn
        return QuantisedWeight("fp8", codes, scales, None, inputs, block, dtype) if known else None
    zeros = getattr(weight, "zero_point", None)
    zeros = zeros.to(torch.int16) if zeros is not None and bool(zeros.any()) else None
    return QuantisedWeight("int8", codes, scales, zeros, inputs, block, dtype)


def formats_of_live(model: nn.Module, dtype: torch.dtype) -> Counter[str]:
    """The formats of a live model's quantised layers, counted.

    Raises:
        UnsupportedModelError: a layer holds codes in a way that is not known here.
    """
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        weight = weight_of(module, dtype)
        if weight is not None:
            found[str(weight.format)] += 1
            continue
        for part, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or isinstance(module, QuantisedLinear):
                continue
            codes = tensor.dtype not in _FLOATS and part in module._parameters
            if codes or type(tensor).__module__.startswith("torchao."):
                raise UnsupportedModelError(
                    f"{name}.{part} ({type(module).__name__}, {type(tensor).__name__} {tensor.dtype}) is quantised in "
                    "a way that is not read from live modules; give the checkpoint's directory"
                )
    return found


def read_live(twin: Twin[Any], dtype: torch.dtype) -> int:
    """Put a `QuantisedLinear` over the same storage where a twin has a quantised layer; returns how many there are.

    What the owner writes into codes and scales is seen, and where they lie elsewhere they are taken over, by
    `Twin.follow`.
    """
    places: dict[int, QuantisedLinear] = {}
    for name, module in list(twin.model.named_modules(remove_duplicate=False)):
        weight = weight_of(module, dtype)
        if weight is None:
            continue
        place = places.get(id(module))
        if place is None:
            place = places[id(module)] = QuantisedLinear(weight.inputs, weight.shape[0], bias=False)
            place.eval()
            _fill(module, place, dtype)
            twin.replaced(module, partial(_fill, module, place, dtype))
        twin.model.set_submodule(name, place)
    return len(places)


def _fill(module: nn.Module, place: QuantisedLinear, dtype: torch.dtype) -> None:
    weight = weight_of(module, dtype)
    if weight is None:
        raise UnsupportedModelError(f"a {type(module).__name__} has no quantised weight any more; load a new engine")
    place.fill(weight)
    place.bias = module.bias  # type: ignore[assignment]
