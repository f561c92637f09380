"""What a quantised format says of one projection: its tensors in the files, and what they become.

The tensors of all known formats are described bit by bit in `docs/quantisation.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from hybridgen.errors import UnsupportedModelError
from hybridgen.kernels.linear.layout import Block
from hybridgen.loading.checks import TensorEntry
from hybridgen.models.quantised import QuantisedWeight

FLOATS = ("BF16", "F16", "F32")
WEIGHTS_ALONE = "activations are not quantised, as the checkpoint's config asks for: weights alone are"
"""A note of formats whose own layers round activations to 8 bits."""


class Damaged(Exception):
    """A tensor of a projection is not what it must be. `part` is its name behind the projection's."""

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(problem)
        self.part = part


class Part(NamedTuple):
    """One tensor of a projection, as a file must have it."""

    dtypes: tuple[str, ...]
    """As safetensors names them."""
    shape: tuple[int, ...] | None
    """None: any."""
    small: bool = True
    """Read and checked for all projections before the first codes are read."""
    optional: bool = False


class Scheme(Protocol):
    """How a projection is stored."""

    def sizes(self, entries: Mapping[str, TensorEntry], small: Mapping[str, Tensor]) -> tuple[int, int]:
        """Outputs and inputs.

        Args:
            entries: the projection's tensors, by part; all that `parts` does not call optional may still be missing.
            small: the values of those that `tiny` names.

        Raises:
            Damaged: a tensor that they follow from is missing or contradicts another.
        """

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """Its tensors, by what is behind the projection's name."""

    def check(self, small: Mapping[str, Tensor], outputs: int, inputs: int) -> str | None:
        """Check the values of the small tensors.

        Returns:
            Why the weight is dequantised and not run as it is; None if it is run.

        Raises:
            Damaged: a value is out of its range.
        """

    def weight(
        self, tensors: Mapping[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype
    ) -> QuantisedWeight | Tensor:
        """The weight in the layout of `kernels.linear.layout`; its values [outputs, inputs] where `check` said so.

        Raises:
            Damaged: codes are out of their range.
        """


TINY = ("weight_shape", "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
"""Tensors of a few numbers that sizes follow from."""


class Format(Protocol):
    """How a checkpoint is stored, as its config says."""

    method: str
    """`quant_method` of the config."""
    notes: tuple[str, ...]
    """What is not done as the config asks."""

    def split(self, name: str) -> tuple[str, str] | None:
        """A tensor's name as projection and part, if it may be one of a quantised projection; else None."""

    def scheme(self, projection: str) -> Scheme | None:
        """How a projection is stored, as the config says; None if it is not quantised."""

    def target(self, projection: str) -> str:
        """The name that its weight has in a checkpoint that is not quantised."""

    def dense_shape(self, entries: Mapping[str, TensorEntry], outputs: int, inputs: int) -> tuple[int, ...]:
        """The shape that it has there."""


def split_at_dot(name: str, parts: Iterable[str]) -> tuple[str, str] | None:
    """`a.b.weight_scale` as `a.b` and `weight_scale`, if the latter is one of the parts."""
    owner, _, part = name.rpartition(".")
    return (owner, part) if owner and part in parts else None


def need(entries: Mapping[str, TensorEntry], part: str, dimensions: int) -> TensorEntry:
    """A tensor that sizes follow from.

    Raises:
        Damaged: it is missing, has another number of dimensions, or is empty.
    """
    entry = entries.get(part)
    if entry is None:
        raise Damaged(part, "is missing")
    if len(entry.shape) != dimensions:
        raise Damaged(part, f"is {list(entry.shape)}, and must have {dimensions} dimensions")
    if 0 in entry.shape:
        raise Damaged(part, f"is {list(entry.shape)}, and must hold numbers")
    return entry


def check_scales(part: str, scales: Tensor, *, positive: bool = False) -> None:
    """Raise if scales are no finite numbers.

    Raises:
        Damaged: they are not.
    """
    values = scales.float()
    if not bool(torch.isfinite(values).all()):
        raise Damaged(part, "holds scales that are infinite or no numbers")
    if positive and bool((values <= 0).any()):
        raise Damaged(part, "holds scales that are not above 0")


def check_codes(part: str, codes: Tensor) -> None:
    """Raise if 8-bit floating-point codes hold NaN.

    Raises:
        Damaged: they do.
    """
    if bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise Damaged(part, "holds codes that are no numbers")


def whole(value: Any) -> TypeGuard[int]:
    """Whether a value of a config is an integer: 4.0 and true are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def dense_2d(entries: Mapping[str, TensorEntry], outputs: int, inputs: int) -> tuple[int, ...]:
    """`Format.dense_shape` of an `nn.Linear`."""
    return outputs, inputs


def dot_weight(projection: str) -> str:
    """`Format.target` of an `nn.Linear`."""
    return f"{projection}.weight"


def full_block(outputs: int, inputs: int) -> Block:
    """One scale for all."""
    return Block(outputs, inputs)


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """A pattern of a config.

    Raises:
        UnsupportedModelError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UnsupportedModelError(f"{where} holds the pattern {pattern!r}, which is none: {error}") from error
