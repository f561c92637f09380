"""GPTQ: 4 or 8 bits, transposed, as AutoGPTQ and GPTQModel write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybridgen.errors import UnsupportedModelError, shown
from hybridgen.kernels.linear.layout import IN_ORDER, Block, interleave, unpack_int4
from hybridgen.loading.checks import TensorEntry
from hybridgen.loading.formats.scheme import (
    FLOATS,
    Damaged,
    Part,
    Scheme,
    check_scales,
    compiled,
    dense_2d,
    dot_weight,
    need,
    split_at_dot,
    whole,
)
from hybridgen.models.quantised import QuantisedWeight

METHOD = "gptq"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_REORDERED = "its inputs were quantised in another order (desc_act)"


@dataclass(frozen=True)
class Transposed:
    """Integers in int32 words along the inputs, which are the rows here; zero points along the outputs."""

    bits: int
    group: int | None
    symmetric: bool
    reordered: bool
    """Whether groups may hold inputs that are not neighbours (`desc_act`)."""
    adds_one: bool
    """Whether stored zero points are one too small (format v1), as the config says."""

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        rows, outputs = need(entries, "qweight", 2).shape
        return outputs, rows * (32 // self.bits)

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        each, groups = 32 // self.bits, -(-inputs // (self.group or inputs))
        return {
            "qweight": Part(("I32",), (inputs // each, outputs), small=False),
            "qzeros": Part(("I32",), (groups, -(-outputs // each))),
            "scales": Part(FLOATS, (groups, outputs)),
            "g_idx": Part(("I32", "I64"), (inputs,), optional=not self.reordered),
        }

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        check_scales("scales", small["scales"])
        self._zeros(small["qzeros"], outputs)
        order = small.get("g_idx")
        if order is None or torch.equal(order.long(), self._usual(order)):
            return None
        groups = small["scales"].shape[0]
        if bool(((order < 0) | (order >= groups)).any()):
            raise Damaged("g_idx", f"names groups outside of the {groups} that there are")
        if not self.reordered:
            raise Damaged("g_idx", "puts inputs into other groups, and the config says desc_act=false")
        return _REORDERED

    def _usual(self, order: Tensor) -> Tensor:
        inputs = order.shape[0]
        return torch.arange(inputs, device=order.device) // (self.group or inputs)

    def _zeros(self, packed: Tensor, outputs: int) -> Tensor | None:
        """Zero points [groups, outputs] as they are subtracted; None where all are the middle.

        Symmetric weights show by their zeros which version wrote them: GPTQModel has written those of v2 under the
        name of v1. A zero of 15 in v1 could be 16 or 0; what wrote and what read it disagreed.
        """
        most = (1 << self.bits) - 1
        middle = 1 << (self.bits - 1)
        stored = _codes(packed, self.bits, outputs)
        if self.symmetric:
            if bool((stored == middle - 1).all()) or bool((stored == middle).all()):
                return None
            raise Damaged("qzeros", f"holds other zero points than {middle - 1} or {middle}, and the config says sym")
        if not self.adds_one:
            return stored
        if bool((stored == most).any()):
            raise Damaged("qzeros", f"holds zero points out of range: {most}, which format v1 stores for none")
        return stored + 1

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`. Transposed, the words are those of compressed-tensors."""
        words = tensors["qweight"].T.contiguous()
        zeros = self._zeros(tensors["qzeros"], outputs)
        scales = tensors["scales"].T.contiguous()
        block = Block(1, self.group or inputs)
        order = tensors.get("g_idx")
        if self.bits == 4:
            kind, data = "int4", interleave(words)
            zeros = None if zeros is None else zeros.T.to(torch.uint8).contiguous()
        else:
            kind, data = "int8", (words.view(torch.uint8) ^ 128).view(torch.int8)
            zeros = None if zeros is None else (zeros.T - 128).to(torch.int16).contiguous()
        if order is not None and not torch.equal(order.long(), self._usual(order)):
            scales = scales[:, order.long()].contiguous()
            zeros = None if zeros is None else zeros[:, order.long()].contiguous()
            return QuantisedWeight(kind, data, scales, zeros, inputs, Block(1, 1), dtype).dequantise()
        return QuantisedWeight(kind, data, scales, zeros, inputs, block, dtype)


def _codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Words [rows, words] as codes, int32 [rows, count]."""
    if bits == 4:
        return unpack_int4(packed, count, IN_ORDER)
    return packed.contiguous().view(torch.uint8)[:, :count].int()


@dataclass(frozen=True)
class Gptq:
    """A GPTQ checkpoint. Which projections have codes is seen in the files."""

    usual: Transposed
    overrides: tuple[tuple[str, Transposed | None], ...] = ()
    """Patterns of projections that differ; None: not quantised."""
    notes: tuple[str, ...] = ()
    method: str = METHOD
    target = staticmethod(dot_weight)
    dense_shape = staticmethod(dense_2d)

    def split(self, name: str) -> tuple[str, str] | None:
        """See `Format`."""
        return split_at_dot(name, _PARTS)

    def scheme(self, projection: str) -> Scheme | None:
        """The first pattern that matches from the name's beginning, else the usual one."""
        for pattern, scheme in self.overrides:
            if compiled(pattern, "quantization_config.dynamic").match(projection):
                return scheme
        return self.usual


def read(values: Mapping[str, Any]) -> Gptq:
    """The format that a `quantization_config` describes.

    Raises:
        UnsupportedModelError: something in it is not known here.
    """
    usual = _transposed(values, None)
    overrides = []
    dynamic = values.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise _unknown(f"dynamic {shown(dynamic)}")
    for key, changes in dynamic.items():
        if not isinstance(changes, Mapping):
            raise _unknown(f"dynamic {shown({key: changes})}")
        pattern = key.removeprefix("+:").removeprefix("-:")
        compiled(pattern, "quantization_config.dynamic")
        overrides.append((pattern, None if key.startswith("-:") else _transposed({**values, **changes}, usual)))
    return Gptq(usual, tuple(overrides))


def _transposed(values: Mapping[str, Any], usual: Transposed | None) -> Transposed:
    bits, group = values.get("bits"), values.get("group_size")
    symmetric, order = values.get("sym", True), values.get("desc_act", False)
    version = str(values.get("checkpoint_format") or values.get("format") or "gptq").lower()
    if (
        bits not in (4, 8)
        or not whole(bits)
        or not whole(group)
        or not (group > 0 or group == -1)
        or not isinstance(symmetric, bool)
        or not isinstance(order, bool)
        or version not in ("gptq", "gptq_v2")
    ):
        raise _unknown(
            f"bits {shown(bits)}, group_size {shown(group)}, sym {shown(symmetric)}, desc_act {shown(order)}, "
            f"checkpoint_format {shown(version)}"
        )
    found = Transposed(bits, None if group == -1 else group, symmetric, order, version == "gptq")
    return found if usual is None else replace(found, adds_one=usual.adds_one)


def _unknown(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"its weights are quantised in a way that is not known here (quantization_config, method {METHOD!r}: {what}); "
        "load a checkpoint in one of the formats of docs/quantisation.md, or a float32, bfloat16 or float16 one"
    )
