"""Quantised weights of a live module, read as they are: the same storage, under a `QuantisedLinear` of the twin.

Known are transformers' `FP8Linear` (fine-grained FP8, or one scale for all), `nn.Linear` layers whose weight is an
`Int8Tensor` or a `Float8Tensor` of torchao, those that compressed-tensors has not decompressed yet, which it does in
their first forward, and bitsandbytes' layers of 8 bits. Their own layers also round activations, or may; here weights
alone are. bitsandbytes' layers of 4 bits cannot run as they are stored, and get a linear layer with their values.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridgen.errors import UnsupportedModelError
from hybridgen.kernels.linear import int4_cpu
from hybridgen.kernels.linear.layout import Block, power_of_two
from hybridgen.loading.formats import bitsandbytes, compressed, torchao
from hybridgen.loading.formats.scheme import Damaged
from hybridgen.models.quantised import QuantisedLinear, QuantisedWeight
from hybridgen.models.twin import Twin

METHODS = ("fp8", "torchao", compressed.METHOD, bitsandbytes.METHOD)
"""`quant_method` of configs of models that may have such layers."""
ACTIVATIONS = "activations are not quantised, as the model's own layers may do: weights alone are"
DEQUANTISED = (
    f"weights of 4 bits are dequantised, which takes memory, because {bitsandbytes.RUNS_ON}; what their owner writes "
    "into them is taken over"
)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_of(module: nn.Module, dtype: torch.dtype) -> QuantisedWeight | None:
    """The quantised weight of a module; None where it is none of those known here.

    Args:
        dtype: what it is multiplied in.
    """
    if hasattr(module, "quantization_scheme"):
        return _compressed(module, dtype)
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind == "transformers.integrations.finegrained_fp8.FP8Linear" and weight.dtype == torch.float8_e4m3fn:
        return _fine_grained(module, weight.detach(), dtype)
    if type(module) is nn.Linear and type(weight).__module__.startswith("torchao."):
        return _torchao(weight, dtype)
    if kind.startswith("bitsandbytes.") and type(module).__name__ == "Linear8bitLt" and weight.dtype == torch.int8:
        return _rows_of_127(module, weight, dtype)
    return None


def _rows_of_127(module: Any, weight: Any, dtype: torch.dtype) -> QuantisedWeight | None:
    """bitsandbytes' 8 bits: the largest of an output is 127. A layer's first forward moves scales to its state."""
    largest = getattr(weight, "SCB", None)
    largest = module.state.SCB if largest is None else largest
    if largest is None:
        return None
    inputs = weight.shape[1]
    return QuantisedWeight("int8", weight.data, (largest / 127)[:, None], None, inputs, Block(1, inputs), dtype)


def _values_of(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The dequantised weight of a layer that cannot run as it is stored; None where it is none of those known here."""
    weight: Any = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    known = type(module).__module__.startswith("bitsandbytes.") and type(module).__name__ == "Linear4bit"
    if not known or state is None:
        return None
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, state)
    return values.to(dtype)


def _compressed(module: Any, dtype: torch.dtype) -> QuantisedWeight | None:
    status = getattr(module, "quantization_status", None)
    if type(module) is not nn.Linear or getattr(status, "value", status) != "compressed":
        return None
    scheme: Any = module.quantization_scheme
    if scheme.weights is None:
        return None
    group = {"weights": scheme.weights.model_dump(mode="json")}
    layout = compressed.scheme_of(type(module).__name__, group, getattr(scheme.format, "value", scheme.format))
    outputs, inputs = module.out_features, module.in_features
    tensors = {
        part: tensor.detach()
        for part in layout.parts(outputs, inputs)
        if (tensor := module._parameters.get(part)) is not None
    }
    try:
        found = layout.weight(tensors, outputs, inputs, dtype)
    except (Damaged, KeyError) as error:
        raise UnsupportedModelError(
            f"a quantised layer of the live module is not as its quantization_scheme says ({error!r}); give the "
            "checkpoint's directory"
        ) from error
    return found if isinstance(found, QuantisedWeight) else None


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
    if scales.dim() != 2 or not torchao.has_blocks((outputs, inputs), (scales.shape[0], scales.shape[1])):
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
        values = _values_of(module, dtype)
        if values is not None:
            found[f"{values.dtype} of {type(module).__name__}"] += 1
            continue
        if hasattr(module, "quantization_scheme"):
            status = getattr(module, "quantization_status", None)
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}, quantization_status {getattr(status, 'value', status)!r}) cannot "
                "be read: of layers of compressed-tensors those are whose weights have not been decompressed, as a "
                "forward does, and are not of nvfp4; give the checkpoint's directory"
            )
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


