"""The tensors of the cache: K and V pages of each layer, and the block table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hybridgen.cache.pages import DUMMY_PAGE
from hybridgen.errors import OutOfMemoryError


class LayerShape(NamedTuple):
    """What one layer stores for each position."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


class LayerPages(NamedTuple):
    """One layer's cache: `keys` [num_pages, num_kv_heads, page_size, key_dim], `values` alike with value_dim."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class CacheShape:
    """What the whole model stores for each position, and in which pages."""

    layers: tuple[LayerShape, ...]
    page_size: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        values = sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)
        return values * self.page_size * self.dtype.itemsize


def allocate_pages(shape: CacheShape, num_pages: int, device: torch.device) -> tuple[LayerPages, ...]:
    """Pages of every layer, filled with zeros.

    Raises:
        OutOfMemoryError: the device does not hold `num_pages` pages.
    """

    def zeros(heads: int, dim: int) -> torch.Tensor:
        return torch.zeros(num_pages, heads, shape.page_size, dim, dtype=shape.dtype, device=device)

    try:
        return tuple(
            LayerPages(zeros(layer.num_kv_heads, layer.key_dim), zeros(layer.num_kv_heads, layer.value_dim))
            for layer in shape.layers
        )
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error) and "memory" not in str(error):
            raise
        raise OutOfMemoryError(
            f"the KV cache of {num_pages * shape.page_bytes:,} bytes ({num_pages} pages) does not fit on {device}; "
            "lower kv_memory, max_batch or max_context"
        ) from error


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
