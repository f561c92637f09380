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
"""Inputs that share a scale, where not all of an output do."""


@dataclass(frozen=True)
class Format:
    """How weights are stored, as far as the kernel's constants go."""

    bits: int
    """16, 8 (e4m3 or integers) or 4 (codes around 8 with a scale for each group of inputs)."""
    group: int = 128
    scales: torch.dtype = torch.bfloat16
    """Of groups."""
    zeros: bool = False
    """Whether groups of int4 have zero points of their own; else it is 8."""
    integers: bool = False
    """Of 8 bits: signed integers in place of e4m3."""
    grouped: bool = False
    """Of 8 bits: a scale for each group of inputs in place of one for each output."""

    @property
    def code(self) -> int:
        """Its number in the kernel (`bits_of` and what follows it in `pairs.cuh`)."""
        return self.bits + 32 * self.integers + 64 * self.grouped

    @property
    def has_groups(self) -> bool:
        """Whether scales lie beside the codes in a stage."""
        return self.bits == 4 or self.grouped

    @property
    def scale_bytes(self) -> int:
        """Of a group, its zero point included."""
        return self.scales.itemsize * (1 + self.zeros)


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as the kernel reads it: the model's own storage, but for scales: those of outputs are float32, those of
    groups lie beside their zero points, and those of blocks of outputs are one for each output."""

    format: Format
    data: Tensor
    """[outputs, bytes of a row in the data's items], as `kernels.linear.layout` has it."""
    scales: Tensor | None
    """Of outputs: float32 [outputs]. Of groups: [outputs, inputs / group], or [outputs, inputs / group, 2] with zero
    points: the scale, and 8 less the zero point."""

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
    if not isinstance(weight, QuantisedWeight) or weight.kind not in ("fp8", "int8", "int4"):
        raise Unfit(f"a weight is {weight.format}; dense, fp8, int8 and int4 ones are fused")
    if weight.kind != "int4":
        return _stored_bytes(weight)
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


def _stored_bytes(weight: QuantisedWeight) -> Stored:
    """A weight of 8 bits."""
    block, (outputs, inputs), integers = weight.block, weight.shape, weight.kind == "int8"
    if weight.zeros is not None:
        raise Unfit(f"a weight is {weight.format} with zero points; 8 bits without are fused")
    scales = weight.scales if block.outputs == 1 else weight.scales.repeat_interleave(block.outputs, 0)
    if weight.scales.shape[0] == 1:
        scales = weight.scales.expand(outputs, -1)
    scales = scales[:outputs]
    if scales.shape[1] == 1:
        return Stored(Format(8, integers=integers), weight.data, scales[:, 0].float().contiguous())
    if block.inputs not in GROUPS or inputs % block.inputs:
        raise Unfit(f"a weight is {weight.format}; 8 bits in groups of 32, 64 or 128 inputs are fused")
    form = Format(8, block.inputs, scales.dtype, integers=integers, grouped=True)
    return Stored(form, weight.data, scales.contiguous())


def format_of(weights: Iterable[Stored]) -> Format:
    """The format that weights share.

    Raises:
        Unfit: they have several.
    """
    formats = {weight.format for weight in weights}
    if len(formats) > 1:
        raise Unfit("its layers' weights have several formats")
    return formats.pop()
