"""Triton: who attends to what in a decode step. One launch, whose result all layers alike in `Shares` use.

The context of each row is cut into tiles and these into chunks, by the row's own length and by shapes. The resident
programs are divided evenly among the kv heads; a head's are the *parts* that all heads deal their chunks to alike, the
largest first and each to the part with the least load (Graham, 1969). So no chunk is shared. FlashInfer
(arXiv:2501.01005) and Stream-K (arXiv:2301.03598) give each program an equal run and cut at any tile, which makes a
row's rounding depend on its neighbours; runs that end where a chunk begins are uneven by up to a chunk.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import triton
from torch import Tensor

from hybridgen.device.launcher import Launcher, device_of
from hybridgen.kernels.attention.schedule_kernels import HEADER, schedule_kernel

_STEP = 128
"""Tiles that a program writes at once."""
_WARPS = 1
"""Of a program: it deals by many small reductions, which need no barrier in one warp."""
_MOST_CHUNK_TILES = 4095
"""A mark counts tiles of a chunk up to this."""


class Shares(NamedTuple):
    """What a schedule depends on besides values on the device; layers that agree in it use the same."""

    kv_heads: int
    page_size: int
    limit: int
    """By `limit_of`."""
    reach: int
    block: int
    """Positions of a tile."""
    chunk_tiles: int
    """Tiles of a chunk; more for rows that would have more than `row_chunks` chunks."""
    row_chunks: int
    """Chunks of a row at most."""
    programs: int
    """That are resident at once."""

    @property
    def parts(self) -> int:
        """Programs of each kv head."""
        return max(1, self.programs // self.kv_heads)

    def row_tiles(self, max_pages: int) -> int:
        """Tiles that a row of that many pages can see."""
        tiles = triton.cdiv(max_pages * self.page_size, self.block)
        return min(tiles, self.reach // self.block + 2) if self.limit else tiles


def row_chunks(max_tiles: int, chunk_tiles: int, line_bytes: int, tokens: int, most_bytes: int) -> int:
    """Chunks that a row can have, so that the scratch of all rows stays below `most_bytes`, where that is possible."""
    fits = max(2, most_bytes // (tokens * line_bytes))
    return max(min(triton.cdiv(max_tiles, chunk_tiles), fits), triton.cdiv(max_tiles, _MOST_CHUNK_TILES))


def schedule_words(tokens: int, max_pages: int, shares: Shares) -> int:
    """Words of a schedule for so many rows of up to `max_pages` pages."""
    tile_words = 3 + max(1, shares.block // shares.page_size)
    row_words = shares.row_chunks + shares.row_tiles(max_pages) * tile_words
    return HEADER.value + tokens + 1 + 2 * shares.parts + 1 + tokens * (row_words + shares.kv_heads)


def counters_of(plan: Tensor, tokens: int, max_pages: int, shares: Shares) -> Tensor:
    """A word for each row and kv head, where who attends counts chunks; 0 when the schedule has been written."""
    end = schedule_words(tokens, max_pages, shares)
    return plan[end - tokens * shares.kv_heads : end]


_launchers: dict[Hashable, Launcher] = {}


def schedule(block_table: Tensor, slots: Tensor, positions: Tensor, shares: Shares, out: Tensor) -> None:
    """Write a schedule for these rows, laid out as `schedule_kernels` says.

    Args:
        block_table, slots, positions: as in `attention.ops`, at least one row.
        out: int32, at least `schedule_words`.

    Raises:
        ValueError: `out` is too small.
    """
    tokens, max_pages = positions.shape[0], block_table.shape[1]
    capacity = tokens * shares.row_tiles(max_pages)
    words = schedule_words(tokens, max_pages, shares)
    if out.numel() < words:
        raise ValueError(f"a schedule of {out.numel()} words for {tokens} rows of {max_pages} pages; give {words}")
    stripes = min(8, triton.cdiv(shares.row_tiles(max_pages), _STEP))
    dtypes = block_table.dtype, slots.dtype, positions.dtype
    block_rows = max(16, triton.next_power_of_2(tokens))
    block_parts = max(32, triton.next_power_of_2(shares.parts))
    key = dtypes, shares[:5], block_rows, block_parts, block_table.stride(0), positions.device.index
    launcher = _launchers.get(key)
    if launcher is None:
        device = device_of(positions)
        constants = {
            "PAGE": shares.page_size,
            "BLOCK": shares.block,
            "BLOCK_ROWS": block_rows,
            "BLOCK_PARTS": block_parts,
            "BLOCK_HEADS": triton.next_power_of_2(shares.kv_heads),
            "STEP": _STEP,
            "LIMIT": shares.limit,
            "OVERLAP": device.overlap,
            "num_warps": _WARPS,
            **({"launch_pdl": True} if device.overlap else {}),
        }
        launcher = _launchers[key] = Launcher(schedule_kernel, constants)
    cut = shares.reach, tokens, shares.chunk_tiles, shares.row_chunks, capacity, shares.parts, stripes
    heads = shares.kv_heads, words - tokens * shares.kv_heads
    grid = tokens * stripes + shares.parts, 1, 1
    launcher(grid, (block_table, slots, positions, out, *cut, *heads, block_table.stride(0)))
