"""Triton kernel of `balanced`, which says how it divides the work."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.attention.common import (
    as_pairs,
    packed_query,
    score_factor,
    soft_capped,
    stored,
    unpacked,
    unpacked_pairs,
)
from hybridgen.kernels.attention.schedule_kernels import (
    SEVERAL,
    chunk_words,
    deal_words,
    mark_ends_row,
    mark_is_first,
    mark_left,
    mark_low,
    mark_valid,
    part_words,
    tile_words,
)


@triton.jit
def _load_query(  # type: ignore[no-untyped-def]
    q, pages, row, head, stride_token, stride_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """A kv head's queries of a row for keys in `pages`: every, or every second, dim, [BLOCK_GROUP, BLOCK_DIM / EVERY],
    and the dims behind those."""
    member = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM // EVERY) * EVERY
    query = q + row.to(tl.int64) * stride_token + (head * GROUP + member)[:, None] * stride_head + dims[None, :]
    mask = (member[:, None] < GROUP) & (dims[None, :] < DIM)
    first = packed_query(tl.load(query, mask=mask, other=0.0), pages)
    second = first
    if EVERY == 2:
        second = packed_query(tl.load(query + 1, mask=mask, other=0.0), pages)
    return first, second


@triton.jit
def _tile_pages(pages, tile, PAGE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a tile lies: one number of a BLOCK of positions, or one page for each position."""
    if BLOCK <= PAGE:
        return tl.load(pages + tile)
    else:
        return tl.load(pages + tile * (BLOCK // PAGE) + tl.arange(0, BLOCK) // PAGE)


@triton.jit
def _rows_of_tile(pages, head, HEADS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of [pages * HEADS * PAGE] rows of K or V: the first one of a tile in one piece, or all."""
    if BLOCK <= PAGE:
        parts: tl.constexpr = PAGE // BLOCK
        return ((pages // parts).to(tl.int64) * HEADS + head) * PAGE + (pages % parts) * BLOCK
    else:
        return (pages.to(tl.int64) * HEADS + head) * PAGE + tl.arange(0, BLOCK) % PAGE


@triton.jit
def _tile(base, rows, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers [BLOCK, BLOCK_DIM]."""
    dims = tl.arange(0, BLOCK_DIM)
    if BLOCK <= PAGE:
        return base + rows * DIM + (tl.arange(0, BLOCK)[:, None] * DIM + dims[None, :])
    else:
        return base + rows[:, None] * DIM + dims[None, :]


@triton.jit
def _store_new(  # type: ignore[no-untyped-def]
    new, target, rows, place,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Write a head's new row [BLOCK_DIM] to its place in the tile."""
    dims = tl.arange(0, BLOCK_DIM)
    if BLOCK <= PAGE:
        line = rows + place
    else:
        line = tl.sum(tl.where(tl.arange(0, BLOCK) == place, rows, 0), 0)
    tl.store(target + line * DIM + dims, stored(new, target), mask=dims < DIM)


@triton.jit(
    do_not_specialize=["lse_start", "tokens", "capacity", "most_chunks"],
    do_not_specialize_on_alignment=["sinks"],
)
def balanced_kernel(  # type: ignore[no-untyped-def]
    q, k, v, k_pages, v_pages, plan, sinks, out, partial,
    lse_start, scale, softcap, tokens, capacity, most_chunks,
    q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LIMIT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, APPEND: tl.constexpr, CARRY_QUERY: tl.constexpr,
    EVERY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: a part's chunks of one kv head. One loop over all their tiles, so that reading goes on across the ends
    of chunks.

    With APPEND the row's newest K and V come from `k` and `v`: the tile that holds their place is read without it,
    they are added when the row's last chunk ends, and are written there. EVERY 2, for pages of 8 bits and queries of
    16: even and odd dims apart, as `decode_pairs_kernels` says.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    scale = score_factor(scale, q, k_pages)
    head = tl.program_id(0) % HEADS
    own = tl.program_id(0) // HEADS
    parts = tl.num_programs(0) // HEADS
    tiles = tl.load(part_words(plan, tokens) + own)
    deal = deal_words(plan, tokens, parts)
    dealt = tl.load(deal + own)
    last_dealt = tl.load(deal + own + 1) - 1
    order = deal + parts + 1
    rows_of_tiles = tile_words(plan, tokens, parts, most_chunks)
    marks = rows_of_tiles + capacity
    lines = marks + capacity
    pages_of_tiles = lines + capacity
    member = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    values = tl.arange(0, BLOCK_VALUE)
    local = tl.arange(0, BLOCK)
    # Of tiles, in numbers of EVERY dims.
    KEYS: tl.constexpr = DIM // EVERY
    VALUES: tl.constexpr = VALUE_DIM // EVERY
    key_dims = tl.arange(0, BLOCK_DIM // EVERY)
    value_dims = tl.arange(0, BLOCK_VALUE // EVERY)
    if EVERY == 2:
        key_pages = as_pairs(k_pages)
        value_pages = as_pairs(v_pages)
    else:
        key_pages = k_pages
        value_pages = v_pages

    peak = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK_GROUP, BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_VALUE // EVERY], tl.float32)
    mixed_odd = mixed
    tile = tl.load(order + dealt, mask=tiles > 0, other=0) & (SEVERAL - 1)
    next_chunk = tl.load(order + dealt + 1, mask=dealt < last_dealt, other=0) & (SEVERAL - 1)
    row = tl.load(rows_of_tiles + tile)
    mark = tl.load(marks + tile)
    pages = _tile_pages(pages_of_tiles, tile, PAGE, BLOCK)
    if CARRY_QUERY:
        query, query_odd = _load_query(
            q, k_pages, row, head, q_stride_token, q_stride_head, GROUP, DIM, BLOCK_GROUP, BLOCK_DIM, EVERY
        )
    for _ in range(tiles):
        valid = mark_valid(mark)
        if APPEND:
            valid -= mark_ends_row(mark)
        seen = local < valid
        if LIMIT:
            seen = seen & (local >= mark_low(mark))
        if not CARRY_QUERY:
            query, query_odd = _load_query(
                q, k_pages, row, head, q_stride_token, q_stride_head, GROUP, DIM, BLOCK_GROUP, BLOCK_DIM, EVERY
            )
        place = _rows_of_tile(pages, head, HEADS, PAGE, BLOCK)
        key = _tile(key_pages, place, PAGE, KEYS, BLOCK, BLOCK_DIM // EVERY)
        key = tl.load(key, mask=seen[:, None] & (key_dims[None, :] < KEYS), other=0.0)
        value = _tile(value_pages, place, PAGE, VALUES, BLOCK, BLOCK_VALUE // EVERY)
        value = tl.load(value, mask=seen[:, None] & (value_dims[None, :] < VALUES), other=0.0)
        # The next tile's words, a tile early: its K and V are requested as soon as a buffer is free.
        left = mark_left(mark)
        next_tile = tl.where(left == 1, next_chunk, tile + 1)
        dealt += (left == 1).to(tl.int32)
        next_chunk = tl.load(order + dealt + 1, mask=dealt < last_dealt, other=0) & (SEVERAL - 1)
        next_row = tl.load(rows_of_tiles + next_tile)
        next_mark = tl.load(marks + next_tile)
        next_pages = _tile_pages(pages_of_tiles, next_tile, PAGE, BLOCK)
        if CARRY_QUERY:
            next_query, next_query_odd = _load_query(
                q, k_pages, next_row, head, q_stride_token, q_stride_head, GROUP, DIM, BLOCK_GROUP, BLOCK_DIM,
                EVERY,
            )  # fmt: skip

        if EVERY == 2:
            key_even, key_odd = unpacked_pairs(tl.trans(key))
            scores = tl.dot(query, key_even)
            scores = tl.dot(query_odd, key_odd, scores) * scale
        else:
            scores = tl.dot(query, tl.trans(unpacked(key, query)), input_precision="ieee") * scale
        if SOFTCAP:
            scores = soft_capped(scores, softcap)
        scores = tl.where(seen[None, :], scores * 1.4426950408889634, -float("inf"))
        is_first = mark_is_first(mark) == 1
        peak = tl.where(is_first, -float("inf"), peak)
        # A tile that holds only the newest position is empty: the bound keeps the peak finite.
        new_peak = tl.maximum(tl.maximum(peak, tl.max(scores, 1)), -1e30)
        weights = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        # Summed over positions when the chunk ends, not in each tile.
        sums = tl.where(is_first, 0.0, sums * rescale[:, None]) + weights
        mixed = tl.where(is_first, 0.0, mixed * rescale[:, None])
        if EVERY == 2:
            value_even, value_odd = unpacked_pairs(value)
            mixed_odd = tl.where(is_first, 0.0, mixed_odd * rescale[:, None])
            mixed = tl.dot(weights.to(tl.float16), value_even, mixed)
            mixed_odd = tl.dot(weights.to(tl.float16), value_odd, mixed_odd)
        else:
            value = unpacked(value, query)
            mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision="ieee")
        peak = new_peak
        if left == 1:
            line = tl.load(lines + tile)
            is_last_chunk = (line & 2) != 0
            is_only_chunk = (line & 3) == 3
            total = tl.sum(sums, 1)
            chunk_peak = peak
            if EVERY == 2:
                chunk_mixed = tl.reshape(tl.join(mixed, mixed_odd), [BLOCK_GROUP, BLOCK_VALUE])
            else:
                chunk_mixed = mixed
            if APPEND:  # noqa: SIM102  # known when it is compiled; the other is not
                if is_last_chunk:
                    new_k = k + row.to(tl.int64) * k_stride_token + head * k_stride_head + dims
                    new_k = tl.load(new_k, mask=dims < DIM, other=0.0)
                    new_v = v + row.to(tl.int64) * v_stride_token + head * v_stride_head + values
                    new_v = tl.load(new_v, mask=values < VALUE_DIM, other=0.0)
                    _store_new(new_k, k_pages, place, valid, PAGE, DIM, BLOCK, BLOCK_DIM)
                    _store_new(new_v, v_pages, place, valid, PAGE, VALUE_DIM, BLOCK, BLOCK_VALUE)
                    new_k = stored(new_k, k_pages).to(tl.float32)
                    new_v = stored(new_v, v_pages).to(tl.float32)
                    if EVERY == 2:
                        whole_query = tl.reshape(tl.join(query, query_odd), [BLOCK_GROUP, BLOCK_DIM])
                    else:
                        whole_query = query
                    score = tl.sum(whole_query.to(tl.float32) * new_k[None, :], 1) * scale
                    if SOFTCAP:
                        score = soft_capped(score, softcap)
                    score = score * 1.4426950408889634
                    new_peak = tl.maximum(chunk_peak, score)
                    rescale = tl.exp2(chunk_peak - new_peak)
                    weight = tl.exp2(score - new_peak)
                    total = total * rescale + weight
                    chunk_mixed = chunk_mixed * rescale[:, None] + weight[:, None] * new_v[None, :]
                    chunk_peak = new_peak
            if SINKS:
                with_sink = (member < GROUP) & ((line & 1) != 0)
                sink = tl.load(sinks + head * GROUP + member, mask=with_sink, other=-float("inf")).to(tl.float32)
                sink = sink * 1.4426950408889634
                new_peak = tl.maximum(chunk_peak, sink)
                rescale = tl.exp2(chunk_peak - new_peak)
                total = total * rescale + tl.exp2(sink - new_peak)
                chunk_mixed = chunk_mixed * rescale[:, None]
                chunk_peak = new_peak
            chunk_mixed = chunk_mixed / total[:, None]
            mask = (member < GROUP)[:, None] & (values < VALUE_DIM)[None, :]
            if is_only_chunk:
                target = ((row * HEADS + head) * GROUP + member)[:, None] * VALUE_DIM + values[None, :]
                tl.store(out + target, chunk_mixed.to(out.dtype.element_ty), mask=mask)
            else:
                part = ((line >> 2) * HEADS + head) * GROUP + member
                tl.store(partial + part[:, None] * VALUE_DIM + values[None, :], chunk_mixed, mask=mask)
                tl.store(partial + lse_start + part, chunk_peak + tl.log2(total), mask=member < GROUP)
        tile = next_tile
        row = next_row
        mark = next_mark
        pages = next_pages
        if CARRY_QUERY:
            query = next_query
            query_odd = next_query_odd


@triton.jit(do_not_specialize=["lse_start"])
def gather_kernel(  # type: ignore[no-untyped-def]
    plan, out, partial, lse_start,
    HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: one kv head's queries of a row, whose chunks it combines in their order where there are several."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(chunk_words(plan) + row)
    count = tl.load(chunk_words(plan) + row + 1) - first
    if count > 1:
        member = tl.arange(0, BLOCK_MEMBERS)
        values = tl.arange(0, BLOCK_VALUE)
        inside = (member < GROUP)[:, None] & (values < VALUE_DIM)[None, :]
        peak = tl.full([BLOCK_MEMBERS], -1e30, tl.float32)
        total = tl.zeros([BLOCK_MEMBERS], tl.float32)
        mixed = tl.zeros([BLOCK_MEMBERS, BLOCK_VALUE], tl.float32)
        for start in range(0, count, BLOCK_CHUNKS):
            chunk = start + tl.arange(0, BLOCK_CHUNKS)
            line = ((first + chunk)[:, None] * HEADS + head) * GROUP + member[None, :]
            mask = (chunk < count)[:, None] & (member < GROUP)[None, :]
            part = tl.load(partial + lse_start + line, mask=mask, other=-float("inf"))
            piece = partial + line[:, :, None] * VALUE_DIM + values[None, None, :]
            piece = tl.load(piece, mask=mask[:, :, None] & inside[None, :, :], other=0.0)
            new_peak = tl.maximum(peak, tl.max(part, 0))
            weights = tl.exp2(part - new_peak[None, :])
            rescale = tl.exp2(peak - new_peak)
            total = total * rescale + tl.sum(weights, 0)
            mixed = mixed * rescale[:, None] + tl.sum(weights[:, :, None] * piece, 0)
            peak = new_peak
        target = out + ((row * HEADS + head) * GROUP + member)[:, None] * VALUE_DIM + values[None, :]
        # A row always has a chunk with a position; heads beyond the last have none.
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(target, mixed.to(out.dtype.element_ty), mask=inside)
