"""How a query of decode attention sees, on a CPU, where positions are known on the host."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Seeing(NamedTuple):
    """How a query sees; see `attention.decode_attention`."""

    scale: float
    window: int
    chunk: int
    softcap: float
    sinks: Tensor | None

    def pages(self, place: int, page_size: int) -> tuple[int, int, int]:
        """First and last column of the block table that a query at this position sees, and how many positions of the
        first page it does not."""
        low = 0
        if self.chunk > 0:
            low = place // self.chunk * self.chunk
        elif self.window > 0:
            low = max(0, place - self.window + 1)
        first = low // page_size
        return first, place // page_size, low - first * page_size
