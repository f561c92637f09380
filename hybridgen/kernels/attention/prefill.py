"""Triton: causal attention of packed sequences over pages. Shapes: `hybridgen.kernels.attention.ops`.

FlashAttention-2 (arXiv:2307.08691) over pages: a tile of work is one kv head and BLOCK_ROWS rows of one sequence, where
a row is a token and one of the kv head's query heads, token first. So any ratio of heads fills tiles, and
K and V are read once for the whole group. Programs find their sequence in `query_starts` on the device. How many of a
call's sequences have tokens is not known when it is launched, so a fixed number of programs shares the work.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridgen.device.launcher import Launcher, device_of, power_of_two
from hybridgen.kernels.attention.common import (
    Heads,
    check_layout,
    first_seen,
    limit_of,
    load_pages,
    packed_query,
    score_factor,
    soft_capped,
    tile_pointers,
    unpacked,
)


@triton.jit
def _attend_tiles(  # type: ignore[no-untyped-def]
    query, peak, total, mixed, k_pages, v_pages, table, first, last, end, place_of_row,
    scale, softcap, reach, head,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    MASK: tl.constexpr, LIMIT: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One pass over the tiles first to last; without MASK every row sees all of them."""
    dims = tl.arange(0, BLOCK_DIM)
    values = tl.arange(0, BLOCK_VALUE)
    pages = load_pages(table, first * BLOCK, end, PAGE, BLOCK)
    for tile in range(first, last):
        start = tile * BLOCK
        place = start + tl.arange(0, BLOCK)
        key = tile_pointers(k_pages, pages, start, head, HEADS, PAGE, DIM, BLOCK, BLOCK_DIM)
        value = tile_pointers(v_pages, pages, start, head, HEADS, PAGE, VALUE_DIM, BLOCK, BLOCK_VALUE)
        if MASK:
            written = place < end
            if LIMIT:
                # Pages that no row of the tile sees may be gone already.
                written = written & (place >= first_seen(tl.min(place_of_row, 0), reach, LIMIT))
            key = tl.load(key, mask=written[:, None] & (dims[None, :] < DIM), other=0.0)
            value = tl.load(value, mask=written[:, None] & (values[None, :] < VALUE_DIM), other=0.0)
        else:
            if BLOCK_DIM == DIM:
                key = tl.load(key)
            else:
                key = tl.load(key, mask=dims[None, :] < DIM, other=0.0)
            if BLOCK_VALUE == VALUE_DIM:
                value = tl.load(value)
            else:
                value = tl.load(value, mask=values[None, :] < VALUE_DIM, other=0.0)
        key = unpacked(key, query)
        value = unpacked(value, query)
        pages = load_pages(table, start + BLOCK, end, PAGE, BLOCK)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        factor = scale * 1.4426950408889634
        if SOFTCAP:
            scores = soft_capped(scores * scale, softcap)
            factor = 1.4426950408889634
        if MASK:
            seen = place[None, :] <= place_of_row[:, None]
            if LIMIT:
                seen = seen & (place[None, :] >= first_seen(place_of_row, reach, LIMIT)[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        shift = new_peak
        if MASK and LIMIT:
            # A row's window or chunk may begin tiles after the first row's: until then its peak is -inf.
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(scores * factor - shift[:, None])
        rescale = tl.exp2(peak - shift)
        total = total * rescale + tl.sum(weights, 1)
        mixed = mixed * rescale[:, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision="ieee")
        peak = new_peak
    return peak, total, mixed


@triton.jit(
    do_not_specialize=["reach", "sequences"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions", "query_starts", "sinks"],
)
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q, k_pages, v_pages, block_table, slots, positions, query_starts, sinks, out,
    scale, softcap, reach, sequences, table_stride, q_stride_token, q_stride_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr, LIMIT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    factor = score_factor(scale, q, k_pages)
    # Sequence i owns the tiles from starts[i] * GROUP // BLOCK_ROWS + i on: never fewer than it needs, so no sum
    # over the sequences before it (https://github.com/vllm-project/vllm, triton_unified_attention).
    index = tl.arange(0, BLOCK_SEQUENCES)
    total_tokens = tl.load(query_starts + sequences)
    starts = tl.load(query_starts + index, mask=index < sequences, other=2147483647)
    # Those without tokens are the last ones.
    tiles = total_tokens * GROUP // BLOCK_ROWS + tl.sum((starts < total_tokens).to(tl.int32), 0)
    for item in range(tl.program_id(0), tiles * HEADS, tl.num_programs(0)):
        head = item % HEADS
        # Late tiles have the longest contexts: they start first.
        tile = tiles - 1 - item // HEADS
        owned = (starts < total_tokens) & (starts * GROUP // BLOCK_ROWS + index <= tile)
        sequence = tl.sum(owned.to(tl.int32), 0) - 1
        begin = tl.load(query_starts + sequence)
        tokens = tl.load(query_starts + sequence + 1) - begin
        row_start = (tile - (begin * GROUP // BLOCK_ROWS + sequence)) * BLOCK_ROWS
        if row_start < tokens * GROUP:
            rows = row_start + tl.arange(0, BLOCK_ROWS)
            token = rows // GROUP
            query_head = head * GROUP + rows % GROUP
            dims = tl.arange(0, BLOCK_DIM)
            values = tl.arange(0, BLOCK_VALUE)
            line = (begin + token).to(tl.int64)
            query = q + (line * q_stride_token + query_head * q_stride_head)[:, None] + dims[None, :]
            query = tl.load(query, mask=(token[:, None] < tokens) & (dims[None, :] < DIM), other=0.0)
            query = packed_query(query, k_pages)

            first_place = tl.load(positions + begin).to(tl.int32)
            table = block_table + tl.load(slots + begin).to(tl.int64) * table_stride
            place_of_row = first_place + token
            low_place = first_place + row_start // GROUP
            end = first_place + tl.minimum((row_start + BLOCK_ROWS - 1) // GROUP, tokens - 1) + 1
            # Tiles from free to middle are seen whole by every row; with a window or chunks, some before them in part.
            middle = (low_place + 1) // BLOCK
            free = 0
            if LIMIT:
                first = first_seen(low_place, reach, LIMIT) // BLOCK
                free = tl.minimum(tl.cdiv(first_seen(end - 1, reach, LIMIT), BLOCK), tl.cdiv(end, BLOCK))
                middle = tl.maximum(middle, free)

            peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            if SINKS:
                peak = tl.load(sinks + query_head).to(tl.float32) * 1.4426950408889634
                total = total + 1.0
            mixed = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
            if LIMIT:
                peak, total, mixed = _attend_tiles(
                    query, peak, total, mixed, k_pages, v_pages, table, first, free, end, place_of_row,
                    factor, softcap, reach, head, HEADS, PAGE, DIM, VALUE_DIM, BLOCK, BLOCK_DIM, BLOCK_VALUE,
                    True, LIMIT, SOFTCAP,
                )  # fmt: skip
            peak, total, mixed = _attend_tiles(
                query, peak, total, mixed, k_pages, v_pages, table, free, middle, end, place_of_row,
                factor, softcap, reach, head, HEADS, PAGE, DIM, VALUE_DIM, BLOCK, BLOCK_DIM, BLOCK_VALUE,
                False, LIMIT, SOFTCAP,
            )  # fmt: skip
            peak, total, mixed = _attend_tiles(
                query, peak, total, mixed, k_pages, v_pages, table, middle, tl.cdiv(end, BLOCK), end, place_of_row,
                factor, softcap, reach, head, HEADS, PAGE, DIM, VALUE_DIM, BLOCK, BLOCK_DIM, BLOCK_VALUE,
                True, LIMIT, SOFTCAP,
            )  # fmt: skip
            target = out + (line * (HEADS * GROUP) + query_head)[:, None] * VALUE_DIM + values[None, :]
            mask = (token[:, None] < tokens) & (values[None, :] < VALUE_DIM)
            tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)


class Tuning(NamedTuple):
    """Launch options for a head shape."""

    rows: int
    """Rows (tokens x heads of a group) of a program."""
    block: int
    """Positions a tile."""
    warps: int
    stages: int
    """K/V tiles in shared memory."""
    programs: int = 4
    """Programs a multiprocessor at most, more than are resident: each takes every n-th of the call's pieces of work."""
    registers: int = 0
    """Registers a thread at most; 0: no limit."""


@functools.cache
def tuning(heads: Heads, shared_memory: int, load: int) -> Tuning:
    """Measured on an H200 (`benchmarks/attention.py`); other devices get fewer stages where memory is short.

    Args:
        load: 0, 1 or 2: how well the call's rows fill the device, see `_load`.
    """
    if heads.bytes == 4:
        return Tuning(rows=32, block=32, warps=4, stages=1)
    wide = max(power_of_two(heads.dim), power_of_two(heads.value_dim))
    rows, block, warps, stages, registers = 64, 64, 4, 2, 0
    if wide > 128:
        block = 32
    elif load == 2 and wide == 128 and heads.queries >= 4 * heads.kv:
        stages = 3  # 16 and more tokens are rows enough, and two programs of them fit on a multiprocessor
    elif load == 2:
        rows, warps, stages, registers = 128, 8, 3, 0 if wide == 128 else 128
    elif load == 1 and wide == 128:
        stages = 3
    fixed = rows * wide * max(2, heads.bytes)
    while stages > 1 and fixed + stages * block * 2 * wide * heads.bytes > shared_memory - 8 * 2**10:
        stages -= 1
    return Tuning(rows, block, warps, stages, 8 if rows == 128 else 4, registers)


def _load(tokens: int, heads: Heads, processors: int) -> int:
    """0: few rows a multiprocessor; 1: some; 2: enough for large tiles."""
    rows = tokens * heads.queries // processors
    large = 480 if heads.dim <= 64 else 960
    return 2 if rows >= large else int(rows >= 120)


_launchers: dict[Hashable, Launcher] = {}


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    tune: Tuning | None = None,
) -> Tensor:
    """See `attention.prefill_attention`; `tune` replaces the measured launch options."""
    q, heads = check_layout(q, k_pages, v_pages, scale)
    tokens = q.shape[0]
    out = torch.empty((tokens, heads.queries, heads.value_dim), dtype=q.dtype, device=q.device)
    sequences = query_starts.shape[0] - 1
    if tokens == 0 or sequences == 0:
        return out
    limit, reach = limit_of(window, chunk)
    device = device_of(q)
    if tune is None:
        tune = tuning(heads, device.shared_memory, _load(tokens, heads, device.processors))
    tiles = tokens * heads.queries // heads.kv // tune.rows + sequences
    strides = block_table.stride(0), q.stride(0), q.stride(1)

    def constants() -> dict[str, Any]:
        return {
            "HEADS": heads.kv,
            "GROUP": heads.queries // heads.kv,
            "PAGE": heads.page_size,
            "DIM": heads.dim,
            "VALUE_DIM": heads.value_dim,
            "BLOCK_ROWS": tune.rows,
            "BLOCK": tune.block,
            "BLOCK_DIM": power_of_two(heads.dim),
            "BLOCK_VALUE": power_of_two(heads.value_dim),
            "BLOCK_SEQUENCES": triton.next_power_of_2(sequences),
            "LIMIT": limit,
            "SOFTCAP": softcap > 0,
            "SINKS": sinks is not None,
            "num_warps": tune.warps,
            "num_stages": tune.stages,
            **({"maxnreg": tune.registers} if tune.registers else {}),
        }

    inputs = q, k_pages, v_pages, block_table, slots, positions, query_starts, q if sinks is None else sinks
    dtypes = q.dtype, k_pages.dtype, slots.dtype, positions.dtype, None if sinks is None else sinks.dtype
    key = (
        dtypes,
        heads,
        tune,
        triton.next_power_of_2(sequences),
        limit,
        softcap > 0,
        sinks is not None,
        device,
        strides,
    )
    args = *inputs, out, scale, softcap, reach, sequences, *strides
    launcher = _launchers.get(key)
    if launcher is None:
        launcher = _launchers[key] = Launcher(_prefill_kernel, constants())
    launcher((min(tiles * heads.kv, device.processors * tune.programs), 1, 1), args)
    return out
