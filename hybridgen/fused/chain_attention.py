"""Triton: paged attention of the chain, from the qkv projection to what the output projection reads.

One kernel norms and rotates the heads of a row, writes the new key and value to their page, and attends. A row's
context is cut into chunks of tiles; a program takes one kv head of every n-th chunk of the step. The program that
finishes the last chunk of a row's head, as a counter says, adds up all of them in their order, so that results do not
depend on who was last. The plain-torch equivalent is in `reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.attention_common import load_pages, power_of_two, tile_pointers

_CHUNK_TOKENS = 1024
"""With several rows no chunk is longer, unless the scratch would be larger than _SCRATCH_BYTES."""
_LEAST_TOKENS = 128
"""No chunk is shorter, but a row's last one."""
_SCRATCH_BYTES = 64 * 2**20


class Cut(NamedTuple):
    """How the contexts of a step are cut, from shapes alone."""

    splits: int
    """Chunks of a row, as long as chunks stay below `chunk_tiles`."""
    chunk_tiles: int
    """Tiles of a chunk at most."""
    row_chunks: int
    """Chunks that a row of any length can have."""
    programs: int
    """Programs of a kv head."""


def block_of(head_dim: int) -> int:
    """Positions of a tile."""
    return 64 if power_of_two(head_dim) <= 128 else 32


