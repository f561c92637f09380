"""Triton: a chunk of `kernels.attention.decode` over keys and values of 8 bits, for queries of 16.

Two dims are read as one number of 16 bits. Its halves go to two products, one over even dims and one over odd ones, so
that nothing has to be moved between them: the tensor cores' operands hold two neighbours in a register, of dims for
keys and of positions for values, and only numbers of 16 bits come from shared memory like that without being read one
by one (which took longer than all that reading half of the bytes saves).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridgen.kernels.attention.common import (
    as_pairs,
    first_seen,
    load_pages,
    packed_query,
    score_factor,
    soft_capped,
    stored,
    tile_pointers,
    unpacked_pairs,
)


@triton.jit
def append_row(  # type: ignore[no-untyped-def]
    new, pages, table, position, head,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Write a head's new row [BLOCK_DIM] to its page."""
    dims = tl.arange(0, BLOCK_DIM)
    page = tl.load(table + position // PAGE).to(tl.int64)
    target = ((page * HEADS + head) * PAGE + position % PAGE) * DIM + dims
    tl.store(pages + target, stored(new, pages), mask=dims < DIM)


@triton.jit
def attend_pairs(  # type: ignore[no-untyped-def]
    q, k, v, k_pages, v_pages, table, sinks, scale, softcap, reach,
    q_stride_token, q_stride_head, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    row, position, first, last, is_last, head, with_sink,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LIMIT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    """`decode_kernels._attend_chunk` over pages of 8 bits, for queries of 16: even dims and odd ones apart.

    With APPEND the chunk that ends the row writes its newest K and V first, and reads them with the others.
    """
    end = position + 1
    pages = load_pages(table, first * BLOCK, end, PAGE, BLOCK)
    member = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM // 2)
    values = tl.arange(0, BLOCK_VALUE // 2)
    key_pairs = as_pairs(k_pages)
    value_pairs = as_pairs(v_pages)
    query_head = head * GROUP + member
    query = q + row.to(tl.int64) * q_stride_token + query_head[:, None] * q_stride_head + 2 * dims[None, :]
    mask = (member[:, None] < GROUP) & (dims[None, :] < DIM // 2)
    query_even = packed_query(tl.load(query, mask=mask, other=0.0), k_pages)
    query_odd = packed_query(tl.load(query + 1, mask=mask, other=0.0), k_pages)
    scale = score_factor(scale, q, k_pages)
    if APPEND and is_last:
        every = tl.arange(0, BLOCK_DIM)
        new_k = tl.load(k + row.to(tl.int64) * k_stride_token + head * k_stride_head + every, mask=every < DIM)
        append_row(new_k, k_pages, table, position, head, HEADS, PAGE, DIM, BLOCK_DIM)
        every = tl.arange(0, BLOCK_VALUE)
        new_v = v + row.to(tl.int64) * v_stride_token + head * v_stride_head + every
        new_v = tl.load(new_v, mask=every < VALUE_DIM)
        append_row(new_v, v_pages, table, position, head, HEADS, PAGE, VALUE_DIM, BLOCK_VALUE)
        # Before the loop reads them as it does others.
        tl.debug_barrier()
    factor = scale * 1.4426950408889634

    peak = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed_even = tl.zeros([BLOCK_GROUP, BLOCK_VALUE // 2], tl.float32)
    mixed_odd = tl.zeros([BLOCK_GROUP, BLOCK_VALUE // 2], tl.float32)
    for tile in range(first, last):
        start = tile * BLOCK
        place = start + tl.arange(0, BLOCK)
        seen = place < end
        if LIMIT:
            seen = seen & (place >= first_seen(position, reach, LIMIT))
        key = tile_pointers(key_pairs, pages, start, head, HEADS, PAGE, DIM // 2, BLOCK, BLOCK_DIM // 2)
        key = tl.load(key, mask=seen[:, None] & (dims[None, :] < DIM // 2), other=0)
        value = tile_pointers(value_pairs, pages, start, head, HEADS, PAGE, VALUE_DIM // 2, BLOCK, BLOCK_VALUE // 2)
        value = tl.load(value, mask=seen[:, None] & (values[None, :] < VALUE_DIM // 2), other=0)
        # The next tile's page ids, a tile early: its K and V are requested as soon as a buffer is free.
        pages = load_pages(table, start + BLOCK, end, PAGE, BLOCK)
        key_even, key_odd = unpacked_pairs(tl.trans(key))
        scores = tl.dot(query_even, key_even)
        scores = tl.dot(query_odd, key_odd, scores)
        if SOFTCAP:
            scores = soft_capped(scores * scale, softcap) * 1.4426950408889634
        else:
            scores = scores * factor
        scores = tl.where(seen[None, :], scores, -float("inf"))
        # Every tile of a chunk has a visible position, so the peak is finite from the first tile on.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(weights, 1)
        weights = weights.to(tl.float16)
        value_even, value_odd = unpacked_pairs(value)
        mixed_even = tl.dot(weights, value_even, mixed_even * rescale[:, None])
        mixed_odd = tl.dot(weights, value_odd, mixed_odd * rescale[:, None])
        peak = new_peak
    if SINKS:
        sink = tl.load(sinks + query_head, mask=(member < GROUP) & with_sink, other=-float("inf")).to(tl.float32)
        sink = sink * 1.4426950408889634
        new_peak = tl.maximum(peak, sink)
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.exp2(sink - new_peak)
        mixed_even = mixed_even * rescale[:, None]
        mixed_odd = mixed_odd * rescale[:, None]
        peak = new_peak
    mixed = tl.reshape(tl.join(mixed_even, mixed_odd), [BLOCK_GROUP, BLOCK_VALUE])
    return mixed / total[:, None], peak + tl.log2(total)
