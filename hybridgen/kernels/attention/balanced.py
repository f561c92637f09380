"""Paged attention of one query token per sequence, by a schedule that all layers of a step share.

Shapes: `hybridgen.kernels.attention.ops`. Each of a fixed number of resident programs goes through the tiles of its
chunks (`hybridgen.kernels.attention.schedule`) in one loop, with the next tiles already on their way, across the ends
of chunks and rows. Where `streamed` has a kernel for the heads, it does all; else Triton does: a kernel of its own
combines a row's chunks in their order, and a row of one chunk is finished where it was computed.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridgen.device.launcher import Device, Launcher, device_of, power_of_two
from hybridgen.kernels.attention import streamed
from hybridgen.kernels.attention.balanced_kernels import balanced_kernel, gather_kernel
from hybridgen.kernels.attention.common import Heads, check_layout, heads_of, limit_of
from hybridgen.kernels.attention.schedule import Shares, counters_of, row_chunks, schedule, schedule_words

_SCRATCH_BYTES = 64 * 2**20
"""Scratch of a layer is not larger, unless rows would have a single chunk."""
_COMBINED = 2048
"""Values of partial sums that a combining program holds at once, about."""


class Tuning(NamedTuple):
    """Launch options for a head shape."""

    block: int
    """Positions a tile."""
    warps: int
    stages: int
    """K/V tiles in shared memory, and one."""
    programs: int
    """Programs a multiprocessor."""
    chunk: int
    """Positions of a chunk."""
    carry_query: bool
    """The next tile's queries are read a tile early and held in registers; else each tile reads its own."""


