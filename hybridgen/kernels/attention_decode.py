"""Triton: paged attention of one query token per sequence. Shapes: `hybridgen.kernels.attention`.

A row's context is cut into chunks of tiles; a program attends with all query heads of one kv head to one chunk,
and a second kernel combines the chunks of a row (flash-decoding). The cut depends on the row's own length and on
shapes. Programs are as many as the device holds at once: with one row each has one chunk or none, with more rows
each walks a list of chunks that it derives from all positions, so that a long row among short ones is spread too.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.attention_common import (
    LOG2E,
    Device,
    Heads,
    check_layout,
    device_of,
    load_pages,
    power_of_two,
    soft_capped,
    tile_pointers,
)

_CHUNK_TOKENS = 1024
"""With several rows, no chunk is longer than this unless the scratch would have more than _CHUNKS chunks."""
_CHUNKS = 2048
_LEAST_TOKENS = 64
"""No chunk is shorter than this, but a row's last one."""


@triton.jit
def _tiles(position, window, BLOCK: tl.constexpr, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first tile that a row sees, and the tile after its last."""
    end = position + 1
    low = end * 0
    if WINDOW:
        low = tl.maximum(end - window, 0) // BLOCK
    return low, tl.cdiv(end, BLOCK)


@triton.jit
def _cut(  # type: ignore[no-untyped-def]
    position, window, splits, chunk_tiles, BLOCK: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """A row's first tile, tile after the last, tiles a chunk, and chunks."""
    low, high = _tiles(position, window, BLOCK, WINDOW)
    tiles = high - low
    per = tl.maximum(tl.minimum(tl.cdiv(tiles, splits), chunk_tiles), LEAST)
    per = tl.cdiv(tiles, tl.cdiv(tiles, per))
    return low, high, per, tl.cdiv(tiles, per)


@triton.jit
def _attend_chunk(  # type: ignore[no-untyped-def]
    q, k_pages, v_pages, table, sinks, scale, softcap, window,
    q_stride_token, q_stride_head, row, position, first, last, head, with_sink,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Softmax and mix of a kv head's queries over the tiles first to last: [BLOCK_GROUP, BLOCK_VALUE], and lse."""
    end = position + 1
    pages = load_pages(table, first * BLOCK, end, PAGE, BLOCK)
    member = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    values = tl.arange(0, BLOCK_VALUE)
    query_head = head * GROUP + member
    query = q + row.to(tl.int64) * q_stride_token + query_head[:, None] * q_stride_head + dims[None, :]
    query = tl.load(query, mask=(member[:, None] < GROUP) & (dims[None, :] < DIM), other=0.0)

    peak = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
    for tile in range(first, last):
        start = tile * BLOCK
        place = start + tl.arange(0, BLOCK)
        seen = place < end
        if WINDOW:
            seen = seen & (place >= end - window)
        key = tile_pointers(k_pages, pages, start, head, HEADS, PAGE, DIM, BLOCK, BLOCK_DIM)
        key = tl.load(key, mask=seen[:, None] & (dims[None, :] < DIM), other=0.0)
        value = tile_pointers(v_pages, pages, start, head, HEADS, PAGE, VALUE_DIM, BLOCK, BLOCK_VALUE)
        value = tl.load(value, mask=seen[:, None] & (values[None, :] < VALUE_DIM), other=0.0)
        # The next tile's page ids, a tile early: its K and V are requested as soon as a buffer is free.
        pages = load_pages(table, start + BLOCK, end, PAGE, BLOCK)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP:
            scores = soft_capped(scores, softcap)
        scores = tl.where(seen[None, :], scores * 1.4426950408889634, -float("inf"))
        # Every tile of a chunk has a visible position, so the peak is finite from the first tile on.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(weights, 1)
        mixed = mixed * rescale[:, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision="ieee")
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
def _store(  # type: ignore[no-untyped-def]
    target, line, mixed, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_VALUE: tl.constexpr
):  # fmt: skip
    member = tl.arange(0, BLOCK_GROUP)
    values = tl.arange(0, BLOCK_VALUE)
    mask = (member[:, None] < GROUP) & (values[None, :] < VALUE_DIM)
    rows = (line + member)[:, None] * VALUE_DIM
    tl.store(target + rows + values[None, :], mixed.to(target.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["window", "splits"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions", "sinks"],
)
def _single_kernel(  # type: ignore[no-untyped-def]
    q, k_pages, v_pages, block_table, slots, positions, sinks, partial, lse,
    scale, softcap, window, splits, table_stride, q_stride_token, q_stride_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LEAST: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, OVERLAP: tl.constexpr,
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
    low, high = _tiles(position, window, BLOCK, WINDOW)
    per = tl.maximum(tl.cdiv(high - low, splits), LEAST)
    first = low + chunk * per
    line = (chunk * HEADS + head) * GROUP
    member = tl.arange(0, BLOCK_GROUP)
    if first < high:
        mixed, logsum = _attend_chunk(
            q, k_pages, v_pages, table, sinks, scale, softcap, window, q_stride_token, q_stride_head,
            chunk * 0, position, first, tl.minimum(first + per, high), head, chunk == 0,
            HEADS, GROUP, PAGE, DIM, VALUE_DIM, BLOCK, BLOCK_GROUP, BLOCK_DIM, BLOCK_VALUE, WINDOW, SOFTCAP, SINKS,
        )  # fmt: skip
        _store(partial, line, mixed, GROUP, VALUE_DIM, BLOCK_GROUP, BLOCK_VALUE)
        tl.store(lse + line + member, logsum, mask=member < GROUP)
    else:
        tl.store(lse + line + member, tl.full([BLOCK_GROUP], -float("inf"), tl.float32), mask=member < GROUP)


@triton.jit(
    do_not_specialize=["window", "tokens", "splits", "chunk_tiles", "row_chunks"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions", "sinks"],
)
def _rows_kernel(  # type: ignore[no-untyped-def]
    q, k_pages, v_pages, block_table, slots, positions, sinks, out, partial, lse,
    scale, softcap, window, tokens, splits, chunk_tiles, row_chunks, table_stride, q_stride_token, q_stride_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LEAST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Several rows: a program takes one kv head of every n-th chunk. Rows of one chunk are finished here."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0) % HEADS
    rows = tl.arange(0, BLOCK_ROWS)
    position = tl.load(positions + rows, mask=rows < tokens, other=0).to(tl.int32)
    low, high, per, chunks = _cut(position, window, splits, chunk_tiles, BLOCK, LEAST, WINDOW)
    chunks = tl.where(rows < tokens, chunks, 0)
    ends = tl.cumsum(chunks, 0)
    for item in range(tl.program_id(0) // HEADS, tl.sum(chunks, 0), tl.num_programs(0) // HEADS):
        row = tl.sum((ends <= item).to(tl.int32), 0)
        chunk = item - tl.sum(tl.where(rows < row, chunks, 0), 0)
        place = tl.load(positions + row).to(tl.int32)
        table = block_table + tl.load(slots + row).to(tl.int64) * table_stride
        low_tile, high_tile, tiles, count = _cut(place, window, splits, chunk_tiles, BLOCK, LEAST, WINDOW)
        first = low_tile + chunk * tiles
        mixed, logsum = _attend_chunk(
            q, k_pages, v_pages, table, sinks, scale, softcap, window, q_stride_token, q_stride_head,
            row, place, first, tl.minimum(first + tiles, high_tile), head, chunk == 0,
            HEADS, GROUP, PAGE, DIM, VALUE_DIM, BLOCK, BLOCK_GROUP, BLOCK_DIM, BLOCK_VALUE, WINDOW, SOFTCAP, SINKS,
        )  # fmt: skip
        if count == 1:
            _store(out, (row * HEADS + head) * GROUP, mixed, GROUP, VALUE_DIM, BLOCK_GROUP, BLOCK_VALUE)
        else:
            line = ((row * row_chunks + chunk) * HEADS + head) * GROUP
            member = tl.arange(0, BLOCK_GROUP)
            _store(partial, line, mixed, GROUP, VALUE_DIM, BLOCK_GROUP, BLOCK_VALUE)
            tl.store(lse + line + member, logsum, mask=member < GROUP)


@triton.jit(
    do_not_specialize=["window", "splits", "chunk_tiles", "row_chunks"],
    do_not_specialize_on_alignment=["positions"],
)
def _combine_kernel(  # type: ignore[no-untyped-def]
    positions, out, partial, lse, window, splits, chunk_tiles, row_chunks,
    QUERY_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    LEAST: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    SINGLE: tl.constexpr, WINDOW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_HEADS query heads of a row. SINGLE reads no position: its log-sums say which chunks are."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    chunks = row_chunks
    if not SINGLE:
        position = tl.load(positions + row).to(tl.int32)
        low, high, per, chunks = _cut(position, window, splits, chunk_tiles, BLOCK, LEAST, WINDOW)
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
            part = tl.load(lse + line, mask=mask, other=-float("inf"))
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


class Tuning(NamedTuple):
    """Launch options of the chunk kernel for a head shape."""

    block: int
    """Positions a tile."""
    warps: int
    stages: int
    """K/V tiles in shared memory."""
    programs: int
    """Programs a multiprocessor, with several rows and with one."""
    programs_single: int


@functools.cache
def tuning(heads: Heads, shared_memory: int) -> Tuning:
    """Measured on an H200 (`benchmarks/attention.py`); other devices get fewer stages where memory is short."""
    if heads.bytes == 4:
        return Tuning(block=32, warps=4, stages=1, programs=2, programs_single=2)
    wide = max(power_of_two(heads.dim), power_of_two(heads.value_dim))
    block = 64 if wide <= 128 else 32
    tile_bytes = block * 2 * wide * heads.bytes
    stages = 3
    while stages > 1 and stages * tile_bytes > shared_memory - 16 * 2**10:
        stages -= 1
    return Tuning(block=block, warps=4, stages=stages, programs=4 if wide <= 64 else 2, programs_single=2)


class Plan(NamedTuple):
    """How the rows of a call are cut, from shapes alone."""

    splits: int
    """Chunks of a row, as long as chunks stay below `chunk_tiles`."""
    chunk_tiles: int
    """Tiles of a chunk at most."""
    row_chunks: int
    """Chunks that a row of any length can have."""
    programs: int


@functools.lru_cache(maxsize=4096)
def plan(tokens: int, kv_heads: int, max_tiles: int, processors: int, tune: Tuning) -> Plan:
    """The cut for `tokens` rows of up to `max_tiles` tiles."""
    if tokens == 1:
        splits = min(max_tiles, max(1, processors * tune.programs_single // kv_heads))
        return Plan(splits, max_tiles, splits, splits * kv_heads)
    resident = max(1, processors * tune.programs // kv_heads)
    splits = max(1, resident // tokens)
    chunk_tiles = max(_CHUNK_TOKENS // tune.block, triton.cdiv(tokens * max_tiles, _CHUNKS))
    row_chunks = min(max_tiles, max(splits, triton.cdiv(max_tiles, chunk_tiles)))
    return Plan(splits, chunk_tiles, row_chunks, min(resident, tokens * row_chunks) * kv_heads)


def _row_block(tokens: int) -> int:
    """Rows that the kernel is compiled for: few variants, whatever the batch."""
    block = 1 if tokens == 1 else 16
    while block < tokens:
        block *= 4
    return block


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    tune: Tuning | None = None,
) -> Tensor:
    """See `attention.decode_attention`; `tune` replaces the measured launch options."""
    q, heads = check_layout(q, k_pages, v_pages, scale)
    tokens = q.shape[0]
    out = torch.empty((tokens, heads.queries, heads.value_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    device = device_of(q)
    tune = tune or tuning(heads, device.shared_memory)
    return _launch(q, k_pages, v_pages, block_table, slots, positions, scale, window, softcap, sinks, out, heads, device, tune)


def _launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    out: Tensor,
    heads: Heads,
    device: Device,
    tune: Tuning,
) -> Tensor:
    tokens = q.shape[0]
    max_tiles = triton.cdiv(block_table.shape[1] * heads.page_size, tune.block)
    if window > 0:
        max_tiles = min(max_tiles, window // tune.block + 2)
    cut = plan(tokens, heads.kv, max_tiles, device.processors, tune)
    scratch = tokens * cut.row_chunks * heads.queries
    partial = torch.empty((scratch, heads.value_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((scratch,), dtype=torch.float32, device=q.device)
    options = {"launch_pdl": True} if device.overlap else {}
    constants = {
        "VALUE_DIM": heads.value_dim, "BLOCK": tune.block, "BLOCK_VALUE": power_of_two(heads.value_dim),
        "LEAST": max(1, _LEAST_TOKENS // tune.block), "WINDOW": window > 0, "OVERLAP": device.overlap,
    }  # fmt: skip
    shape = {
        "HEADS": heads.kv, "GROUP": heads.queries // heads.kv, "PAGE": heads.page_size, "DIM": heads.dim,
        "BLOCK_GROUP": power_of_two(heads.queries // heads.kv), "BLOCK_DIM": power_of_two(heads.dim),
        "SOFTCAP": softcap > 0, "SINKS": sinks is not None,
        "num_warps": tune.warps, "num_stages": tune.stages,
    }  # fmt: skip
    inputs = q, k_pages, v_pages, block_table, slots, positions, q if sinks is None else sinks
    strides = block_table.stride(0), q.stride(0), q.stride(1)
    if tokens == 1:
        _single_kernel[(cut.programs,)](
            *inputs, partial, lse, scale, softcap, window, cut.splits, *strides, **shape, **constants, **options
        )
    else:
        _rows_kernel[(cut.programs,)](
            *inputs, out, partial, lse, scale, softcap, window, tokens, *cut[:3], *strides,
            BLOCK_ROWS=_row_block(tokens), **shape, **constants, **options,
        )  # fmt: skip
        if cut.row_chunks == 1:
            return out
    block_heads, block_chunks = _combine_block(tokens, cut.row_chunks, heads)
    _combine_kernel[(tokens, triton.cdiv(heads.queries, block_heads))](
        positions, out, partial, lse, window, *cut[:3], QUERY_HEADS=heads.queries,
        BLOCK_CHUNKS=block_chunks, BLOCK_HEADS=block_heads, SINGLE=tokens == 1,
        num_warps=4, **constants, **options,
    )  # fmt: skip
    return out


def _combine_block(tokens: int, row_chunks: int, heads: Heads) -> tuple[int, int]:
    """Query heads and chunks that a combining program holds at once.

    One row: a head a program and all its chunks, for the shortest time. Rows: few programs, since most of them
    may have nothing to do.
    """
    wide = power_of_two(heads.value_dim)
    if tokens == 1:
        return 1, min(triton.next_power_of_2(row_chunks), 8192 // wide)
    return min(triton.next_power_of_2(heads.queries), 512 // wide), 8
