"""What the engine knows of each slot, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hybridgen.kvcache import BlockTable


def to_device(
    values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of the values on the device, without waiting for it (through pinned memory on CUDA)."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class SlotRows(NamedTuple):
    """What a step reads of its rows: each int64 [B]."""

    last_tokens: torch.Tensor
    """The tokens to feed."""
    lengths: torch.Tensor
    """Cached positions, which are the positions of those tokens."""
    generated: torch.Tensor
    """Tokens generated so far."""


class DeviceState:
    """Per slot: the last token, the number of cached positions and of generated tokens, and the pages.

    A decode step reads and advances all of it on the device; the host sends nothing while the batch stays as it is.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device) -> None:
        self.device = device
        self.max_batch = max_batch
        self.table = torch.zeros(3, max_batch, dtype=torch.int64, device=device)
        """int64 [3, max_batch], in the order of `SlotRows`: one gather and one scatter a step."""
        self.block_table = BlockTable(max_batch, max_pages, device)
        self._index: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None

    def index(self, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots on the device, int64 [B] and int32 [B]; kept while the batch stays the same."""
        if self._index is None or self._index[0] != slots:
            rows = to_device(slots, torch.int64, self.device)
            self._index = (slots, rows, rows.int())
        return self._index[1], self._index[2]

    def read(self, rows: torch.Tensor) -> SlotRows:
        """The state of these rows, int64 [B]."""
        return SlotRows(*self.table.index_select(1, rows).unbind(0))

    def write(self, rows: torch.Tensor, state: SlotRows) -> None:
        """Store a step's sampled tokens and the new counts of these rows."""
        # A failed row has token -1; the row may run once more before the host knows, so it needs a valid id.
        self.table.index_copy_(1, rows, torch.stack(state).clamp_(min=0))
