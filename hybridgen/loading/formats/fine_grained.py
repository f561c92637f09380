"""FP8 with a scale for each block of 128 x 128 values: DeepSeek-V3 and Qwen3-FP8, and transformers' own `fp8`.

AutoFP8 has the same name for weights with one scale, or one for each output, which it calls `weight_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridgen.errors import UnsupportedModelError, shown
from hybridgen.kernels.linear.layout import Block, power_of_two
from hybridgen.loading.checks import TensorEntry
from hybridgen.loading.formats.scheme import (
    FLOATS,
    WEIGHTS_ALONE,
    Damaged,
    Part,
    Scheme,
    check_codes,
    check_scales,
    dense_2d,
    dot_weight,
    full_block,
    need,
    split_at_dot,
)
from hybridgen.models.quantised import QuantisedWeight

METHOD = "fp8"
_SCALES = ("weight_scale_inv", "weight_scale")
_PARTS = ("weight", *_SCALES)


@dataclass(frozen=True)
class Blocks:
    """e4m3 values with a scale for each block; they are multiplied, despite the name `weight_scale_inv`.

    Where they are called `weight_scale`, there is one for all or one for each output, whatever the config says.
    """

    block: tuple[int, int] | None
    """None: one scale for all."""

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        outputs, inputs = need(entries, "weight", 2).shape
        there = [part for part in _SCALES if part in entries]
        if len(there) != 1:
            raise Damaged(_SCALES[0], "is missing" if not there else f"is there beside {_SCALES[1]}")
        return outputs, inputs

    def _block(self, outputs: int, inputs: int, scales: int | None = None) -> Block:
        """The block of a scale; `scales`: how many a `weight_scale` has."""
        if scales is not None:
            return full_block(outputs, inputs) if scales == 1 else Block(1, inputs)
        return full_block(outputs, inputs) if self.block is None else Block(*self.block)

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        grid = self._block(outputs, inputs).grid(outputs, inputs)
        return {
            "weight": Part(("F8_E4M3",), (outputs, inputs), small=False),
            "weight_scale_inv": Part((*FLOATS, "U8", "F8_E8M0"), None if self.block is None else grid, optional=True),
            "weight_scale": Part(FLOATS, None, optional=True),
        }

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        plain = small.get("weight_scale")
        if plain is not None:
            check_scales("weight_scale", plain)
            if plain.numel() not in (1, outputs):
                raise Damaged("weight_scale", f"holds {plain.numel()} values, neither 1 nor {outputs}")
            return None
        scales = small["weight_scale_inv"]
        if self.block is None and scales.numel() != 1:
            raise Damaged("weight_scale_inv", f"holds {scales.numel()} values, not 1")
        if scales.element_size() == 1:
            if bool((scales.view(torch.uint8) == 255).any()):
                raise Damaged("weight_scale_inv", "holds the exponent 255, which is no number")
        else:
            check_scales("weight_scale_inv", scales)
        return None

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`. Exponents (ue8m0) become float32 numbers, which they are exactly."""
        check_codes("weight", tensors["weight"])
        plain = tensors.get("weight_scale")
        scales = tensors["weight_scale_inv"] if plain is None else plain
        block = self._block(outputs, inputs, None if plain is None else plain.numel())
        if scales.element_size() == 1:
            scales = power_of_two(scales.view(torch.uint8))
        scales = scales.reshape(block.grid(outputs, inputs))
        return QuantisedWeight("fp8", tensors["weight"], scales, None, inputs, block, dtype)


@dataclass(frozen=True)
class FineGrained:
    """A checkpoint of `quant_method` fp8. Which projections have codes is seen in the files."""

    blocks: Blocks
    notes: tuple[str, ...] = ()
    method: str = METHOD
    target = staticmethod(dot_weight)
    dense_shape = staticmethod(dense_2d)

    def split(self, name: str) -> tuple[str, str] | None:
        """See `Format`."""
        return split_at_dot(name, _PARTS)

    def scheme(self, projection: str) -> Scheme | None:
        """The same for all; those that are not converted have no scales."""
        return self.blocks


def read(values: Mapping[str, Any]) -> FineGrained:
    """The format that a `quantization_config` describes.

    Raises:
        UnsupportedModelError: something in it is not known here.
    """
    kind, block = values.get("fmt", "e4m3"), values.get("weight_block_size", [128, 128])
    fits = isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if kind not in ("e4m3", "float8_e4m3fn") or not (block is None or fits):
        raise UnsupportedModelError(
            "its weights are quantised in a way that is not known here (quantization_config, method 'fp8': fmt "
            f"{shown(kind)}, weight_block_size {shown(block)}); load a checkpoint in one of the formats of "
            "docs/quantisation.md, or a float32, bfloat16 or float16 one"
        )
    notes = (WEIGHTS_ALONE,)
    return FineGrained(Blocks(None if block is None else (block[0], block[1])), notes)