@functools.cache
def tuning(heads: Heads, shared_memory: int) -> Tuning:
    """Measured on an H200 for heads of 64 and 128 in 16 bits (`benchmarks/ragged.py`); for other heads the nearest.

    Chunks of 1024 positions were best: the end of a chunk costs more than a tile. Devices with less shared memory get
    fewer stages.
    """
    wide = max(power_of_two(heads.dim), power_of_two(heads.value_dim))
    many = power_of_two(heads.queries // heads.kv) > 32
    if heads.bytes == 4:
        return Tuning(block=32, warps=4, stages=2, programs=2, chunk=256, carry_query=True)
    if wide <= 64:
        tune = Tuning(block=64, warps=4 if many else 2, stages=4, programs=4, chunk=1024, carry_query=True)
    elif wide == 128:
        tune = Tuning(block=64, warps=8 if many else 4, stages=3, programs=2, chunk=1024, carry_query=False)
    else:
        tune = Tuning(block=32, warps=8 if many else 4, stages=3, programs=2, chunk=512, carry_query=True)
    if heads.bytes == 1:  # as many bytes under way
        tune = tune._replace(stages=2 * tune.stages - 1)
    tile_bytes = tune.block * 2 * wide * heads.bytes
    room = shared_memory // tune.programs - 8 * 2**10
    return tune._replace(stages=max(2, min(tune.stages, room // tile_bytes + 1)))


FEW_ROWS = 64
"""Below, chunks are shorter: there are too few of them for all programs."""
FEW_CHUNK = 512
"""Positions of a chunk then, at most, in Triton's kernel."""


def usual(heads: Heads, device: Device, tokens: int) -> Tuning:
    """Launch options of steps; what is Triton's alone in them serves where a streamed kernel cannot be had."""
    tune, few = tuning(heads, device.shared_memory), tokens < FEW_ROWS
    if streamed.takes(heads, device):
        form = streamed.form_of(heads, few)
        return tune._replace(block=streamed.BLOCK, programs=form.resident, chunk=streamed.chunk_of(few))
    return tune._replace(chunk=min(tune.chunk, FEW_CHUNK)) if few else tune


@functools.lru_cache(maxsize=4096)
def shares_of(
    heads: Heads, tokens: int, max_pages: int, window: int, chunk: int, device: Device, tune: Tuning | None
) -> Shares:
    """What schedule a layer of these heads needs for so many rows of up to `max_pages` pages."""
    limit, reach = limit_of(window, chunk)
    tune = tune or usual(heads, device, tokens)
    chunk_tiles = max(1, tune.chunk // tune.block)
    shares = Shares(
        heads.kv, heads.page_size, limit, reach, tune.block, chunk_tiles, 1, device.processors * tune.programs
    )
    line_bytes = heads.queries * (heads.value_dim + 1) * 4
    return shares._replace(
        row_chunks=row_chunks(shares.row_tiles(max_pages), chunk_tiles, line_bytes, tokens, _SCRATCH_BYTES)
    )


def _shares(
    k_pages: Tensor,
    v_pages: Tensor,
    query_heads: int,
    tokens: int,
    max_pages: int,
    window: int,
    chunk: int,
    tune: Tuning | None,
) -> Shares:
    _, kv_heads, page_size, dim = k_pages.shape
    heads = heads_of(query_heads, kv_heads, dim, v_pages.shape[3], page_size, k_pages.element_size())
    return shares_of(heads, tokens, max_pages, window, chunk, device_of(k_pages), tune)


def words_needed(
    k_pages: Tensor,
    v_pages: Tensor,
    query_heads: int,
    tokens: int,
    max_pages: int,
    window: int,
    chunk: int,
    tune: Tuning | None = None,
) -> int:
    """Words of a schedule for up to so many rows of up to `max_pages` pages."""
    words = 0
    for count in dict.fromkeys((tokens, min(tokens, FEW_ROWS - 1))):
        shares = _shares(k_pages, v_pages, query_heads, count, max_pages, window, chunk, tune)
        words = max(words, schedule_words(count, max_pages, shares))
    return words


def write_schedule(
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_heads: int,
    window: int,
    chunk: int,
    out: Tensor,
    tune: Tuning | None = None,
) -> None:
    """See `attention.schedule_attention`; `tune` replaces the measured launch options."""
    tokens, max_pages = positions.shape[0], block_table.shape[1]
    shares = _shares(k_pages, v_pages, query_heads, tokens, max_pages, window, chunk, tune)
    schedule(block_table, slots, positions, shares, out)


class Call(NamedTuple):
    """All that calls of one shape share."""

    attend: Launcher
    gather: Launcher
    shares: Shares
    streamed: streamed.Stream | None
    """In place of both."""


_calls: dict[Hashable, Call] = {}


def _prepare(
    heads: Heads,
    shares: Shares,
    softcap: bool,
    sinks: bool,
    append: bool,
    device: Device,
    tune: Tuning,
    stream: streamed.Stream | None,
    pairs: bool,
) -> Call:
    group = heads.queries // heads.kv
    members = triton.next_power_of_2(group)
    value = power_of_two(heads.value_dim)
    common: dict[str, Any] = {
        "HEADS": heads.kv,
        "GROUP": group,
        "VALUE_DIM": heads.value_dim,
        "BLOCK_VALUE": value,
        "OVERLAP": device.overlap,
        **({"launch_pdl": True} if device.overlap else {}),
    }
    attend = {
        "PAGE": heads.page_size,
        "DIM": heads.dim,
        "BLOCK": tune.block,
        "BLOCK_GROUP": power_of_two(group),
        "BLOCK_DIM": power_of_two(heads.dim),
        "LIMIT": shares.limit,
        "SOFTCAP": softcap,
        "SINKS": sinks,
        "APPEND": append,
        "CARRY_QUERY": tune.carry_query,
        "EVERY": 2 if pairs else 1,
        "num_warps": tune.warps,
        "num_stages": tune.stages,
        **common,
    }
    gather = {
        "BLOCK_CHUNKS": min(triton.next_power_of_2(shares.row_chunks), max(1, _COMBINED // (members * value))),
        "BLOCK_MEMBERS": members,
        "num_warps": 4,
        **common,
    }
    return Call(Launcher(balanced_kernel, attend), Launcher(gather_kernel, gather), shares, stream)


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    plan: Tensor,
    tune: Tuning | None = None,
) -> Tensor:
    """`attention.decode_attention` by a schedule; at least one row.

    Args:
        plan: by `write_schedule` for these rows, with the same options.
        tune: replaces the measured launch options.
    """
    q, heads = check_layout(q, k_pages, v_pages, scale)
    pairs = heads.pairs
    heads = heads._replace(bytes=k_pages.element_size())  # as the schedule, which knows no queries
    tokens, max_pages = q.shape[0], block_table.shape[1]
    out = torch.empty((tokens, heads.queries, heads.value_dim), dtype=q.dtype, device=q.device)
    append = k is not None and v is not None
    if k is None or v is None:
        k = v = q  # never read
    elif k.stride(2) != 1 or v.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    dtypes = q.dtype, k.dtype, k_pages.dtype, None if sinks is None else sinks.dtype
    key = dtypes, heads, tokens, max_pages, window, chunk, softcap > 0, append, strides, q.device.index, tune
    call = _calls.get(key)
    if call is None:
        device = device_of(q)
        shares = shares_of(heads, tokens, max_pages, window, chunk, device, tune)
        stream = None
        if tune is None and streamed.takes(heads, device) and q.dtype == k_pages.dtype:
            kinds = dtypes[3], slots.dtype, positions.dtype
            form = streamed.form_of(heads, tokens < FEW_ROWS)
            stream = streamed.stream_of(heads, q.dtype, kinds, softcap > 0, append, device, form)
        tune = tune or usual(heads, device, tokens)
        options = softcap > 0, sinks is not None, append
        call = _calls[key] = _prepare(heads, shares, *options, device, tune, stream, pairs)
    shares = call.shares
    # Mixed values of each row, chunk and head, then the logarithms of their sums.
    lines = tokens * shares.row_chunks * heads.queries if shares.row_chunks > 1 else 0
    partial = torch.empty((lines * (heads.value_dim + 1),), dtype=torch.float32, device=q.device)
    lse_start = lines * heads.value_dim
    capacity = tokens * shares.row_tiles(max_pages)
    if call.streamed is not None:
        counters = counters_of(plan, tokens, max_pages, shares)
        rest = k_pages, v_pages, plan, block_table, slots, positions, sinks, out, partial, counters
        numbers = lse_start, scale, softcap, capacity, tokens * shares.row_chunks, shares.parts
        call.streamed(q, k, v, rest, *numbers)
        return out
    call.attend(
        (shares.parts * heads.kv, 1, 1),
        (
            q, k, v, k_pages, v_pages, plan, q if sinks is None else sinks, out, partial,
            lse_start, scale, softcap, tokens, capacity, tokens * shares.row_chunks, *strides,
        ),
    )  # fmt: skip
    if lines:
        call.gather((tokens, heads.kv, 1), (plan, out, partial, lse_start))
    return out
