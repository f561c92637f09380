"""A rank's share of a model that several processes have together, as what computes with it sees the others.

Weights that are cut by their outputs give a rank's heads, its part of the MLP and its logits; those that are cut by
their inputs give partial sums, which are added up over the ranks. All ranks call the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from hybridgen.models.quantised import QuantisedLinear


class ShareLinear(nn.Linear):
    """A projection with a rank's part of a weight, whose forward has the other ranks' part in its output."""


class QuantisedShareLinear(QuantisedLinear):
    """The same with a quantised weight."""


class Share(Protocol):
    """The group of ranks, as one of them has it."""

    @property
    def rank(self) -> int:
        """This one's number."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def agree(self, reason: str) -> str:
        """Why all ranks leave something out: the first reason that any of them gives; empty where none has one."""

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over all ranks, a tensor of the same shape and dtype, with the same bits on all of them."""

    def parts(self, rows: int, width: int) -> int:
        """Parts of a row in `add_to_state` for so many rows of this width; 0 if that is not there."""

    def add_to_state(
        self, product: Tensor, state: Tensor, handed: Tensor, gain: Tensor | None, squares: Tensor, factor: float
    ) -> None:
        """`state += factor * product`, added up over all ranks first; then what a norm and a projection read of it.

        Args:
            product: [rows, width] in the model's dtype.
            state: float32 [>= rows, width].
            handed: [>= rows, width] in the model's dtype; gets `state * gain`.
            gain: float32 [width], or None for 1.
            squares: float32 [>= parts, 16]; gets the sum of squares of each part of each row's state.
        """

    def gather(self, logits: Tensor) -> Tensor:
        """[..., this rank's part of the vocabulary] -> [..., vocabulary]."""

    def memory(self, size: int) -> list[int]:
        """Zeroed memory of each rank, by rank: addresses at which this rank's device reads and writes it.

        It stays until the group ends.

        Args:
            size: bytes of each; the same on all ranks.

        Raises:
            DeviceError: it cannot be had, on this rank or on another; all of them raise.
        """

    def on_end(self, call: Callable[[], None]) -> None:
        """Have this called, from any thread, when the group ends while something may still wait for other ranks."""
