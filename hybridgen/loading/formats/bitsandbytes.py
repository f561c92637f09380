"""bitsandbytes: LLM.int8 and the 4-bit types nf4 and fp4, as transformers saves them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridgen.errors import UnsupportedModelError
from hybridgen.kernels.linear.layout import Block
from hybridgen.loading.checks import TensorEntry
from hybridgen.loading.formats.scheme import (
    WEIGHTS_ALONE,
    Damaged,
    Part,
    Scheme,
    check_scales,
    dense_2d,
    dot_weight,
    need,
)
from hybridgen.models.quantised import QuantisedWeight

METHOD = "bitsandbytes"
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_PARTS = ("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map", *_NESTED, *_STATES)
_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""How wide the numbers are that hold codes of 4 bits: `bnb_4bit_quant_storage`, for tools that shard floats alone."""
RUNS_ON = "bitsandbytes' blocks of 4-bit codes run on from row to row, and their values are of a table"


@dataclass(frozen=True)
class Rows:
    """`load_in_8bit`: the largest of an output is 127."""

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        outputs, inputs = need(entries, "weight", 2).shape
        return outputs, inputs

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        return {
            "weight": Part(("I8",), (outputs, inputs), small=False),
            "SCB": Part(("F32",), (outputs,)),
            "weight_format": Part(("U8",), None, optional=True),
        }

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        check_scales("SCB", small["SCB"])
        if "weight_format" in small and bool(small["weight_format"].any()):
            raise Damaged("weight_format", "is not 0: codes that do not lie row by row are not known here")
        return None

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`."""
        scales = (tensors["SCB"] / 127)[:, None]
        return QuantisedWeight("int8", tensors["weight"], scales, None, inputs, Block(1, inputs), dtype)


@dataclass(frozen=True)
class Table:
    """`load_in_4bit`: codes are places in a table of 16 values, and a block of them has its largest as a scale.

    With double quantisation the scales are places in a table of 256, with scales of their own.
    """

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        outputs, inputs = _state(small)["shape"]
        weight = need(entries, "weight", 2)
        each, count = _BYTES.get(weight.dtype, 1), -(-outputs * inputs // 2)
        if weight.shape != (count // each, 1) or count % each:
            raise Damaged("weight", f"is {list(weight.shape)}, and must be {[count // each, 1]}")
        return outputs, inputs

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        return {
            "weight": Part(tuple(_BYTES), None, small=False),
            "weight.absmax": Part(("F32", "U8"), None),
            "weight.quant_map": Part(("F32",), (16,)),
            **dict.fromkeys(_STATES, Part(("U8",), None, optional=True)),
            "weight.nested_absmax": Part(("F32",), None, optional=True),
            "weight.nested_quant_map": Part(("F32",), (256,), optional=True),
        }

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        state = _state(small)
        blocks = -(-outputs * inputs // state["blocksize"])
        absmax = small["weight.absmax"]
        if absmax.numel() != blocks:
            raise Damaged("weight.absmax", f"holds {absmax.numel()} values, not {blocks}")
        if absmax.dtype == torch.uint8:
            for part in _NESTED:
                if part not in small:
                    raise Damaged(part, "is missing")
            if small[_NESTED[0]].numel() != -(-blocks // state["nested_blocksize"]):
                raise Damaged(_NESTED[0], f"holds {small[_NESTED[0]].numel()} values for {blocks} scales")
        check_scales("weight.absmax", _scales(small, state))
        check_scales("weight.quant_map", small["weight.quant_map"])
        return RUNS_ON

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`. The first of two codes is in the high bits."""
        state = _state(tensors)
        packed = tensors["weight"].flatten().view(torch.uint8)
        codes = torch.stack((packed >> 4, packed & 15), -1).flatten()[: outputs * inputs]
        scales = _scales(tensors, state).repeat_interleave(state["blocksize"])[: outputs * inputs]
        values = tensors["weight.quant_map"][codes.int()] * scales
        return values.view(outputs, inputs).to(dtype)


def _scales(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """A scale for each block, float32."""
    absmax = tensors["weight.absmax"]
    if absmax.dtype != torch.uint8:
        return absmax.float()
    each = tensors[_NESTED[0]].repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
    return tensors[_NESTED[1]][absmax.int()] * each + state["nested_offset"]


def _state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the JSON in a tensor of bytes says.

    Raises:
        Damaged: it is missing or broken.
    """
    part = next((name for name in _STATES if name in tensors), None)
    if part is None:
        raise Damaged(_STATES[0], "is missing")
    try:
        found = json.loads(bytes(tensors[part].cpu().flatten().tolist()))
        shape = [int(size) for size in found["shape"]]
        numbers: dict[str, Any] = {"blocksize": int(found["blocksize"]), "shape": shape}
        if "nested_blocksize" in found:
            numbers |= {"nested_blocksize": int(found["nested_blocksize"])}
            numbers |= {"nested_offset": float(found["nested_offset"])}
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(part, f"holds no JSON with shape and block size ({error})") from None
    counts = (*shape, numbers["blocksize"], numbers.get("nested_blocksize", 1))
    if len(shape) != 2 or min(counts) < 1 or not math.isfinite(numbers.get("nested_offset", 0.0)):
        raise Damaged(part, f"holds sizes that no weight has: {numbers}")
    return numbers


@dataclass(frozen=True)
class Bitsandbytes:
    """A checkpoint of bitsandbytes. Which projections have codes is seen in the files."""

    stored: Rows | Table
    notes: tuple[str, ...] = ()
    method: str = METHOD
    target = staticmethod(dot_weight)
    dense_shape = staticmethod(dense_2d)

    def split(self, name: str) -> tuple[str, str] | None:
        """See `Format`. Parts of 4-bit weights have dots in their names."""
        return next(
            ((name.removesuffix(f".{part}"), part) for part in _PARTS if name.endswith(f".{part}")),
            None,
        )

    def scheme(self, projection: str) -> Scheme | None:
        """The same for all."""
        return self.stored


def read(values: Mapping[str, Any]) -> Bitsandbytes:
    """The format that a `quantization_config` describes.

    Raises:
        UnsupportedModelError: it says neither 4 nor 8 bits.
    """
    four, eight = (bool(values.get(name) or values.get(f"_{name}")) for name in ("load_in_4bit", "load_in_8bit"))
    if four == eight:
        raise UnsupportedModelError(
            "its weights are quantised in a way that is not known here (quantization_config, method 'bitsandbytes': "
            f"load_in_4bit {four}, load_in_8bit {eight}); load a checkpoint in one of the formats of "
            "docs/quantisation.md, or a float32, bfloat16 or float16 one"
        )
    return Bitsandbytes(Table()) if four else Bitsandbytes(Rows(), (WEIGHTS_ALONE,))
