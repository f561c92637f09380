"""Which pages a slot has, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridgen.cache.pages import DUMMY_PAGE


class BlockTable:
    """Page ids by slot and page index: int32 [max_batch, max_pages] on the device.

    A row is written once, when a request is admitted with all the pages that it can ever need, so that decode
    steps send nothing.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device) -> None:
        self.tensor = torch.full((max_batch, max_pages), DUMMY_PAGE, dtype=torch.int32, device=device)
        self._pin = device.type == "cuda"

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        """Give a slot its pages; entries past them point to the dummy page."""
        row = torch.full((self.tensor.shape[1],), DUMMY_PAGE, dtype=torch.int32, device="cpu", pin_memory=self._pin)
        row[: len(pages)] = torch.tensor(pages, dtype=torch.int32, device="cpu")
        self.tensor[slot].copy_(row, non_blocking=True)
