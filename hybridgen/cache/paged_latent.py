"""Latents of a layer in pages."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LatentShape(NamedTuple):
    """What one layer stores for each position, once for all heads."""

    rank: int
    """Of the latent that keys and values are projected from."""
    rope: int
    """Of the keys' part with the rotary embedding."""


class PagedLatent:
    """Latents and rotary keys of one layer, in pages of `page_size` positions (multi-head latent attention).

    As with `PagedKV` a page is written before it is read, so that nothing has to be cleared or taken back.
    """

    rerunnable = True
    bytes_per_slot = 0

    def __init__(self, shape: LatentShape, page_size: int, dtype: torch.dtype) -> None:
        self.shape = shape
        self.page_size = page_size
        self.dtype = dtype
        self._latents: torch.Tensor | None = None

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position."""
        return sum(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page."""
        return self.page_size * self.bytes_per_position

    @property
    def latents(self) -> torch.Tensor:
        """[pages, 1, page_size, rank + rope]. Raises RuntimeError before `allocate()`."""
        if self._latents is None:
            raise RuntimeError("the layer has no pages yet; call allocate() first")
        return self._latents

    def allocate(self, pages: int, slots: int, device: torch.device) -> None:
        """Make the pages, filled with zeros; slots need nothing."""
        self._latents = torch.zeros(pages, 1, self.page_size, sum(self.shape), dtype=self.dtype, device=device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`latents`."""
        return {"latents": self.latents}

    def reset(self, slot: int) -> None:
        """Nothing: see the class."""

    def marks(self) -> tuple[torch.Tensor, ...]:
        """Nothing."""
        return ()

    def commit(self, slots: torch.Tensor, accepted: torch.Tensor) -> None:
        """Nothing: a position that was not accepted is written again before it is read."""
