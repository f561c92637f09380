"""The tensors of the cache: K and V pages of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

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
