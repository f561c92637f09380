"""Triton: paged attention of the chain, from the qkv projection to what the output projection reads.

One kernel norms and rotates the heads of a row, writes the new key and value to their page, and attends. A program
takes one kv head of a chunk of a row's context. A row of a few hundred positions is one chunk. The program that
finishes the last of a row's chunks, as a counter says, adds up all of them in their order, so that results do not
depend on who was last. The plain-torch equivalent is in `reference`.

What does not come from the qkv projection, the cached keys and values above all, is requested before the kernel waits
for it: positions, tables and pages are older than the step, and the chain's first kernel lets no other start before
what made them has ended.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.device.launcher import power_of_two
from hybridgen.kernels.attention.common import load_pages, tile_pointers

_CHUNK_TOKENS = 1024
"""No chunk is longer, as long as a row has less than `row_chunks`."""
_PROGRAMS = 8
"""Programs a multiprocessor at most, most of which have nothing to do when contexts are short."""


class Cut(NamedTuple):
    """How the contexts of a step are cut, from shapes alone."""

    splits: int
    """Chunks of a row, as long as chunks stay between the shortest and the longest."""
    chunk_tiles: int
    row_chunks: int
    """Chunks that a row of any length can have."""


def block_of(head_dim: int) -> int:
    """Positions of a tile."""
    return 128 if power_of_two(head_dim) <= 128 else 64


def least_tiles(head_dim: int) -> int:
    """Tiles of a chunk at least, but a row's last one: adding chunks up takes as long as attending to so many.

    Measured on an H200 in whole steps of 8 rows at positions 512 and 640: heads of 64 gain from chunks of 256
    positions, those of 128 lose.
    """
    return (256 if power_of_two(head_dim) <= 64 else 512) // block_of(head_dim)


def cut_contexts(rows: int, kv_heads: int, head_dim: int, max_tiles: int, processors: int) -> Cut:
    """The cut for `rows` rows of up to `max_tiles` tiles."""
    pairs = rows * kv_heads
    splits = max(1, processors * 2 // pairs)
    row_chunks = max(splits, min(processors * _PROGRAMS // pairs, processors * 2 // kv_heads))
    row_chunks = max(1, min(row_chunks, triton.cdiv(max_tiles, least_tiles(head_dim))))
    return Cut(splits, _CHUNK_TOKENS // block_of(head_dim), row_chunks)


@triton.jit
def _chunks_of(  # type: ignore[no-untyped-def]
    position, window, splits, chunk_tiles, row_chunks, BLOCK: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """A row's first tile of cached positions, tile after the last, tiles a chunk, and chunks: one at least."""
    low = position * 0
    if WINDOW:
        low = tl.maximum(position + 1 - window, 0) // BLOCK
    tiles = tl.cdiv(position, BLOCK) - low
    per = tl.maximum(tl.minimum(tl.cdiv(tiles, splits), chunk_tiles), LEAST)
    count = tl.maximum(tl.minimum(tl.cdiv(tiles, per), row_chunks), 1)
    # As even as can be, and no chunk empty.
    per = tl.maximum(tl.cdiv(tiles, count), 1)
    return low, low + tiles, per, tl.maximum(tl.cdiv(tiles, per), 1)


