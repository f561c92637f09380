"""What the engine knows of each slot, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridgen.kvcache import BlockTable


def to_device(
    values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of the values on the device, without waiting for it (through pinned memory on CUDA)."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class DeviceState:
    """Per slot: the last token, the number of cached positions, and the pages.

    A decode step reads and advances all of it on the device; the host sends nothing while the batch stays as it is.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device) -> None:
        self.device = device
        self.max_batch = max_batch
        self.last_token = torch.zeros(max_batch, dtype=torch.int64, device=device)
        """int64 [max_batch]: the token that the next decode step feeds."""
        self.length = torch.zeros(max_batch, dtype=torch.int64, device=device)
        """int64 [max_batch]: cached positions, which is the position of that token."""
        self.generated = torch.zeros(max_batch, dtype=torch.int64, device=device)
        """int64 [max_batch]: tokens generated so far."""
        self.block_table = BlockTable(max_batch, max_pages, device)
        self._rows: tuple[tuple[int, ...], torch.Tensor] | None = None

    def rows(self, slots: tuple[int, ...]) -> torch.Tensor:
        """int64 [B] of the slots on the device; kept while the batch stays the same."""
        if self._rows is None or self._rows[0] != slots:
            self._rows = (slots, to_device(slots, torch.int64, self.device))
        return self._rows[1]

    def advance(self, rows: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor, generated: torch.Tensor) -> None:
        """Store a step's sampled tokens and the new counts of these rows, each int64 [B]."""
        # A failed row has token -1; the row may run once more before the host knows, so it needs a valid id.
        self.last_token.index_copy_(0, rows, tokens.clamp(min=0))
        self.length.index_copy_(0, rows, lengths)
        self.generated.index_copy_(0, rows, generated)
