"""Triton kernel of `schedule`, which says what it writes; and where each part lies in the schedule's buffer."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.attention.common import first_seen

HEADER = tl.constexpr(16)
"""Words before the runs; the first is the number of tiles of all rows."""


@triton.jit
def run_words(plan):  # type: ignore[no-untyped-def]
    """[programs + 1]: a program's first item. Item `head * tiles of all rows + tile` is a tile of one kv head."""
    return plan + HEADER


@triton.jit
def chunk_words(plan, programs):  # type: ignore[no-untyped-def]
    """[tokens + 1]: chunks of all rows before this one."""
    return plan + HEADER + programs + 1


@triton.jit
def tile_words(plan, programs, tokens):  # type: ignore[no-untyped-def]
    """Four parts, each [capacity]: a tile's row, its mark, its line; and last its pages, [capacity, pages of a tile].

    A mark says which positions of the tile the row sees, and where the tile lies in its chunk. A line is the chunk's
    place in scratch, with two flags: it is the row's last chunk, and its first.
    """
    return plan + HEADER + programs + 1 + tokens + 1


@triton.jit
def pack_mark(valid, low, left, is_first, ends_row):  # type: ignore[no-untyped-def]
    return valid | (low << 9) | (left << 17) | (is_first.to(tl.int32) << 29) | (ends_row.to(tl.int32) << 30)


@triton.jit
def mark_valid(mark):  # type: ignore[no-untyped-def]
    """Positions of the tile up to the row's own (1 to 256)."""
    return mark & 0x1FF


@triton.jit
def mark_low(mark):  # type: ignore[no-untyped-def]
    """Positions of the tile before the first that the row sees."""
    return (mark >> 9) & 0xFF


@triton.jit
def mark_left(mark):  # type: ignore[no-untyped-def]
    """Tiles of the chunk from this one on."""
    return (mark >> 17) & 0xFFF


@triton.jit
def mark_is_first(mark):  # type: ignore[no-untyped-def]
    """1 for the first tile of a chunk, else 0."""
    return (mark >> 29) & 1


@triton.jit
def mark_ends_row(mark):  # type: ignore[no-untyped-def]
    """1 for the tile with the row's own position, else 0."""
    return (mark >> 30) & 1


