"""Triton kernel of `schedule`, which says what it writes; and where each part lies in the schedule's buffer."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.attention.common import first_seen

HEADER = tl.constexpr(16)
"""Words before the rows' chunks; nothing is in them but the number of tiles of all rows."""
FEW = tl.constexpr(6)
"""Chunks of a size that are dealt one by one."""
SEVERAL = tl.constexpr(1 << 30)
"""In the word of a dealt chunk; below is the number of its first tile."""


@triton.jit
def chunk_words(plan):  # type: ignore[no-untyped-def]
    """[tokens + 1]: chunks of all rows before this one."""
    return plan + HEADER


@triton.jit
def part_words(plan, tokens):  # type: ignore[no-untyped-def]
    """[parts]: tiles of a part."""
    return plan + HEADER + tokens + 1


@triton.jit
def deal_words(plan, tokens, parts):  # type: ignore[no-untyped-def]
    """[parts + 1]: where a part's chunks begin among the dealt ones; then these: each chunk's first tile, with SEVERAL
    where its row has other chunks."""
    return plan + HEADER + tokens + 1 + parts


@triton.jit
def tile_words(plan, tokens, parts, most_chunks):  # type: ignore[no-untyped-def]
    """Four parts, each [capacity]: a tile's row, its mark, its line; and its pages, [capacity, pages of a tile]. Last
    in the schedule are the counters of `schedule.counters_of`.

    A mark says which positions of the tile the row sees, and where the tile lies in its chunk. A line is the chunk's
    place in scratch, with two flags: it is the row's last chunk, and its first.
    """
    return plan + HEADER + tokens + 1 + 2 * parts + 1 + most_chunks


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
    """Tiles of a row's chunks but for the last: from its own number of tiles alone."""
    return tl.maximum(chunk_tiles, tl.cdiv(tiles, row_chunks))


@triton.jit
def _taken(level, load, once):  # type: ignore[no-untyped-def]
    """Chunks of a size that a part takes while its load is not above the level; `once` is 1 / size.

    A product in place of a division, which took most of the time: exact for loads up to 2 million tiles.
    """
    times = ((level - load).to(tl.float32) + 0.5) * once
    return tl.where(load <= level, times.to(tl.int32) + 1, 0)


