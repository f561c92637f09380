"""States that have one size whatever the request: of convolutions and recurrences, by slot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class SlotShape(NamedTuple):
    """One tensor that a layer keeps for each request."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of one of them."""
        return math.prod(self.shape) * self.dtype.itemsize


class MixerShapes(NamedTuple):
    """What one layer keeps for each request; None where it has no such state."""

    convolution: SlotShape | None
    """The last inputs of its convolution: [channels, kernel size]."""
    recurrent: SlotShape | None
    """The state of its recurrence, in float32 where transformers keeps float32."""


class MixerTensors(NamedTuple):
    """One layer's states of all slots, each [2 * slots, ...]: two places for each slot (see `SlotState`)."""

    convolution: torch.Tensor | None
    recurrent: torch.Tensor | None


class SlotState:
    """Convolution and recurrent states of all layers that have any, for every slot.

    A step cannot write such a state where it read it, or it could not run again. So each slot has two places. A step
    reads the one whose turn it is and writes the other; `commit()` changes turns, for all layers at once, on the device
    and behind all else. What a step wrote that failed before is never read.

    The padding slot is the last one. Its turn never changes, so that padding always reads zeros, and what it writes is
    read by nobody.
    """

    rerunnable = False
    bytes_per_page = 0

    def __init__(self, layers: Sequence[MixerShapes]) -> None:
        """`layers`: of those that keep a state, in order."""
        self.layers = tuple(layers)
        self._slots = 0
        self._tensors: tuple[MixerTensors, ...] = ()
        self._turns: torch.Tensor | None = None

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of a slot's two places over all layers, and of its turn."""
        each = sum(shape.bytes for layer in self.layers for shape in layer if shape is not None)
        return 2 * each + torch.int64.itemsize

    @property
    def mixers(self) -> tuple[MixerTensors, ...]:
        """The tensors of each layer, in order. Raises RuntimeError before `allocate()`."""
        if self._turns is None:
            raise RuntimeError("the layers have no slots yet; call allocate() first")
        return self._tensors

    @property
    def turns(self) -> torch.Tensor:
        """int64 [slots], 0 or 1: which of a slot's places is read. Raises RuntimeError before `allocate()`."""
        if self._turns is None:
            raise RuntimeError("the layers have no slots yet; call allocate() first")
        return self._turns

    def allocate(self, pages: int, slots: int, device: torch.device) -> None:
        """Make the tensors, filled with zeros; pages need nothing."""

        def zeros(state: SlotShape | None) -> torch.Tensor | None:
            return None if state is None else torch.zeros(2 * slots, *state.shape, dtype=state.dtype, device=device)

        self._slots = slots
        self._tensors, self._turns = (), None  # so that the new ones have the old ones' room
        self._tensors = tuple(MixerTensors(zeros(layer.convolution), zeros(layer.recurrent)) for layer in self.layers)
        self._turns = torch.zeros(slots, dtype=torch.int64, device=device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`turns`, and `convolution` and `recurrent` of each layer."""
        named = {
            f"{name} {index}": tensor
            for index, mixer in enumerate(self.mixers)
            for name, tensor in mixer._asdict().items()
            if tensor is not None
        }
        return {"turns": self.turns, **named}

    def places(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a step reads and writes the states of these slots, int64 [B] each, as indices of `mixers`' tensors.

        Args:
            slots: int32 or int64 [B].
        """
        slots = slots.long()
        turns = self.turns.index_select(0, slots)
        return slots + turns * self._slots, slots + (1 - turns) * self._slots

    def reset(self, slot: int) -> None:
        """Both places of a slot are zero again, whatever was left there."""
        tensors = [tensor for mixer in self.mixers for tensor in mixer if tensor is not None]
        torch._foreach_zero_([tensor[place] for tensor in tensors for place in (slot, slot + self._slots)])

    def marks(self) -> tuple[torch.Tensor, ...]:
        """The turns: all that `commit()` changes."""
        return (self.turns,)

    def commit(self, slots: torch.Tensor, accepted: torch.Tensor) -> None:
        """Read what the step wrote from now on.

        Args:
            slots: int64 [B]; the padding slot may be among them, several times.
            accepted: int64 [B], all 1: a recurrence cannot take a token back.
        """
        turned = 1 - self.turns.index_select(0, slots)
        self.turns.index_copy_(0, slots, turned * (slots != self._slots - 1))
