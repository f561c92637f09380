"""Quantise a weight by rounding to the nearest code.

The simplest way, which looks at no activations. Relative errors of a product with random weights that have outlier
columns, by `tests/models/test_rounding.py`: about 0.03 for `fp8`, 0.014 for `int8`, 0.17 for `int4`. GPTQ and AWQ
choose better codes for `int4`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridgen.kernels.linear.layout import Block, pack_int4
from hybridgen.models.quantised import QuantisedWeight

KINDS = ("fp8", "int8", "int4")
GROUP = 128
"""Inputs that share a scale in `int8` and `int4`. `fp8` has one for each output: its error is its mantissa's, which
finer scales do not make smaller."""
_LARGEST_E4M3 = 448.0
_PART = 2**22
"""Values that are float32 at once: what is made of them on the way has several times their size, and is to be little
beside the weight."""


def quantise(
    values: Tensor, kind: str, dtype: torch.dtype, group: int = GROUP, symmetric: bool = False
) -> QuantisedWeight:
    """A weight [outputs, inputs] in `fp8`, `int8` or `int4`, on its device.

    Args:
        values: floating-point numbers; not changed.
        dtype: what the weight will be multiplied in, and of the scales of `int8` and `int4`; codes are made for the
            rounded scales.
        group: inputs that share a scale, of `int8` and `int4`.
        symmetric: `int4` without zero points.

    Raises:
        ValueError: a value is infinite or no number.
    """
    inputs = values.shape[1]
    rows = max(1, _PART // inputs)
    parts = [_part(part.float(), kind, dtype, group, symmetric) for part in values.split(rows)]
    if len(parts) == 1:
        return parts[0]
    zeros = None if parts[0].zeros is None else torch.cat([part.zeros for part in parts if part.zeros is not None])
    data = torch.cat([part.data.view(torch.uint8) if kind == "fp8" else part.data for part in parts])
    if kind == "fp8":
        data = data.view(torch.float8_e4m3fn)
    scales = torch.cat([part.scales for part in parts])
    return QuantisedWeight(kind, data, scales, zeros, inputs, parts[0].block, dtype)


def relative_error(weight: QuantisedWeight, values: Tensor) -> float:
    """The norm of what rounding changed over the norm of the values [outputs, inputs] that the weight was made of."""
    rows = max(1, _PART // values.shape[1])
    changed = total = 0.0
    for start in range(0, values.shape[0], rows):
        stop = min(start + rows, values.shape[0])
        part = values[start:stop].float()
        changed += float((weight.rows(start, stop).dequantise(torch.float32) - part).square().sum())
        total += float(part.square().sum())
    return math.sqrt(changed / total) if total else 0.0


def _part(values: Tensor, kind: str, dtype: torch.dtype, group: int, symmetric: bool) -> QuantisedWeight:
    if not bool(torch.isfinite(values).all()):
        raise ValueError("it holds values that are infinite or no numbers")
    inputs = values.shape[1]
    if kind == "fp8":
        scales = _scale(values.abs().amax(1, keepdim=True), _LARGEST_E4M3, torch.float32)
        data = (values / scales).clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)
        return QuantisedWeight("fp8", data, scales, None, inputs, Block(1, inputs), dtype)
    groups = -(-inputs // group)
    padded = values.new_zeros(values.shape[0], groups * group)
    padded[:, :inputs] = values
    grouped = padded.view(values.shape[0], groups, group)
    if kind == "int8" or symmetric:
        largest = 127 if kind == "int8" else 7
        scales = _scale(grouped.abs().amax(2), largest, dtype)
        codes = (grouped / scales.float()[..., None]).round().clamp(-largest - 1, largest)
        if kind == "int8":
            data = codes.flatten(1)[:, :inputs].to(torch.int8).contiguous()
            return QuantisedWeight("int8", data, scales, None, inputs, Block(1, group), dtype)
        data = pack_int4((codes + 8).flatten(1)[:, :inputs].int())
        return QuantisedWeight("int4", data, scales, None, inputs, Block(1, group), dtype)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = _scale(high - low, 15, dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    data = pack_int4(codes.flatten(1)[:, :inputs].int())
    return QuantisedWeight("int4", data, scales, zeros.to(torch.uint8), inputs, Block(1, group), dtype)


def _scale(span: Tensor, steps: float, dtype: torch.dtype) -> Tensor:
    """What a step is worth; 1 where all values are zero, or too small for the dtype."""
    scales = (span / steps).to(dtype)
    return torch.where(scales > 0, scales, torch.ones_like(scales))
