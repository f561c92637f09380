"""What a layer keeps between steps: the contract that every kind of state fulfils."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from hybridgen.errors import OutOfMemoryError


class LayerState(Protocol):
    """The state of one layer, or of several that change together (`SlotState`).

    It grows with a request's positions (pages), has one size whatever the request (slots), or both.
    The engine makes the objects, sizes the pool from their bytes, and allocates them together.
    """

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page in this layer; 0 where the state does not grow with the positions."""

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that a request needs whatever its length; 0 where all of the state is in pages."""

    @property
    def rerunnable(self) -> bool:
        """Whether a step that ran twice leaves the same as one that ran once.

        Writes to pages do: the second run writes the same to the same places. A recurrent update does not: such a
        state keeps what it was before the step until `commit()`.
        """

    def allocate(self, pages: int, slots: int, device: torch.device) -> None:
        """Make the tensors, filled with zeros, in place of those that it has.

        Args:
            pages: of the pool, the dummy page included.
            slots: of requests, the padding slot included.
        """

    def tensors(self) -> dict[str, torch.Tensor]:
        """What must stay where it is while recorded steps refer to it, by name."""

    def reset(self, slot: int) -> None:
        """Forget what a slot's last request left, before a new one gets the slot; where `bytes_per_slot` is not 0."""

    def marks(self) -> tuple[torch.Tensor, ...]:
        """What `commit()` changes; with that as it was before a step, the step can run again."""

    def commit(self, slots: torch.Tensor, accepted: torch.Tensor) -> None:
        """Keep what a step wrote. Runs on the device behind `advance`, and only where the state is not rerunnable.

        Args:
            slots: int64 [B], those that the step moved on.
            accepted: int64 [B], how many of its tokens each keeps.
        """


def bytes_per_page(states: Sequence[LayerState]) -> int:
    """Bytes of one page over all layers."""
    return sum(state.bytes_per_page for state in states)


def bytes_per_slot(states: Sequence[LayerState]) -> int:
    """Bytes of one slot over all layers."""
    return sum(state.bytes_per_slot for state in states)


def total_bytes(states: Sequence[LayerState], pages: int, slots: int) -> int:
    """Bytes of all layers with so many pages and slots."""
    return pages * bytes_per_page(states) + slots * bytes_per_slot(states)


def allocate(states: Sequence[LayerState], pages: int, slots: int, device: torch.device) -> None:
    """Allocate every layer's state.

    Args:
        pages: of the pool, the dummy page included.
        slots: of requests, the padding slot included.

    Raises:
        OutOfMemoryError: the device does not hold them; nothing stays allocated.
    """
    try:
        for state in states:
            state.allocate(pages, slots, device)
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error) and "memory" not in str(error):
            raise
        for state in states:
            state.allocate(0, 0, device)
        raise OutOfMemoryError(
            f"the KV cache of {total_bytes(states, pages, slots):,} bytes ({pages} pages{_by_slot(states, slots)}) "
            f"does not fit on {device}; lower kv_memory, max_batch or max_context"
        ) from error


def _by_slot(states: Sequence[LayerState], slots: int) -> str:
    """What of it the slots take, in words."""
    size = slots * bytes_per_slot(states)
    return f", and {size:,} bytes for the states of {slots} slots" if size else ""
