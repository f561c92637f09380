"""Which formats of weights the kernel multiplies with, and where it finds their codes and scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridgen.kernels.linear.layout import INT4_ZERO
from hybridgen.models.decoder import Linear, Unfit
from hybridgen.models.quantised import QuantisedWeight
from hybridgen.models.weights import DenseWeight

GROUPS = (32, 64, 128)
"""Inputs that share a scale of an int4 weight."""


@dataclass(frozen=True)
class Format:
    """How weights are stored, as far as the kernel's constants go."""

    bits: int
    """16, 8 (e4m3 with a scale for each output) or 4 (codes around 8 with a scale for each group of inputs)."""
    group: int = 128
    scales: torch.dtype = torch.bfloat16
    """Of int4."""
    zeros: bool = False
    """Whether groups of int4 have zero points of their own; else it is 8."""

    @property
    def scale_bytes(self) -> int:
        """Of a group, its zero point included."""
        return self.scales.itemsize * (1 + self.zeros)


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as the kernel reads it: the model's own storage, but for fp8 scales that are not float32, and for scales
    that have zero points beside them."""

    format: Format
    data: Tensor
    """[outputs, bytes of a row in the data's items], as `kernels.linear.layout` has it."""
    scales: Tensor | None
    """fp8: float32 [outputs]. int4: [outputs, inputs / group], or with zero points [outputs, inputs / group, 2]: the
    scale, and 8 less the zero point."""

    def tensors(self) -> list[Tensor]:
        """What must stay where it is."""
        return [self.data] if self.scales is None else [self.data, self.scales]


def stored(linear: Linear) -> Stored:
    """A projection's weight as the kernel reads it.

    Raises:
        Unfit: it is in a format that the kernel does not multiply with.
    """
    weight = linear.weight
    if linear.parts:
        raise Unfit("projections that read the same input are not joined; for several rows joined ones are fused")
    if isinstance(weight, DenseWeight):
        return Stored(Format(16), weight.values, None)
    if not isinstance(weight, QuantisedWeight) or weight.kind not in ("fp8", "int4"):
        raise Unfit(f"a weight is {weight.format}; dense, fp8 and int4 ones are fused")
    if weight.kind == "fp8":
        if weight.scales.shape[1] > 1:
            raise Unfit(f"a weight is {weight.format}; fp8 with a scale for each output is fused")
        return Stored(Format(8), weight.data, _row_scales(weight))
    block = weight.block
    if block.outputs != 1 or block.inputs not in GROUPS:
        raise Unfit(f"a weight is {weight.format}; int4 in groups of 32, 64 or 128 inputs is fused")
    scales = weight.scales
    if weight.zeros is not None:
        if scales.dtype is torch.float32:
            raise Unfit(f"a weight is {weight.format} with zero points and float32 scales; 16-bit scales are fused")
        # One word for both: one copy a row brings them, and one read. Codes and zero points are exact in 16 bits.
        scales = torch.stack((scales, (INT4_ZERO - weight.zeros.to(torch.int16)).to(scales.dtype)), -1)
    return Stored(Format(4, block.inputs, weight.scales.dtype, weight.zeros is not None), weight.data, scales)


def _row_scales(weight: QuantisedWeight) -> Tensor:
    scales, outputs = weight.scales[:, 0], weight.shape[0]
    if len(scales) != outputs:
        scales = scales.repeat_interleave(weight.block.outputs)[:outputs]
    return scales.float().contiguous()


def format_of(weights: Iterable[Stored]) -> Format:
    """The format that weights share.

    Raises:
        Unfit: they have several.
    """
    formats = {weight.format for weight in weights}
    if len(formats) > 1:
        raise Unfit("its layers' weights have several formats")
    return formats.pop()