def read_live(twin: Twin[Any], dtype: torch.dtype) -> list[str]:
    """Put a `QuantisedLinear` over the same storage where a twin has a quantised layer, or a linear layer with its
    values where it cannot run as it is stored; returns what there is to say of it.

    What the owner writes into codes and scales is seen, and where they lie elsewhere they are taken over, by
    `Twin.follow`.
    """
    places: dict[int, nn.Module] = {}
    for name, module in list(twin.model.named_modules(remove_duplicate=False)):
        weight = weight_of(module, dtype)
        values = _values_of(module, dtype) if weight is None else None
        if weight is None and values is None:
            continue
        place = places.get(id(module))
        if place is None:
            if weight is not None:
                place = QuantisedLinear(weight.inputs, weight.shape[0], bias=False)
            else:
                assert values is not None
                place = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
            places[id(module)] = place.eval()
            _fill(module, place, dtype)
            own = {tensor.data_ptr() for tensor in _tensors(module)}
            copied = not isinstance(place, QuantisedLinear) or place.data.data_ptr() not in own
            follow = _Copied(module, place, dtype) if copied else None
            twin.replaced(module, partial(_fill, module, place, dtype), follow)
        twin.model.set_submodule(name, place)
    kinds = {isinstance(place, QuantisedLinear) for place in places.values()}
    return [note for note, there in ((ACTIVATIONS, True in kinds), (DEQUANTISED, False in kinds)) if there]


def _fill(module: nn.Module, place: nn.Module, dtype: torch.dtype) -> None:
    found = weight_of(module, dtype) if isinstance(place, QuantisedLinear) else _values_of(module, dtype)
    if found is None:
        raise UnsupportedModelError(f"a {type(module).__name__} has no quantised weight any more; load a new engine")
    if isinstance(place, QuantisedLinear):
        place.fill(found)  # type: ignore[arg-type]
    else:
        place.weight = nn.Parameter(found, requires_grad=False)  # type: ignore[arg-type]
    place.bias = module.bias  # type: ignore[assignment]


def _tensors(module: nn.Module) -> list[Tensor]:
    """Where a module's weight has its values."""
    found = [tensor for tensor in module._parameters.values() if tensor is not None]
    return [getattr(tensor, "qdata", tensor) for tensor in found]


class _Copied:
    """Takes over what was written into tensors whose codes lie in another order here."""

    def __init__(self, module: nn.Module, place: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._place, self._dtype = module, place, dtype
        self._seen = self._versions()

    def _versions(self) -> list[int]:
        return [0 if tensor.is_inference() else tensor._version for tensor in _tensors(self._module)]

    def __call__(self) -> None:
        now = self._versions()
        if now == self._seen:
            return
        self._seen = now
        if not isinstance(self._place, QuantisedLinear):
            values, place = _values_of(self._module, self._dtype), self._place.weight
            if values is not None and isinstance(place, Tensor) and values.shape == place.shape:
                place.data.copy_(values)
            return
        weight = weight_of(self._module, self._dtype)
        if weight is None or weight.data.shape != self._place.data.shape:
            return  # other tensors, which the twin finds
        for name, tensor in weight.tensors().items():
            getattr(self._place, name).copy_(tensor)
        int4_cpu.forget(self._place.data, self._place.scales, self._place.zeros)