@triton.jit
def _deal(load, parts, size, count, BLOCK_PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of `count` chunks of one size each part takes, if each goes to a part with the least load."""
    part = tl.arange(0, BLOCK_PARTS)
    inside = part < parts
    taken = part * 0
    if count <= FEW:  # one by one: a reduction each, where a search takes a dozen
        for _ in range(count):
            least = tl.min(tl.where(inside, (load + taken * size) * BLOCK_PARTS + part, 0x7FFFFFFF), 0)
            taken += (part == least % BLOCK_PARTS).to(tl.int32)
    else:
        taken = _deal_many(load, parts, size, count, BLOCK_PARTS)
    return taken


@triton.jit
def _deal_many(load, parts, size, count, BLOCK_PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for many chunks: the level is searched up to which parts are filled."""
    inside = tl.arange(0, BLOCK_PARTS) < parts
    once = 1.0 / size.to(tl.float32)
    low = tl.min(load, 0) - 1
    high = tl.max(tl.where(inside, load, 0), 0) + size * (count // parts + 1)
    while high - low > 1:
        middle = (low + high) // 2
        fits = tl.sum(_taken(middle, load, once), 0) <= count
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    taken = _taken(low, load, once)
    next_one = ((load <= low + 1) & ((low + 1 - load) % size == 0)).to(tl.int32)
    left = count - tl.sum(taken, 0)
    return taken + tl.where(tl.cumsum(next_one, 0) <= left, next_one, 0)


@triton.jit
def _make_visible(lanes):  # type: ignore[no-untyped-def]
    """What this program has stored can be seen by others on the device from here on; `lanes` are as many as threads."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, $1;", "=r,r", [lanes], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _pick(values, index, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where(tl.arange(0, BLOCK) == index, values, 0), 0)


@triton.jit
def _long_tiles(before, count, chunks, per, is_long, BLOCK_ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tiles of the first `before` long chunks of all rows."""
    chunks = tl.where(is_long, chunks, 0)
    ends = tl.cumsum(chunks, 0)
    row = tl.sum((ends <= before).to(tl.int32), 0)
    whole = tl.sum(tl.where(is_long & (ends <= before), count, 0), 0)
    rest = before - _pick(ends - chunks, row, BLOCK_ROWS)
    return whole + tl.where(row < BLOCK_ROWS, rest * _pick(per, row, BLOCK_ROWS), 0)


@triton.jit(
    do_not_specialize=[
        "reach",
        "tokens",
        "chunk_tiles",
        "row_chunks",
        "capacity",
        "parts",
        "stripes",
        "heads",
        "counters",
    ],
    do_not_specialize_on_alignment=["block_table", "slots", "positions"],
)
def schedule_kernel(  # type: ignore[no-untyped-def]
    block_table, slots, positions, plan,
    reach, tokens, chunk_tiles, row_chunks, capacity, parts, stripes, heads, counters, table_stride,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, STEP: tl.constexpr, LIMIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs below tokens * stripes: every n-th STEP tiles of a row, and the row's chunks where they were dealt. The
    others: a part each. All of them deal."""
    if OVERLAP:
        gdc_wait()
    rows = tl.arange(0, BLOCK_ROWS)
    inside = rows < tokens
    place = tl.load(positions + rows, mask=inside, other=0).to(tl.int32)
    count = _row_tiles(place, reach, BLOCK, LIMIT)
    count = tl.where(inside, count, 0)
    per = _chunk_size(count, chunk_tiles, row_chunks)
    chunks = tl.cdiv(count, per)
    row = tl.program_id(0) // stripes
    stripe = tl.program_id(0) % stripes
    own_part = tl.program_id(0) - tokens * stripes
    before = rows < row
    first_tile = tl.sum(tl.where(before, count, 0), 0)
    first_chunk = tl.sum(tl.where(before, chunks, 0), 0)
    if row < tokens:
        position = tl.load(positions + row).to(tl.int32)
        low_tile = _low_tile(position, reach, BLOCK, LIMIT)
        tiles = _row_tiles(position, reach, BLOCK, LIMIT)
        size = _chunk_size(tiles, chunk_tiles, row_chunks)
        row_chunk_count = tl.cdiv(tiles, size)
        lowest = position * 0
        if LIMIT:
            lowest = first_seen(position, reach, LIMIT)
        table = block_table + tl.load(slots + row).to(tl.int64) * table_stride
        words = tile_words(plan, tokens, parts, tokens * row_chunks) + first_tile
        for start in range(stripe * STEP, tiles, stripes * STEP):
            tile = start + tl.arange(0, STEP)
            mask = tile < tiles
            chunk = tile // size
            done = tile - chunk * size
            left = tl.minimum(size - done, tiles - tile)
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
                pages = words - first_tile + 3 * capacity
                target = (first_tile + tile)[:, None] * (BLOCK // PAGE) + part
                tl.store(pages + target, page, mask=mask[:, None])
    if (row >= tokens) | (stripe == 0):
        # The largest chunks first, each to the part with the least load (Graham, 1969). Those of rows that have chunks
        # above the usual size count with their mean.
        part = tl.arange(0, BLOCK_PARTS)
        is_long = per > chunk_tiles
        last = count - (chunks - 1) * per
        own_last = _pick(last, row, BLOCK_ROWS)
        long_chunks = tl.sum(tl.where(is_long, chunks, 0), 0)
        dealt = tl.where(part < parts, long_chunks // parts + (part < long_chunks % parts).to(tl.int32), 0)
        ends = tl.cumsum(dealt, 0)
        long_dealt = dealt
        long_ends = ends
        mean = tl.sum(tl.where(is_long, count, 0), 0) // tl.maximum(long_chunks, 1)
        load = tl.where(part < parts, dealt * mean, 1 << 30)
        # Of the row's own chunks: how many of all have gone to each part when their turn is over, and where in that
        # part's list they lie.
        own_long = _pick(is_long.to(tl.int32), row, BLOCK_ROWS) == 1
        first_ends = ends
        first_shift = dealt * 0 - (ends - dealt)
        first_rank = tl.sum(tl.where(before & is_long, chunks, 0), 0)
        last_ends = ends
        last_shift = first_shift
        last_rank = first_rank
        taken_chunks = dealt
        tiles_of_part = dealt * 0
        for smaller in range(chunk_tiles):
            size = chunk_tiles - smaller
            of_row = tl.where((last == size) & (chunks > 0), 1, 0)
            if smaller == 0:
                of_row += tl.maximum(chunks - 1, 0)
            of_row = tl.where(is_long, 0, of_row)
            total = tl.sum(of_row, 0)
            if total > 0:
                dealt = _deal(load, parts, size, total, BLOCK_PARTS)
                if ((smaller == 0) | (size == own_last)) & (own_long == 0):
                    ends = tl.cumsum(dealt, 0)
                    shift = taken_chunks - (ends - dealt)
                    rank = tl.sum(tl.where(before, of_row, 0), 0)
                    if smaller == 0:
                        first_ends = ends
                        first_shift = shift
                        first_rank = rank
                    if size == own_last:
                        last_ends = ends
                        last_shift = shift
                        last_rank = rank + tl.where(smaller == 0, _pick(chunks, row, BLOCK_ROWS) - 1, 0)
                load += dealt * size
                taken_chunks += dealt
                tiles_of_part += dealt * size
        begins = tl.cumsum(taken_chunks, 0) - taken_chunks
        order = deal_words(plan, tokens, parts) + parts + 1
        if row < tokens:
            head = tl.arange(0, BLOCK_HEADS)
            tl.store(plan + counters + row * heads + head, head * 0, mask=head < heads)
            tl.store(chunk_words(plan) + row, first_chunk)
            count_of_row = _pick(chunks, row, BLOCK_ROWS)
            own_size = _pick(per, row, BLOCK_ROWS)
            if row == tokens - 1:
                tl.store(chunk_words(plan) + tokens, first_chunk + count_of_row)
            alike = tl.where(own_long, count_of_row, count_of_row - 1)
            own_tile = first_tile | tl.where(count_of_row > 1, SEVERAL, 0)
            for start in range(0, alike, 16):
                chunk = start + tl.arange(0, 16)
                rank = first_rank + chunk
                whose = tl.sum((first_ends[None, :] <= rank[:, None]).to(tl.int32), 1)
                at = tl.sum(tl.where(part[None, :] == whose[:, None], (begins + first_shift)[None, :], 0), 1) + rank
                tl.store(order + at, own_tile + chunk * own_size, mask=chunk < alike)
            if alike < count_of_row:
                whose = tl.sum((last_ends <= last_rank).to(tl.int32), 0)
                at = _pick(begins + last_shift, whose, BLOCK_PARTS) + last_rank
                tl.store(order + at, own_tile + alike * own_size)
        else:
            tl.store(deal_words(plan, tokens, parts) + own_part, _pick(begins, own_part, BLOCK_PARTS))
            tiles = _pick(tiles_of_part, own_part, BLOCK_PARTS)
            if long_chunks > 0:
                end = _pick(long_ends, own_part, BLOCK_PARTS)
                begin = end - _pick(long_dealt, own_part, BLOCK_PARTS)
                tiles += _long_tiles(end, count, chunks, per, is_long, BLOCK_ROWS)
                tiles -= _long_tiles(begin, count, chunks, per, is_long, BLOCK_ROWS)
            tl.store(part_words(plan, tokens) + own_part, tiles)
            if own_part == parts - 1:
                tl.store(deal_words(plan, tokens, parts) + parts, tl.sum(taken_chunks, 0))
                tl.store(plan, tl.sum(count, 0))
    if OVERLAP:
        # The next kernel may read the schedule before this one has ended.
        tl.debug_barrier()
        _make_visible(tl.arange(0, 32))
        gdc_launch_dependents()