def cut_contexts(rows: int, heads: int, kv_heads: int, head_dim: int, max_tiles: int, processors: int) -> Cut:
    """The cut for `rows` rows of up to `max_tiles` tiles."""
    resident = max(1, processors * 2 // kv_heads)
    splits = min(max_tiles, max(1, resident // rows))
    most = max(1, _SCRATCH_BYTES // (rows * heads * head_dim * 4))
    chunk_tiles = max(_CHUNK_TOKENS // block_of(head_dim), triton.cdiv(max_tiles, most))
    if rows == 1:
        return Cut(splits, max_tiles, splits, splits)
    row_chunks = max(splits, triton.cdiv(max_tiles, chunk_tiles))
    return Cut(splits, chunk_tiles, row_chunks, min(resident, rows * row_chunks))


def least_tiles(head_dim: int) -> int:
    """Tiles of a chunk at least, but a row's last one."""
    return max(1, _LEAST_TOKENS // block_of(head_dim))


@triton.jit
def _chunks_of(  # type: ignore[no-untyped-def]
    position, window, splits, chunk_tiles, BLOCK: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """A row's first tile of cached positions, tile after the last, tiles a chunk, and chunks: one at least."""
    low = position * 0
    if WINDOW:
        low = tl.maximum(position + 1 - window, 0) // BLOCK
    tiles = tl.cdiv(position, BLOCK) - low
    per = tl.maximum(tl.minimum(tl.cdiv(tiles, splits), chunk_tiles), LEAST)
    # As even as can be.
    per = tl.maximum(tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, per), 1)), 1)
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


@triton.jit(
    do_not_specialize=["window", "rows", "splits", "chunk_tiles", "row_chunks", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions"],
)
def attend_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, query_scale, key_scale, k_pages, v_pages, block_table, slots, positions, partial, sums, counters,
    out, query_eps, key_eps, attention_scale, window, rows, splits, chunk_tiles, row_chunks, table_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_WIDE: tl.constexpr, MERGE_GROUP: tl.constexpr, MERGE_CHUNKS: tl.constexpr, LEAST: tl.constexpr,
    ROTATES: tl.constexpr, QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr, WINDOW: tl.constexpr,
    NATIVE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """qkv, float32 [rows, HEADS + 2 KV, DIM], to out [rows, HEADS, DIM]; `chain_attention` says how."""
    head = tl.program_id(0) % KV
    begin = tl.program_id(0) // KV
    # Positions, pages and tables are older than the step, and the chain's first kernel has waited for what made them.
    row_range = tl.arange(0, BLOCK_ROWS)
    position = tl.load(positions + row_range, mask=row_range < rows, other=0).to(tl.int32)
    chunks = _chunks_of(position, window, splits, chunk_tiles, BLOCK, LEAST, WINDOW)[3]
    chunks = tl.where(row_range < rows, chunks, 0)
    ends = tl.cumsum(chunks, 0)
    count = tl.sum(chunks, 0)
    if OVERLAP:
        if begin < count:
            row = tl.sum((ends <= begin).to(tl.int32), 0)
            chunk = begin - tl.sum(tl.where(row_range < row, chunks, 0), 0)
            place = tl.load(positions + row).to(tl.int32)
            table = block_table + tl.load(slots + row).to(tl.int64) * table_stride
            low, high, per, row_count = _chunks_of(place, window, splits, chunk_tiles, BLOCK, LEAST, WINDOW)
            _prefetch_tile(k_pages, table, low + chunk * per, place, head, KV, PAGE, DIM, BLOCK)
            _prefetch_tile(v_pages, table, low + chunk * per, place, head, KV, PAGE, DIM, BLOCK)
        gdc_wait()
        gdc_launch_dependents()

    HALF: tl.constexpr = DIM // 2
    member = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    query_head = head * GROUP + member
    inside = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    one = tl.zeros([1], tl.int32)
    for item in range(begin, count, tl.num_programs(0) // KV):
        row = tl.sum((ends <= item).to(tl.int32), 0)
        chunk = item - tl.sum(tl.where(row_range < row, chunks, 0), 0)
        place = tl.load(positions + row).to(tl.int32)
        table = block_table + tl.load(slots + row).to(tl.int64) * table_stride
        low, high, per, row_count = _chunks_of(place, window, splits, chunk_tiles, BLOCK, LEAST, WINDOW)
        first = low + chunk * per
        last = tl.minimum(first + per, high)

        line = qkv + row * ((HEADS + 2 * KV) * DIM)
        c = tl.zeros([1, BLOCK_DIM], tl.float32)
        s = c
        if ROTATES:
            # int64: the table is as long as the context.
            angle = place.to(tl.int64) * HALF + (dim % HALF)[None, :]
            c = tl.load(cos + angle, mask=(dim < DIM)[None, :], other=0.0)
            s = tl.load(sin + angle, mask=(dim < DIM)[None, :], other=0.0)
            s = tl.where((dim < HALF)[None, :], -s, s)
        query = _head(
            line, query_head[:, None], dim[None, :], inside, c, s, query_scale, query_eps,
            HEADS, DIM, BLOCK_WIDE, QUERY_NORM, ROTATES,
        ).to(k_pages.dtype.element_ty)  # fmt: skip

        peak = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_GROUP], tl.float32)
        mixed = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        if chunk == row_count - 1:
            # The new key and value: to their page, and the first of this chunk. Nobody else looks at that place.
            key = _head(
                line + HEADS * DIM, head + one[:, None], dim[None, :], (dim < DIM)[None, :], c, s, key_scale, key_eps,
                KV, DIM, BLOCK_WIDE, KEY_NORM, ROTATES,
            ).to(k_pages.dtype.element_ty)  # fmt: skip
            value = tl.load(line + (HEADS + KV + head) * DIM + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
            value = value.to(v_pages.dtype.element_ty)
            page = tl.load(table + place // PAGE).to(tl.int64)
            newest = ((page * KV + head) * PAGE + place % PAGE) * DIM + dim[None, :]
            tl.store(k_pages + newest, key, mask=(dim < DIM)[None, :])
            tl.store(v_pages + newest, value, mask=(dim < DIM)[None, :])
            peak = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * (attention_scale * 1.4426950408889634)
            total += 1.0
            mixed += value.to(tl.float32)
        ids = load_pages(table, first * BLOCK, place, PAGE, BLOCK)
        for tile in range(first, last):
            start = tile * BLOCK
            spot = start + tl.arange(0, BLOCK)
            seen = spot < place
            if WINDOW:
                seen = seen & (spot > place - window)
            mask = seen[:, None] & (dim < DIM)[None, :]
            keys = tile_pointers(k_pages, ids, start, head, KV, PAGE, DIM, BLOCK, BLOCK_DIM)
            keys = tl.load(keys, mask=mask, other=0.0)
            values = tile_pointers(v_pages, ids, start, head, KV, PAGE, DIM, BLOCK, BLOCK_DIM)
            values = tl.load(values, mask=mask, other=0.0)
            # The next tile's page ids, a tile early.
            ids = load_pages(table, start + BLOCK, place, PAGE, BLOCK)
            if NATIVE:
                scores = tl.dot(query, tl.trans(keys))
            else:
                scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
            scores *= attention_scale * 1.4426950408889634
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
            peak = new_peak
        mixed /= total[:, None]
        if row_count == 1:
            target = out + (row * HEADS + query_head)[:, None] * DIM + dim[None, :]
            tl.store(target, mixed.to(out.dtype.element_ty), mask=inside)
        else:
            lines = row * row_chunks
            spots = (lines + chunk) * HEADS + query_head
            tl.store(partial + spots[:, None] * DIM + dim[None, :], mixed, mask=inside)
            tl.store(sums + spots, peak + tl.log2(total), mask=member < GROUP)
            # All threads' stores come before the one thread's count.
            tl.debug_barrier()
            counter = counters + row * KV + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == row_count - 1:
                _merge(
                    out + row * HEADS * DIM, partial, sums, lines, row_count, head * GROUP,
                    HEADS, GROUP, DIM, MERGE_GROUP, BLOCK_DIM, MERGE_CHUNKS,
                )  # fmt: skip
                tl.store(counter, 0)