@triton.jit
def _head(  # type: ignore[no-untyped-def]
    line, head, dim, inside, cos, sin, scale, eps,
    COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK_WIDE: tl.constexpr, NORM: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    """Heads [HEADS, BLOCK_DIM] of a row, normed and rotated.

    Args:
        line: float32 [COUNT, DIM], all heads of this kind.
        head: [HEADS, 1]; dim: [1, BLOCK_DIM]; inside: whether both exist.
        cos, sin: [1, BLOCK_DIM], sin negated for the first half.
        NORM: 0 (none), 1 (over each head) or 2 (over all heads of the kind).
    """
    HALF: tl.constexpr = DIM // 2
    x = tl.load(line + head * DIM + dim, mask=inside, other=0.0)
    if NORM == 1:
        root = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
    if NORM == 2:
        wide = tl.arange(0, BLOCK_WIDE)
        values = tl.load(line + wide, mask=wide < COUNT * DIM, other=0.0)
        root = tl.rsqrt(tl.sum(values * values, 0) / (COUNT * DIM) + eps)
        scale += head * DIM
    if NORM > 0:
        x *= root * tl.load(scale + dim, mask=inside, other=0.0)
    if ROTATES:
        partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
        y = tl.load(line + head * DIM + partner, mask=inside, other=0.0)
        if NORM > 0:
            y *= root * tl.load(scale + partner, mask=inside, other=0.0)
        x = x * cos + y * sin
    return x


@triton.jit
def _prefetch_tile(  # type: ignore[no-untyped-def]
    pages, table, first, position, head,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ask the L2 cache for a tile of keys or values."""
    ids = load_pages(table, first * BLOCK, position, PAGE, BLOCK)
    LINE: tl.constexpr = 128 // (pages.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = (DIM + LINE - 1) // LINE
    for line in tl.static_range(LINES):
        # A tile without a dimension: its first one, from `line` on.
        pointers = tile_pointers(pages + line * LINE, ids, first * BLOCK, head, HEADS, PAGE, DIM, BLOCK, 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    out, partial, sums, line, chunks, query_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Add up a kv head's chunks, the first of them at `line` of `partial` [chunks, HEADS, DIM], in their order."""
    member = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    inside = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    peak = tl.full([BLOCK_GROUP], -1e30, tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        place = (line + chunk)[:, None] * HEADS + query_head + member[None, :]
        mask = (chunk < chunks)[:, None] & (member < GROUP)[None, :]
        # Other programs wrote them while this one ran: not from the L1 cache.
        part = tl.load(sums + place, mask=mask, other=-float("inf"), cache_modifier=".cg")
        piece = partial + place[:, :, None] * DIM + dim[None, None, :]
        piece = tl.load(piece, mask=mask[:, :, None] & inside[None, :, :], other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(part, 0))
        weights = tl.exp2(part - new_peak[None, :])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(weights, 0)
        mixed = mixed * rescale[:, None] + tl.sum(weights[:, :, None] * piece, 0)
        peak = new_peak
    target = out + (query_head + member)[:, None] * DIM + dim[None, :]
    tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _mix(  # type: ignore[no-untyped-def]
    query, keys, values, seen, scale, peak, total, mixed, NATIVE: tl.constexpr
):  # fmt: skip
    """One tile of keys and values [BLOCK, BLOCK_DIM] into the running softmax; `scale` counts in powers of two."""
    if NATIVE:
        scores = tl.dot(query, tl.trans(keys)) * scale
    else:
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(seen[None, :], scores, -float("inf"))
    # Only a row's last chunk can begin with a tile of which nothing is seen, and it has the new key.
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    rescale = tl.exp2(peak - new_peak)
    total = total * rescale + tl.sum(weights, 1)
    mixed *= rescale[:, None]
    if NATIVE:
        mixed = tl.dot(weights.to(values.dtype), values, mixed)
    else:
        mixed = tl.dot(weights, values, mixed, input_precision="ieee")
    return new_peak, total, mixed


@triton.jit(
    do_not_specialize=["window", "rows", "splits", "chunk_tiles", "row_chunks", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions"],
)
def attend_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, query_scale, key_scale, k_pages, v_pages, block_table, slots, positions, partial, sums, counters,
    out, query_eps, key_eps, attention_scale, window, rows, splits, chunk_tiles, row_chunks, table_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_WIDE: tl.constexpr,
    MERGE_GROUP: tl.constexpr, MERGE_CHUNKS: tl.constexpr, LEAST: tl.constexpr, ROTATES: tl.constexpr,
    QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr, WINDOW: tl.constexpr, NATIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """qkv, float32 [rows, HEADS + 2 KV, DIM], to out [rows, HEADS, DIM]; this module says how.

    A program: kv head, row and chunk, the chunk slowest, so that programs without one come last.
    """
    head = tl.program_id(0) % KV
    row = tl.program_id(0) // KV % rows
    chunk = tl.program_id(0) // KV // rows
    place = tl.load(positions + row).to(tl.int32)
    table = block_table + tl.load(slots + row).to(tl.int64) * table_stride
    low, high, per, count = _chunks_of(place, window, splits, chunk_tiles, row_chunks, BLOCK, LEAST, WINDOW)
    if chunk >= count:
        if OVERLAP:
            gdc_wait()
        return
    first = low + chunk * per
    last = tl.minimum(first + per, high)
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    spots = tl.arange(0, BLOCK)

    # The first tile goes to registers, those behind it to the L2 cache.
    seen = first * BLOCK + spots < place
    if WINDOW:
        seen = seen & (first * BLOCK + spots > place - window)
    mask = seen[:, None] & (dim < DIM)
    ids = load_pages(table, first * BLOCK, place, PAGE, BLOCK)
    keys = tile_pointers(k_pages, ids, first * BLOCK, head, KV, PAGE, DIM, BLOCK, BLOCK_DIM)
    keys = tl.load(keys, mask=mask, other=0.0)
    values = tile_pointers(v_pages, ids, first * BLOCK, head, KV, PAGE, DIM, BLOCK, BLOCK_DIM)
    values = tl.load(values, mask=mask, other=0.0)
    HALF: tl.constexpr = DIM // 2
    c = tl.zeros([1, BLOCK_DIM], tl.float32)
    s = c
    if ROTATES:
        # int64: the table is as long as the context.
        angle = place.to(tl.int64) * HALF + dim % HALF
        c = tl.load(cos + angle, mask=dim < DIM, other=0.0)
        s = tl.load(sin + angle, mask=dim < DIM, other=0.0)
        s = tl.where(dim < HALF, -s, s)
    page = tl.load(table + place // PAGE).to(tl.int64)
    ids = load_pages(table, (first + 1) * BLOCK, place, PAGE, BLOCK)
    if OVERLAP:
        for tile in tl.static_range(1, LEAST):
            if first + tile < last:
                _prefetch_tile(k_pages, table, first + tile, place, head, KV, PAGE, DIM, BLOCK)
                _prefetch_tile(v_pages, table, first + tile, place, head, KV, PAGE, DIM, BLOCK)
        gdc_wait()

    member = tl.arange(0, BLOCK_GROUP)
    query_head = head * GROUP + member
    inside = (member < GROUP)[:, None] & (dim < DIM)
    line = qkv + row * ((HEADS + 2 * KV) * DIM)
    one = head + tl.zeros([1, 1], tl.int32)
    query = _head(
        line, query_head[:, None], dim, inside, c, s, query_scale, query_eps,
        HEADS, DIM, BLOCK_WIDE, QUERY_NORM, ROTATES,
    ).to(k_pages.dtype.element_ty)  # fmt: skip
    key = _head(
        line + HEADS * DIM, one, dim, dim < DIM, c, s, key_scale, key_eps, KV, DIM, BLOCK_WIDE, KEY_NORM, ROTATES
    ).to(k_pages.dtype.element_ty)  # fmt: skip
    value = tl.load(line + (HEADS + KV + head) * DIM + dim, mask=dim < DIM, other=0.0).to(v_pages.dtype.element_ty)

    # The new key and value: first of the last chunk, which writes them. Nobody else looks at that place.
    has_new = chunk == count - 1
    newest = ((page * KV + head) * PAGE + place % PAGE) * DIM + dim
    tl.store(k_pages + newest, key, mask=(dim < DIM) & has_new)
    tl.store(v_pages + newest, value, mask=(dim < DIM) & has_new)
    scale = attention_scale * 1.4426950408889634
    score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
    peak = tl.where(has_new, score, -float("inf"))
    total = tl.where(has_new, 1.0, 0.0) + tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.where(has_new, value.to(tl.float32), 0.0) + tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)

    if first < last:
        peak, total, mixed = _mix(query, keys, values, seen, scale, peak, total, mixed, NATIVE)
    for tile in range(first + 1, last):
        start = tile * BLOCK
        # A window begins in a row's first tile.
        seen = start + spots < place
        mask = seen[:, None] & (dim < DIM)
        keys = tile_pointers(k_pages, ids, start, head, KV, PAGE, DIM, BLOCK, BLOCK_DIM)
        keys = tl.load(keys, mask=mask, other=0.0)
        values = tile_pointers(v_pages, ids, start, head, KV, PAGE, DIM, BLOCK, BLOCK_DIM)
        values = tl.load(values, mask=mask, other=0.0)
        # The next tile's page ids, a tile early.
        ids = load_pages(table, start + BLOCK, place, PAGE, BLOCK)
        peak, total, mixed = _mix(query, keys, values, seen, scale, peak, total, mixed, NATIVE)
    # Not before: the next kernel's programs would crowd on the multiprocessors that have room.
    if OVERLAP:
        gdc_launch_dependents()

    mixed /= total[:, None]
    if count == 1:
        target = out + (row * HEADS + query_head)[:, None] * DIM + dim
        tl.store(target, mixed.to(out.dtype.element_ty), mask=inside)
    else:
        lines = row * row_chunks
        places = (lines + chunk) * HEADS + query_head
        tl.store(partial + places[:, None] * DIM + dim, mixed, mask=inside)
        tl.store(sums + places, peak + tl.log2(total), mask=member < GROUP)
        # All threads' stores come before the one thread's count.
        tl.debug_barrier()
        counter = counters + row * KV + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
            _merge(
                out + row * HEADS * DIM, partial, sums, lines, count, head * GROUP,
                HEADS, GROUP, DIM, MERGE_GROUP, BLOCK_DIM, MERGE_CHUNKS,
            )  # fmt: skip
            tl.store(counter, 0)
