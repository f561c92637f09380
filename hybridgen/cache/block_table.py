"""Which pages a slot has, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridgen.cache.pages import DUMMY_PAGE
from hybridgen.device.rows import write_rows


class BlockTable:
    """Page ids by slot and page index: int32 [max_batch, max_pages] on the device.

    A row is written once, when a request is admitted with all the pages that it can ever need, so that decode
    steps send nothing.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device) -> None:
        self.tensor = torch.full((max_batch, max_pages), DUMMY_PAGE, dtype=torch.int32, device=device)

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        """Give a slot its pages; entries past them point to the dummy page."""
        self.assign_all([slot], [pages])

    def assign_all(self, slots: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """Give each of these slots its pages. Waits for nothing, and sends all of them at once."""
        shape = len(slots), self.tensor.shape[1]
        host = torch.full(shape, DUMMY_PAGE, dtype=torch.int32, device="cpu", pin_memory=self.tensor.is_cuda)
        rows = host.numpy()
        for row, its_pages in zip(rows, pages, strict=True):
            row[: len(its_pages)] = its_pages
        write_rows(slots, (self.tensor, host))
