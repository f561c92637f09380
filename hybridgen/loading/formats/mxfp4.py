"""MXFP4 experts, as gpt-oss has them: e2m1 codes with an exponent for 32 of them (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridgen.kernels.linear.experts_form import Projection
from hybridgen.kernels.linear.layout import Block
from hybridgen.loading.checks import TensorEntry
from hybridgen.loading.formats.scheme import Damaged, Part, Scheme, need
from hybridgen.models.packed_experts import pad_rows
from hybridgen.models.quantised import QuantisedWeight

METHOD = "mxfp4"


@dataclass(frozen=True)
class Experts:
    """All experts' projections of a layer in one tensor. Their outputs are counted as one list here."""

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        experts, outputs, blocks, each = need(entries, "blocks", 4).shape
        return experts * outputs, blocks * each * 2

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        return {"blocks": Part(("U8",), None, small=False), "scales": Part(("U8", "F8_E8M0"), None)}

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        scales = small["scales"]
        if scales.dim() != 3 or scales.shape[2] * 32 != inputs or scales.numel() * 32 != outputs * inputs:
            raise Damaged("scales", f"is {list(scales.shape)}, not one for 32 of {outputs} x {inputs} values")
        if bool((scales.view(torch.uint8) == 255).any()):
            raise Damaged("scales", "holds the exponent 255, which is no number")
        return None

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`: values [experts, inputs, outputs of one], as the parameter has them, for modules whose code
        multiplies these itself."""
        blocks, scales = tensors["blocks"], tensors["scales"].view(torch.uint8)
        experts = blocks.shape[0]
        flat = blocks.reshape(outputs, inputs // 2), scales.reshape(outputs, inputs // 32)
        values = QuantisedWeight("mxfp4", *flat, None, inputs, Block(1, 32), dtype).dequantise()
        return values.view(experts, outputs // experts, inputs).transpose(1, 2).contiguous()

    def packed(self, tensors: Mapping[str, Tensor]) -> Projection:
        """The weights as they are stored, in the layout of `kernels.linear.experts`."""
        blocks, scales = tensors["blocks"], tensors["scales"].view(torch.uint8)
        return Projection(blocks.flatten(2), pad_rows(scales))


@dataclass(frozen=True)
class Mxfp4:
    """A gpt-oss checkpoint."""

    notes: tuple[str, ...] = ()
    method: str = METHOD

    def split(self, name: str) -> tuple[str, str] | None:
        """See `Format`. `experts.down_proj_blocks` is the part `blocks` of `experts.down_proj`."""
        for part in ("blocks", "scales"):
            if name.endswith(f"_{part}"):
                return name.removesuffix(f"_{part}"), part
        return None

    def scheme(self, projection: str) -> Scheme | None:
        """The same for all."""
        return Experts()

    def target(self, projection: str) -> str:
        """The parameter has the projection's name."""
        return projection

    def dense_shape(self, entries: Mapping[str, TensorEntry], outputs: int, inputs: int) -> tuple[int, ...]:
        """[experts, inputs, outputs of one]."""
        experts = entries["blocks"].shape[0]
        return experts, inputs, outputs // experts


def read(values: Mapping[str, Any]) -> Mxfp4:
    """The format that a `quantization_config` describes."""
    return Mxfp4()
