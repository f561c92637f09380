"""Keys and values of a layer in pages."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from hybridgen.cache.state import LayerState


class LayerShape(NamedTuple):
    """What one layer stores for each position."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


class KVScales(NamedTuple):
    """What cached keys and values of 8 bits are multiplied by: float32, [num_kv_heads] or [1]."""

    keys: torch.Tensor
    values: torch.Tensor


class LayerPages(NamedTuple):
    """One layer's cache: `keys` [num_pages, num_kv_heads, page_size, key_dim], `values` alike with value_dim.

    This pair is what kernels and fused steps take.
    """

    keys: torch.Tensor
    values: torch.Tensor


class PagedState(LayerState, Protocol):
    """A state that attention reads in pages."""

    @property
    def bytes_per_position(self) -> int:
        """Bytes that attention reads for each position that it sees, whoever stores them."""


class KeyValueState(PagedState, Protocol):
    """A state that attention reads as keys and values in pages."""

    @property
    def pages(self) -> LayerPages:
        """The pages. Raises RuntimeError before `allocate()`."""

    @property
    def scales(self) -> KVScales | None:
        """What is in the pages is keys and values divided by these; None: as they are."""


class PagedKV:
    """Keys and values of one layer, in pages of `page_size` positions.

    A page is written before it is read: a position is fed, which writes it, before any later one attends to it. So
    neither a new request nor a step that is run again has anything to clear.
    """

    rerunnable = True
    bytes_per_slot = 0

    def __init__(self, shape: LayerShape, page_size: int, dtype: torch.dtype, scales: KVScales | None = None) -> None:
        """See the arguments.

        Args:
            dtype: of the pages: the activations', or float8_e4m3fn.
            scales: keys and values are divided by them when they are written; None: by nothing.
        """
        self.shape = shape
        self.page_size = page_size
        self.dtype = dtype
        self.scales = scales
        self._pages: LayerPages | None = None

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position's keys and values."""
        return self.shape.num_kv_heads * (self.shape.key_dim + self.shape.value_dim) * self.dtype.itemsize

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page."""
        return self.page_size * self.bytes_per_position

    @property
    def pages(self) -> LayerPages:
        """The pages. Raises RuntimeError before `allocate()`."""
        if self._pages is None:
            raise RuntimeError("the layer has no pages yet; call allocate() first")
        return self._pages

    def allocate(self, pages: int, slots: int, device: torch.device) -> None:
        """Make the pages, filled with zeros; slots need nothing."""

        def zeros(dim: int) -> torch.Tensor:
            size = pages, self.shape.num_kv_heads, self.page_size, dim
            return torch.zeros(size, dtype=self.dtype, device=device)

        self._pages = LayerPages(zeros(self.shape.key_dim), zeros(self.shape.value_dim))

    def tensors(self) -> dict[str, torch.Tensor]:
        """`keys` and `values`."""
        return self.pages._asdict()

    def reset(self, slot: int) -> None:
        """Nothing: see the class."""

    def marks(self) -> tuple[torch.Tensor, ...]:
        """Nothing."""
        return ()

    def commit(self, slots: torch.Tensor, accepted: torch.Tensor) -> None:
        """Nothing: a position that was not accepted is written again before it is read."""


class SharedKV:
    """A layer that attends to the keys and values of an earlier one, and stores none itself (Gemma 3n, Gemma 4)."""

    rerunnable = True
    bytes_per_page = 0
    bytes_per_slot = 0

    def __init__(self, producer: KeyValueState) -> None:
        """`producer` is the earlier layer's state."""
        self.producer = producer

    @property
    def bytes_per_position(self) -> int:
        """Bytes that attention reads for each position: the producer's."""
        return self.producer.bytes_per_position

    @property
    def pages(self) -> LayerPages:
        """The producer's pages. Raises RuntimeError before it is allocated."""
        return self.producer.pages

    @property
    def scales(self) -> KVScales | None:
        """The producer's."""
        return self.producer.scales

    def allocate(self, pages: int, slots: int, device: torch.device) -> None:
        """Nothing: the producer has the pages."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """None of its own."""
        return {}

    def reset(self, slot: int) -> None:
        """Nothing: see `PagedKV`."""

    def marks(self) -> tuple[torch.Tensor, ...]:
        """Nothing."""
        return ()

    def commit(self, slots: torch.Tensor, accepted: torch.Tensor) -> None:
        """Nothing: see `PagedKV`."""
