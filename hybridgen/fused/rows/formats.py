"""Which formats of weights the kernel multiplies with, and where it finds their codes and scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridgen.kernels.linear.layout import INT4_ZERO
from hybridgen.models.decoder import Linear, Unfit
from hybridgen.models.quantised import QuantisedWeight
from hybridgen.models.weights import DenseWeight

GROUPS = (32, 64, 128)
"""Inputs that share a scale, where not all of an output do."""
PROJECTIONS = ("qkv", "out", "gate_up", "down")
"""Of a layer, in the kernel's order."""
_WORDS_OF_HALF = 2048


@dataclass(frozen=True)
class Format:
    """How weights are stored, as far as the kernel's constants go."""

    bits: int
    """16, 8 (e4m3 or integers) or 4 (codes around 8, or e2m1, with a scale for each group of inputs)."""
    group: int = 128
    scales: torch.dtype = torch.bfloat16
    """Of groups; uint8 are exponents, and codes of 4 bits are e2m1 then (MXFP4)."""
    zeros: bool = False
    """Whether groups of int4 have zero points of their own; else it is 8."""
    integers: bool = False
    """Of 8 bits: signed integers in place of e4m3."""
    grouped: bool = False
    """Of 8 bits: a scale for each group of inputs in place of one for each output."""

    @property
    def code(self) -> int:
        """Its number in the kernel (`bits_of` and what follows it in `pairs.cuh`)."""
        code = self.bits + 32 * self.integers + 64 * self.grouped
        if self.has_groups:
            code += {torch.float16: 256, torch.float32: 512, torch.uint8: 1024}.get(self.scales, 0)
            code += 128 * self.zeros + 4096 * (self.group // 32)
        return code

    @property
    def has_groups(self) -> bool:
        """Whether scales lie beside the codes in a stage."""
        return self.bits == 4 or self.grouped

    @property
    def is_mxfp4(self) -> bool:
        """Whether codes are e2m1 and scales exponents."""
        return self.bits == 4 and self.scales is torch.uint8

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
    if isinstance(weight, QuantisedWeight) and weight.kind == "mxfp4":
        if weight.block != (1, 32):
            raise Unfit(f"a weight is {weight.format}; mxfp4 in groups of 32 inputs is fused")
        return Stored(Format(4, 32, torch.uint8), weight.data, weight.scales)
    if not isinstance(weight, QuantisedWeight) or weight.kind not in ("fp8", "int8", "int4"):
        raise Unfit(f"a weight is {weight.format}; dense, fp8, int8, int4 and mxfp4 ones are fused")
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


@dataclass(frozen=True)
class Formats:
    """The formats of a model's layers: one or two of each projection."""

    usual: tuple[Format, ...]
    """By projection: that of most layers."""
    other: tuple[Format, ...]
    """By projection: that of the other layers; the usual one where there are none."""
    others: tuple[int, ...] = ()
    """By layer: the sum of 2 ** i of the projections `PROJECTIONS[i]` in the other format. Empty where none is."""

    @classmethod
    def alike(cls, form: Format) -> Formats:
        """One format everywhere."""
        return cls((form,) * len(PROJECTIONS), (form,) * len(PROJECTIONS))

    def __iter__(self) -> Iterator[tuple[int, Format]]:
        """Projections' numbers, with each format that they have."""
        for index, forms in enumerate(zip(self.usual, self.other, strict=True)):
            for form in dict.fromkeys(forms):
                yield index, form

    @property
    def are_several(self) -> bool:
        """Whether words between layers have to be fp16, so that all formats read them."""
        return len({*self.usual, *self.other}) > 1

    def defines(self) -> dict[str, str]:
        """The kernel's constants."""

        def codes(formats: tuple[Format, ...]) -> str:
            half = _WORDS_OF_HALF if self.are_several else 0
            return ",".join(str(form.code + half * (form.bits == 16)) for form in formats)

        found = {"FORMATS": codes(self.usual)}
        return {**found, "OTHER_FORMATS": codes(self.other)} if self.others else found


def formats_of(layers: Sequence[Sequence[Stored]]) -> Formats:
    """The formats of layers, from each one's projections.

    Raises:
        Unfit: a projection has more than two.
    """
    columns = [[weight.format for weight in column] for column in zip(*layers, strict=True)]
    ranked = [[form for form, _ in Counter(column).most_common()] for column in columns]
    for name, forms in zip(PROJECTIONS, ranked, strict=True):
        if len(forms) > 2:
            raise Unfit(f"its {name} projections have {len(forms)} formats; up to two are fused")
    usual = tuple(forms[0] for forms in ranked)
    others = tuple(sum(2**i for i, form in enumerate(usual) if layer[i].format != form) for layer in layers)
    return Formats(usual, tuple(forms[-1] for forms in ranked), others if any(others) else ())
