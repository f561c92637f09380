"""Triton kernels of `kernels.attention.decode`, which says how they divide the work."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.attention.common import (
    first_seen,
    load_pages,
    packed_query,
    score_factor,
    soft_capped,
    stored,
    tile_pointers,
    unpacked,
)
from hybridgen.kernels.attention.decode_pairs_kernels import append_row, attend_pairs


@triton.jit
def _tiles(position, reach, BLOCK: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first tile that a row sees, and the tile after its last."""
    end = position + 1
    low = end * 0
    if LIMIT:
        low = first_seen(position, reach, LIMIT) // BLOCK
    return low, tl.cdiv(end, BLOCK)


@triton.jit
def _cut(  # type: ignore[no-untyped-def]
    position, reach, splits, chunk_tiles, BLOCK: tl.constexpr, LEAST: tl.constexpr, LIMIT: tl.constexpr
):  # fmt: skip
    """A row's first tile, tile after the last, tiles a chunk, and chunks."""
    low, high = _tiles(position, reach, BLOCK, LIMIT)
    tiles = high - low
    per = tl.maximum(tl.minimum(tl.cdiv(tiles, splits), chunk_tiles), LEAST)
    per = tl.cdiv(tiles, tl.cdiv(tiles, per))
    return low, high, per, tl.cdiv(tiles, per)


