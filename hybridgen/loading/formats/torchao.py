"""torchao's int8 and float8 tensors, as transformers saves them: `Int8Tensor` and `Float8Tensor`.

Their tensors follow a weight's name with an underscore before it (`q_proj._weight_qdata`). What the classes know
besides is in the files' metadata and follows from shapes: a scale for each output, for groups of inputs, or for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridgen.errors import UnsupportedModelError, shown
from hybridgen.kernels.linear.layout import Block
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
    need,
    split_at_dot,
)
from hybridgen.models.quantised import QuantisedWeight

METHOD = "torchao"
_CODES, _SCALES, _ZEROS = "_weight_qdata", "_weight_scale", "_weight_zero_point"
_OTHERS = ("_weight_scale_and_zero", "_weight_per_tensor_scale", "_weight_act_pre_scale")
"""Parts of tensors of other classes, which are refused."""
_WEIGHT_ONLY = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
_DYNAMIC = ("Int8DynamicActivationInt8WeightConfig", "Float8DynamicActivationFloat8WeightConfig")


def has_blocks(weight: tuple[int, int], scales: tuple[int, int]) -> bool:
    """Whether so many scales are one for each output, for groups of inputs, or for all."""
    return scales == (1, 1) or (scales[0] == weight[0] and scales[1] > 0 and weight[1] % scales[1] == 0)


@dataclass(frozen=True)
class Codes:
    """(code - zero) * scale."""

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Scheme`."""
        outputs, inputs = need(entries, _CODES, 2).shape
        rows, groups = need(entries, _SCALES, 2).shape
        if not has_blocks((outputs, inputs), (rows, groups)):
            raise Damaged(_SCALES, f"is {[rows, groups]}, and a weight of {[outputs, inputs]} has no such blocks")
        if _ZEROS in entries and entries[_ZEROS].shape != (rows, groups):
            raise Damaged(_ZEROS, f"is {list(entries[_ZEROS].shape)}, and the scales are {[rows, groups]}")
        if _ZEROS in entries and entries[_CODES].dtype != "I8":
            raise Damaged(_ZEROS, f"is there, and the codes are {entries[_CODES].dtype}")
        return outputs, inputs

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See `Scheme`."""
        return {
            _CODES: Part(("I8", "F8_E4M3"), (outputs, inputs), small=False),
            _SCALES: Part(FLOATS, None),
            _ZEROS: Part(("I8",), None, optional=True),
        }

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """See `Scheme`."""
        check_scales(_SCALES, small[_SCALES])
        return None

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """See `Scheme`. Zero points that are all 0, as symmetric weights have them, are left out."""
        codes, scales, zeros = tensors[_CODES], tensors[_SCALES], tensors.get(_ZEROS)
        rows, groups = scales.shape
        block = Block(outputs if rows == 1 else 1, inputs // groups)
        if codes.dtype == torch.int8:
            zeros = zeros.to(torch.int16) if zeros is not None and bool(zeros.any()) else None
            return QuantisedWeight("int8", codes, scales, zeros, inputs, block, dtype)
        check_codes(_CODES, codes)
        return QuantisedWeight("fp8", codes, scales, None, inputs, block, dtype)


@dataclass(frozen=True)
class TorchAO:
    """A checkpoint of torchao. Which projections have codes is seen in the files."""

    notes: tuple[str, ...] = ()
    method: str = METHOD
    target = staticmethod(dot_weight)
    dense_shape = staticmethod(dense_2d)

    def split(self, name: str) -> tuple[str, str] | None:
        """See `Format`."""
        return split_at_dot(name, (_CODES, _SCALES, _ZEROS, *_OTHERS))

    def scheme(self, projection: str) -> Scheme | None:
        """The same for all."""
        return Codes()


def read(values: Mapping[str, Any]) -> TorchAO:
    """The format that a `quantization_config` describes.

    Raises:
        UnsupportedModelError: something in it is not known here.
    """
    types = values.get("quant_type")
    default = types.get("default") if isinstance(types, Mapping) else types
    kind = default.get("_type") if isinstance(default, Mapping) else default
    if kind not in (*_WEIGHT_ONLY, *_DYNAMIC):
        raise UnsupportedModelError(
            "its weights are quantised in a way that is not known here (quantization_config, method 'torchao': "
            f"quant_type {shown(kind)}; known are {', '.join((*_WEIGHT_ONLY, *_DYNAMIC))}); load a checkpoint in one "
            "of the formats of docs/quantisation.md, or a float32, bfloat16 or float16 one"
        )
    return TorchAO((WEIGHTS_ALONE,) if kind in _DYNAMIC else ())