@triton.jit
def _low_tile(position, reach, BLOCK: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first tile that a row sees."""
    low = position * 0
    if LIMIT:
        low = first_seen(position, reach, LIMIT) // BLOCK
    return low


@triton.jit
def _row_tiles(position, reach, BLOCK: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many tiles a row sees."""
    return tl.cdiv(position + 1, BLOCK) - _low_tile(position, reach, BLOCK, LIMIT)


@triton.jit
def _chunk_size(tiles, chunk_tiles, row_chunks):  # type: ignore[no-untyped-def]
    """Tiles of a row's chunks: from its own number of tiles alone, and as even as can be."""
    most = tl.maximum(chunk_tiles, tl.cdiv(tiles, row_chunks))
    return tl.cdiv(tiles, tl.cdiv(tiles, most))


@triton.jit(
    do_not_specialize=["reach", "tokens", "chunk_tiles", "row_chunks", "capacity", "programs", "stripes"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions"],
)
def schedule_kernel(  # type: ignore[no-untyped-def]
    block_table, slots, positions, plan,
    reach, tokens, chunk_tiles, row_chunks, capacity, programs, stripes, table_stride,
    HEADS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    STEP: tl.constexpr, RUNS: tl.constexpr, LIMIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs below tokens * stripes: every n-th STEP tiles of a row. The others: RUNS programs' first items."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.arange(0, BLOCK_ROWS)
    inside = rows < tokens
    place = tl.load(positions + rows, mask=inside, other=0).to(tl.int32)
    count = _row_tiles(place, reach, BLOCK, LIMIT)
    count = tl.where(inside, count, 0)
    total = tl.sum(count, 0)
    if tl.program_id(0) < tokens * stripes:
        row = tl.program_id(0) // stripes
        stripe = tl.program_id(0) % stripes
        before = rows < row
        size = _chunk_size(tl.maximum(count, 1), chunk_tiles, row_chunks)
        chunks = tl.cdiv(count, size)
        first_tile = tl.sum(tl.where(before, count, 0), 0)
        first_chunk = tl.sum(tl.where(before, chunks, 0), 0)
        position = tl.load(positions + row).to(tl.int32)
        low_tile = _low_tile(position, reach, BLOCK, LIMIT)
        tiles = _row_tiles(position, reach, BLOCK, LIMIT)
        per = _chunk_size(tiles, chunk_tiles, row_chunks)
        row_chunk_count = tl.cdiv(tiles, per)
        lowest = position * 0
        if LIMIT:
            lowest = first_seen(position, reach, LIMIT)
        if stripe == 0:
            tl.store(chunk_words(plan, programs) + row, first_chunk)
            if row == tokens - 1:
                tl.store(chunk_words(plan, programs) + tokens, first_chunk + row_chunk_count)
                tl.store(plan, total)
        table = block_table + tl.load(slots + row).to(tl.int64) * table_stride
        words = tile_words(plan, programs, tokens) + first_tile
        for start in range(stripe * STEP, tiles, stripes * STEP):
            tile = start + tl.arange(0, STEP)
            mask = tile < tiles
            chunk = tile // per
            done = tile - chunk * per
            left = tl.minimum(per - done, tiles - tile)
            begin = (low_tile + tile) * BLOCK
            valid = tl.minimum(position + 1 - begin, BLOCK)
            hidden = tl.maximum(lowest - begin, 0)
            mark = pack_mark(valid, hidden, left, done == 0, tile == tiles - 1)
            line = (first_chunk + chunk) << 2
            line = line | ((chunk == row_chunk_count - 1).to(tl.int32) << 1) | (chunk == 0).to(tl.int32)
            tl.store(words + tile, tile * 0 + row, mask=mask)
            tl.store(words + capacity + tile, mark, mask=mask)
            tl.store(words + 2 * capacity + tile, line, mask=mask)
            if BLOCK <= PAGE:
                page = tl.load(table + begin // PAGE, mask=mask, other=0)
                piece = page * (PAGE // BLOCK) + (begin % PAGE) // BLOCK
                tl.store(words + 3 * capacity + tile, piece, mask=mask)
            else:
                part = tl.arange(0, BLOCK // PAGE)[None, :]
                at = begin[:, None] + part * PAGE
                used = mask[:, None] & (at <= position) & (at + PAGE > lowest)
                page = tl.load(table + at // PAGE, mask=used, other=0)
                pages = tile_words(plan, programs, tokens) + 3 * capacity
                target = (first_tile + tile)[:, None] * (BLOCK // PAGE) + part
                tl.store(pages + target, page, mask=mask[:, None])
    else:
        # Equal shares of all items, cut where a chunk begins.
        ends = tl.cumsum(count, 0)
        for index in range(RUNS):
            program = (tl.program_id(0) - tokens * stripes) * RUNS + index
            if program <= programs:
                item = (total.to(tl.int64) * HEADS * program // programs).to(tl.int32)
                tile = item % total
                row = tl.minimum(tl.sum((ends <= tile).to(tl.int32), 0), tokens - 1)
                position = tl.load(positions + row).to(tl.int32)
                tiles = _row_tiles(position, reach, BLOCK, LIMIT)
                per = _chunk_size(tiles, chunk_tiles, row_chunks)
                tile = tile - tl.sum(tl.where(rows < row, count, 0), 0)
                done = tile % per
                ahead = tl.where(done == 0, 0, tl.minimum(per - done, tiles - tile))
                tl.store(run_words(plan) + program, item + ahead)