@triton.jit
def _attend_chunk(  # type: ignore[no-untyped-def]
    q, k, v, k_pages, v_pages, table, sinks, scale, softcap, reach,
    q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    row, position, first, last, is_last, head, with_sink,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LIMIT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    """Softmax and mix of a kv head's queries over the tiles first to last: [BLOCK_GROUP, BLOCK_VALUE], and lse.

    With APPEND the row's newest K and V come from `k` and `v`, not from its page; the chunk that ends the row
    writes them there, and nobody else looks at that place. With pages of 8 bits they are added behind the loop: to
    choose between them and each tile's would take longer than all that is saved by reading less.
    """
    BEHIND: tl.constexpr = APPEND and k_pages.dtype.element_ty == tl.float8e4nv
    end = position + 1
    pages = load_pages(table, first * BLOCK, end, PAGE, BLOCK)
    member = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    values = tl.arange(0, BLOCK_VALUE)
    query_head = head * GROUP + member
    query = q + row.to(tl.int64) * q_stride_token + query_head[:, None] * q_stride_head + dims[None, :]
    query = tl.load(query, mask=(member[:, None] < GROUP) & (dims[None, :] < DIM), other=0.0)
    query = packed_query(query, k_pages)
    scale = score_factor(scale, q, k_pages)

    if APPEND:
        new_k = k + row.to(tl.int64) * k_stride_token + head * k_stride_head + dims
        new_k = tl.load(new_k, mask=dims < DIM, other=0.0)
        new_v = v + row.to(tl.int64) * v_stride_token + head * v_stride_head + values
        new_v = tl.load(new_v, mask=values < VALUE_DIM, other=0.0)
        if is_last:
            append_row(new_k, k_pages, table, position, head, HEADS, PAGE, DIM, BLOCK_DIM)
            append_row(new_v, v_pages, table, position, head, HEADS, PAGE, VALUE_DIM, BLOCK_VALUE)

    peak = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
    for tile in range(first, last):
        start = tile * BLOCK
        place = start + tl.arange(0, BLOCK)
        seen = place < end
        if BEHIND:
            seen = place < position
        if LIMIT:
            seen = seen & (place >= first_seen(position, reach, LIMIT))
        key = tile_pointers(k_pages, pages, start, head, HEADS, PAGE, DIM, BLOCK, BLOCK_DIM)
        key = tl.load(key, mask=seen[:, None] & (dims[None, :] < DIM), other=0.0)
        key = unpacked(key, query)
        value = tile_pointers(v_pages, pages, start, head, HEADS, PAGE, VALUE_DIM, BLOCK, BLOCK_VALUE)
        value = tl.load(value, mask=seen[:, None] & (values[None, :] < VALUE_DIM), other=0.0)
        value = unpacked(value, query)
        if APPEND and not BEHIND:
            newest = (place == position)[:, None]
            key = tl.where(newest, new_k[None, :], key)
            value = tl.where(newest, new_v[None, :], value)
        # The next tile's page ids, a tile early: its K and V are requested as soon as a buffer is free.
        pages = load_pages(table, start + BLOCK, end, PAGE, BLOCK)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP:
            scores = soft_capped(scores, softcap)
        scores = tl.where(seen[None, :], scores * 1.4426950408889634, -float("inf"))
        # Every tile of a chunk has a visible position, so the peak is finite from the first tile on.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        if BEHIND:
            new_peak = tl.maximum(new_peak, -1e30)  # but one that holds the newest alone
        weights = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(weights, 1)
        mixed = mixed * rescale[:, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision="ieee")
        peak = new_peak
    if BEHIND:
        # As later steps will read them.
        new_k = stored(new_k, k_pages).to(tl.float32)
        new_v = stored(new_v, v_pages).to(tl.float32)
        score = tl.sum(query.to(tl.float32) * new_k[None, :], 1) * scale
        if SOFTCAP:
            score = soft_capped(score, softcap)
        score = tl.where(is_last, score * 1.4426950408889634, -float("inf"))
        new_peak = tl.maximum(peak, score)
        rescale = tl.exp2(peak - new_peak)
        weight = tl.exp2(score - new_peak)
        total = total * rescale + weight
        mixed = mixed * rescale[:, None] + weight[:, None] * new_v[None, :]
        peak = new_peak
    if SINKS:
        sink = tl.load(sinks + query_head, mask=(member < GROUP) & with_sink, other=-float("inf")).to(tl.float32)
        sink = sink * 1.4426950408889634
        new_peak = tl.maximum(peak, sink)
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.exp2(sink - new_peak)
        mixed = mixed * rescale[:, None]
        peak = new_peak
    return mixed / total[:, None], peak + tl.log2(total)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, k_pages, v_pages, table, sinks, scale, softcap, reach,
    q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    row, position, first, last, is_last, head, with_sink,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LIMIT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, APPEND: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """`_attend_chunk`, or with PAIRS `decode_pairs_kernels.attend_pairs`."""
    if PAIRS:
        return attend_pairs(
            q, k, v, k_pages, v_pages, table, sinks, scale, softcap, reach,
            q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
            row, position, first, last, is_last, head, with_sink,
            HEADS, GROUP, PAGE, DIM, VALUE_DIM, BLOCK, BLOCK_GROUP, BLOCK_DIM, BLOCK_VALUE,
            LIMIT, SOFTCAP, SINKS, APPEND,
        )  # fmt: skip
    else:
        return _attend_chunk(
            q, k, v, k_pages, v_pages, table, sinks, scale, softcap, reach,
            q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
            row, position, first, last, is_last, head, with_sink,
            HEADS, GROUP, PAGE, DIM, VALUE_DIM, BLOCK, BLOCK_GROUP, BLOCK_DIM, BLOCK_VALUE,
            LIMIT, SOFTCAP, SINKS, APPEND,
        )  # fmt: skip


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    target, line, mixed,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    member = tl.arange(0, BLOCK_GROUP)
    values = tl.arange(0, BLOCK_VALUE)
    mask = (member[:, None] < GROUP) & (values[None, :] < VALUE_DIM)
    rows = (line + member)[:, None] * VALUE_DIM
    tl.store(target + rows + values[None, :], mixed.to(target.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["reach", "splits", "lse_start"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions", "sinks"],
)
def single_kernel(  # type: ignore[no-untyped-def]
    q, k, v, k_pages, v_pages, block_table, slots, positions, sinks, partial, lse_start,
    scale, softcap, reach, splits, table_stride,
    q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LEAST: tl.constexpr, LIMIT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, APPEND: tl.constexpr,
    PAIRS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The only row: a program takes one kv head's chunk, or says that it had none (a log-sum of -inf)."""
    if OVERLAP:
        # Before anything is read or written, so that a kernel's end implies the end of all before it.
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS
    position = tl.load(positions).to(tl.int32)
    table = block_table + tl.load(slots).to(tl.int64) * table_stride
    low, high = _tiles(position, reach, BLOCK, LIMIT)
    per = tl.maximum(tl.cdiv(high - low, splits), LEAST)
    first = low + chunk * per
    line = (chunk * HEADS + head) * GROUP
    member = tl.arange(0, BLOCK_GROUP)
    if first < high:
        mixed, logsum = _attend(
            q, k, v, k_pages, v_pages, table, sinks, scale, softcap, reach,
            q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
            chunk * 0, position, first, tl.minimum(first + per, high), first + per >= high, head, chunk == 0,
            HEADS, GROUP, PAGE, DIM, VALUE_DIM, BLOCK, BLOCK_GROUP, BLOCK_DIM, BLOCK_VALUE,
            LIMIT, SOFTCAP, SINKS, APPEND, PAIRS,
        )  # fmt: skip
        _store(partial, line, mixed, GROUP, VALUE_DIM, BLOCK_GROUP, BLOCK_VALUE)
        tl.store(partial + lse_start + line + member, logsum, mask=member < GROUP)
    else:
        nothing = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
        tl.store(partial + lse_start + line + member, nothing, mask=member < GROUP)


@triton.jit(
    do_not_specialize=["reach", "tokens", "splits", "chunk_tiles", "row_chunks", "lse_start"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions", "sinks"],
)
def rows_kernel(  # type: ignore[no-untyped-def]
    q, k, v, k_pages, v_pages, block_table, slots, positions, sinks, out, partial, lse_start,
    scale, softcap, reach, tokens, splits, chunk_tiles, row_chunks, table_stride,
    q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LEAST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    LIMIT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, APPEND: tl.constexpr, PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Several rows: a program takes one kv head of every n-th chunk. Rows of one chunk are finished here."""
    if OVERLAP:
        gdc_wait()
    head = tl.program_id(0) % HEADS
    rows = tl.arange(0, BLOCK_ROWS)
    position = tl.load(positions + rows, mask=rows < tokens, other=0).to(tl.int32)
    _, _, _, chunks = _cut(position, reach, splits, chunk_tiles, BLOCK, LEAST, LIMIT)
    chunks = tl.where(rows < tokens, chunks, 0)
    ends = tl.cumsum(chunks, 0)
    for item in range(tl.program_id(0) // HEADS, tl.sum(chunks, 0), tl.num_programs(0) // HEADS):
        row = tl.sum((ends <= item).to(tl.int32), 0)
        chunk = item - tl.sum(tl.where(rows < row, chunks, 0), 0)
        place = tl.load(positions + row).to(tl.int32)
        table = block_table + tl.load(slots + row).to(tl.int64) * table_stride
        low_tile, high_tile, tiles, count = _cut(place, reach, splits, chunk_tiles, BLOCK, LEAST, LIMIT)
        first = low_tile + chunk * tiles
        mixed, logsum = _attend(
            q, k, v, k_pages, v_pages, table, sinks, scale, softcap, reach,
            q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
            row, place, first, tl.minimum(first + tiles, high_tile), first + tiles >= high_tile, head, chunk == 0,
            HEADS, GROUP, PAGE, DIM, VALUE_DIM, BLOCK, BLOCK_GROUP, BLOCK_DIM, BLOCK_VALUE,
            LIMIT, SOFTCAP, SINKS, APPEND, PAIRS,
        )  # fmt: skip
        if count == 1:
            _store(out, (row * HEADS + head) * GROUP, mixed, GROUP, VALUE_DIM, BLOCK_GROUP, BLOCK_VALUE)
        else:
            line = ((row * row_chunks + chunk) * HEADS + head) * GROUP
            member = tl.arange(0, BLOCK_GROUP)
            _store(partial, line, mixed, GROUP, VALUE_DIM, BLOCK_GROUP, BLOCK_VALUE)
            tl.store(partial + lse_start + line + member, logsum, mask=member < GROUP)


@triton.jit(
    do_not_specialize=["reach", "splits", "chunk_tiles", "row_chunks", "lse_start"],
    do_not_specialize_on_alignment=["positions"],
)
def combine_kernel(  # type: ignore[no-untyped-def]
    positions, out, partial, lse_start, reach, splits, chunk_tiles, row_chunks,
    QUERY_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LEAST: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    SINGLE: tl.constexpr, LIMIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_HEADS query heads of a row. SINGLE reads no position: its log-sums say which chunks are.

    The next kernel, a projection as a rule, may begin and ask for its weights. Not earlier: it would be in the way of
    the kernel that attends.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    chunks = row_chunks
    if not SINGLE:
        position = tl.load(positions + row).to(tl.int32)
        _, _, _, chunks = _cut(position, reach, splits, chunk_tiles, BLOCK, LEAST, LIMIT)
    if SINGLE or chunks > 1:
        head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        values = tl.arange(0, BLOCK_VALUE)
        inside = (head < QUERY_HEADS)[:, None] & (values < VALUE_DIM)[None, :]
        peak = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_HEADS], tl.float32)
        mixed = tl.zeros([BLOCK_HEADS, BLOCK_VALUE], tl.float32)
        for start in range(0, chunks, BLOCK_CHUNKS):
            chunk = start + tl.arange(0, BLOCK_CHUNKS)
            line = (row * row_chunks + chunk)[:, None] * QUERY_HEADS + head[None, :]
            mask = (chunk < chunks)[:, None] & (head < QUERY_HEADS)[None, :]
            part = tl.load(partial + lse_start + line, mask=mask, other=-float("inf"))
            piece = partial + line[:, :, None] * VALUE_DIM + values[None, None, :]
            piece = tl.load(piece, mask=mask[:, :, None] & inside[None, :, :], other=0.0)
            # The first chunk is never empty; heads beyond the last would be, hence the bound.
            new_peak = tl.maximum(tl.maximum(peak, tl.max(part, 0)), -1e30)
            weights = tl.exp2(part - new_peak[None, :])
            rescale = tl.exp2(peak - new_peak)
            total = total * rescale + tl.sum(weights, 0)
            # Where no chunk was, scratch holds anything.
            piece = tl.where(weights[:, :, None] > 0, piece, 0.0)
            mixed = mixed * rescale[:, None] + tl.sum(weights[:, :, None] * piece, 0)
            peak = new_peak
        target = out + (row * QUERY_HEADS + head)[:, None] * VALUE_DIM + values[None, :]
        tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
