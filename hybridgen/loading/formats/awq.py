"""AWQ, version gemm: 4 bits along the outputs, in an order of their own (https://github.com/casper-hansen/AutoAWQ)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridgen.errors import UnsupportedModelError, shown
from hybridgen.kernels.linear.layout import Block, pack_int4, unpack_int4
from hybridgen.loading.checks import TensorEntry
from hybridgen.loading.formats.scheme import (
    FLOATS,
    Part,
    Scheme,
    check_scales,
    dense_2d,
    dot_weight,
    need,
    split_at_dot,
    whole,
)
from hybridgen.models.quantised import QuantisedWeight

METHOD = "awq"
_PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class Interleaved:
    """Codes and zero points of eight outputs in an int32 word, in the order that `int4` data has along the inputs."""

    group: int | None
    has_zeros: bool

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        inputs, words = need(entries, "qweight", 2).shape
        return words * 8, inputs

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        groups = -(-inputs // (self.group or inputs))
        return {
            "qweight": Part(("I32",), (inputs, outputs // 8), small=False),
            "qzeros": Part(("I32",), (groups, outputs // 8), optional=not self.has_zeros),
            "scales": Part(FLOATS, (groups, outputs)),
        }

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        check_scales("scales", small["scales"])
        return None

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`. Unpacked, transposed and packed again, a part of the inputs at a time."""
        qweight = tensors["qweight"]
        data = torch.empty(outputs, -(-inputs // 8), dtype=torch.int32, device=qweight.device)
        step = max(8, 2**24 // outputs // 8 * 8)
        for start in range(0, inputs, step):
            part = pack_int4(unpack_int4(qweight[start : start + step], outputs).T)
            data[:, start // 8 : start // 8 + part.shape[1]] = part
        zeros = unpack_int4(tensors["qzeros"], outputs).T.to(torch.uint8).contiguous() if self.has_zeros else None
        block = Block(1, self.group or inputs)
        return QuantisedWeight("int4", data, tensors["scales"].T.contiguous(), zeros, inputs, block, dtype)


@dataclass(frozen=True)
class Awq:
    """An AWQ checkpoint. Which projections have codes is seen in the files."""

    interleaved: Interleaved
    notes: tuple[str, ...] = ()
    method: str = METHOD
    target = staticmethod(dot_weight)
    dense_shape = staticmethod(dense_2d)

    def split(self, name: str) -> tuple[str, str] | None:
        """See `Format`."""
        return split_at_dot(name, _PARTS)

    def scheme(self, projection: str) -> Scheme | None:
        """The same for all."""
        return self.interleaved


def read(values: Mapping[str, Any]) -> Awq:
    """The format that a `quantization_config` describes.

    Raises:
        UnsupportedModelError: something in it is not known here.
    """
    bits = values.get("bits", values.get("w_bit", 4))
    group = values.get("group_size", values.get("q_group_size", 128))
    # As transformers reads it: `version` goes before `format`, and llm-awq packs in a way of its own.
    own = "llm-awq" if values.get("backend") == "llm-awq" else "gemm"
    zeros, version = values.get("zero_point", True), str(values.get("version") or values.get("format") or own).lower()
    known = whole(group) and (group > 0 or group == -1) and own == "gemm"
    if bits != 4 or version != "gemm" or not known or not isinstance(zeros, bool):
        raise UnsupportedModelError(
            f"its weights are quantised in a way that is not known here (quantization_config, method 'awq': bits "
            f"{shown(bits)}, group_size {shown(group)}, zero_point {shown(zeros)}, version {shown(version)}, backend "
            f"{shown(values.get('backend'))}); load a "
            "checkpoint in one of the formats of docs/quantisation.md, or a float32, bfloat16 or float16 one"
        )
    return Awq(Interleaved(None if group == -1 else group, zeros))
