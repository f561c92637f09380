"""What the engine knows of each slot, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hybridgen.cache import DUMMY_PAGE
from hybridgen.device.rows import SentRows
from hybridgen.kernels.step.drafts import NO_DRAFT


class SlotRows(NamedTuple):
    """What a step reads of its rows: each int64 [B]."""

    last_tokens: torch.Tensor
    """The tokens to feed."""
    lengths: torch.Tensor
    """Cached positions, which are the positions of those tokens."""
    generated: torch.Tensor
    """Tokens generated so far."""


class BlockTable:
    """Page ids by slot and page index: int32 [max_batch, max_pages] on the device.

    A row is written once, when a request is admitted with all the pages that it can ever need, so that decode
    steps send nothing.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device) -> None:
        self.tensor = torch.full((max_batch, max_pages), DUMMY_PAGE, dtype=torch.int32, device=device)
        self._rows = SentRows(self.tensor)

    def assign_all(self, slots: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """Give each of these slots its pages; entries past them point to the dummy page. Waits for nothing, and sends
        all of them at once."""
        rows = np.full((len(slots), self.tensor.shape[1]), DUMMY_PAGE, np.int32)
        for row, its_pages in zip(rows, pages, strict=True):
            row[: len(its_pages)] = its_pages
        self._rows.write(slots, rows)


class DeviceState:
    """Per slot: the last token, the number of cached positions and of generated tokens, and the pages.

    A decode step reads and advances all of it on the device; the host sends nothing while the batch stays as it is.
    There is one slot more than requests: the padding slot, whose state stays zero and whose pages are the dummy page.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device, *, query_len: int = 1) -> None:
        """`query_len`: tokens of a row in a decode step at most; above 1 there is room for drafts."""
        self.device = device
        self.query_len = query_len
        with torch.inference_mode():  # as what a step computes is: a compiled layer is specialised to that
            self.places = torch.arange(query_len, device=device)
            """int64 [query_len]: 0, 1, ..."""
        self.drafts = torch.full((max_batch + 1, query_len - 1), NO_DRAFT, dtype=torch.int64, device=device)
        """int64 [max_batch + 1, query_len - 1]: by slot, what was drafted behind its last token; `NO_DRAFT` behind
        that."""
        self.max_batch = max_batch
        self.padding_slot = max_batch
        self.table = torch.zeros(3, max_batch + 1, dtype=torch.int64, device=device)
        """int64 [3, max_batch + 1], in the order of `SlotRows`; `kernels.step.advance` writes it."""
        self.block_table = BlockTable(max_batch + 1, max_pages, device)

    def read(self, rows: torch.Tensor) -> SlotRows:
        """The state of these rows, int64 [B]."""
        return SlotRows(*self.table.index_select(1, rows).unbind(0))

    def draft_tensors(self) -> dict[str, torch.Tensor]:
        """What steps of several tokens a row read, by name."""
        return {"drafts": self.drafts, "places": self.places} if self.query_len > 1 else {}
