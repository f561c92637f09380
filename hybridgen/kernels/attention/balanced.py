"""Triton: paged attention of one query token per sequence, by a schedule that all layers of a step share.

Shapes: `hybridgen.kernels.attention.ops`. Each of a fixed number of resident programs goes through its run of tiles
(`hybridgen.kernels.attention.schedule`) in one loop, with the next tiles already on their way, across the ends of
chunks and rows. A row's chunks are combined in their order, by the program that finishes the last of them, or by a
kernel of its own; a row of one chunk is finished where it was computed.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridgen.device.launcher import Device, Launcher, device_of, power_of_two
from hybridgen.kernels.attention.balanced_kernels import balanced_kernel, gather_kernel
from hybridgen.kernels.attention.common import Heads, check_layout, limit_of
from hybridgen.kernels.attention.schedule import Shares, row_chunks

_SCRATCH_BYTES = 64 * 2**20
"""Scratch of a layer is not larger, unless rows would have a single chunk."""


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
    fused: bool = False
    """The program that finishes a row's last chunk combines them, else a kernel of its own."""
    carry_query: bool = True
    """A tile's queries are held in registers, else in shared memory for each tile."""
    registers: int = 0
    """Registers of a thread at most; 0 leaves it to the compiler."""


@functools.cache
def tuning(heads: Heads, shared_memory: int) -> Tuning:
    """To be measured on an H200 (`benchmarks/attention.py`); other devices get fewer stages where memory is short."""
    if heads.bytes == 4:
        return Tuning(block=32, warps=4, stages=2, programs=2, chunk=256)
    wide = max(power_of_two(heads.dim), power_of_two(heads.value_dim))
    block = 64 if wide <= 128 else 32
    tile_bytes = block * 2 * wide * heads.bytes
    stages = 4
    while stages > 2 and (stages - 1) * tile_bytes > shared_memory // 2 - 16 * 2**10:
        stages -= 1
    return Tuning(block, warps=4, stages=stages, programs=4 if wide <= 64 else 2, chunk=256)


def shares_of(
    heads: Heads, tokens: int, max_pages: int, window: int, chunk: int, device: Device, tune: Tuning
) -> Shares:
    """What schedule a layer of these heads needs for so many rows of up to `max_pages` pages."""
    limit, reach = limit_of(window, chunk)
    chunk_tiles = max(1, tune.chunk // tune.block)
    shares = Shares(
        heads.kv, heads.page_size, limit, reach, tune.block, chunk_tiles, 1, device.processors * tune.programs
    )
    line_bytes = heads.queries * (heads.value_dim + 1) * 4
    return shares._replace(
        row_chunks=row_chunks(shares.row_tiles(max_pages), chunk_tiles, line_bytes, tokens, _SCRATCH_BYTES)
    )


class Call(NamedTuple):
    """All that calls of one shape share."""

    attend: Launcher
    gather: Launcher


_calls: dict[Hashable, Call] = {}


def _prepare(
    heads: Heads, shares: Shares, softcap: bool, sinks: bool, append: bool, device: Device, tune: Tuning
) -> Call:
    group = heads.queries // heads.kv
    members = triton.next_power_of_2(group)
    value = power_of_two(heads.value_dim)
    common: dict[str, Any] = {
        "HEADS": heads.kv,
        "GROUP": group,
        "VALUE_DIM": heads.value_dim,
        "BLOCK_VALUE": value,
        "BLOCK_CHUNKS": min(triton.next_power_of_2(shares.row_chunks), max(1, 2048 // (members * value))),
        "BLOCK_MEMBERS": members,
        "OVERLAP": device.overlap,
        "num_warps": tune.warps,
        **({"launch_pdl": True} if device.overlap else {}),
    }
    constants = {
        "PAGE": heads.page_size,
        "DIM": heads.dim,
        "BLOCK": tune.block,
        "BLOCK_GROUP": power_of_two(group),
        "BLOCK_DIM": power_of_two(heads.dim),
        "LIMIT": shares.limit,
        "SOFTCAP": softcap,
        "SINKS": sinks,
        "APPEND": append,
        "FUSED": tune.fused,
        "CARRY_QUERY": tune.carry_query,
        "num_stages": tune.stages,
        **({"maxnreg": tune.registers} if tune.registers else {}),
        **common,
    }
    gather = {**common, "num_warps": 4}
    return Call(Launcher(balanced_kernel, constants), Launcher(gather_kernel, gather))


def balanced_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Tensor,
    shares: Shares,
    max_pages: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    tune: Tuning | None = None,
) -> Tensor:
    """`attention.decode_attention` by a schedule.

    Args:
        plan: by `schedule` for this step's rows and `shares`.
        max_pages: columns of the block table.
        tune: replaces the measured launch options; those that `shares` were made with.
    """
    q, heads = check_layout(q, k_pages, v_pages, scale)
    tokens = q.shape[0]
    out = torch.empty((tokens, heads.queries, heads.value_dim), dtype=q.dtype, device=q.device)
    append = k is not None and v is not None
    if k is None or v is None:
        k = v = q  # never read
    elif k.stride(2) != 1 or v.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    dtypes = q.dtype, k.dtype, k_pages.dtype, None if sinks is None else sinks.dtype
    block = shares.limit, shares.block, min(shares.row_chunks, 2048)
    key = dtypes, heads, block, softcap > 0, append, strides, q.device.index, tune
    call = _calls.get(key)
    if call is None:
        device = device_of(q)
        tune = tune or tuning(heads, device.shared_memory)
        call = _calls[key] = _prepare(heads, shares, softcap > 0, sinks is not None, append, device, tune)
    fused = tune.fused if tune else tuning(heads, device_of(q).shared_memory).fused
    # Mixed values of each row, chunk and head, then the logarithms of their sums.
    lines = tokens * shares.row_chunks * heads.queries if shares.row_chunks > 1 else 0
    partial = torch.empty((lines * (heads.value_dim + 1),), dtype=torch.float32, device=q.device)
    lse_start = lines * heads.value_dim
    capacity = tokens * shares.row_tiles(max_pages)
    call.attend(
        (shares.programs, 1, 1),
        (
            q, k, v, k_pages, v_pages, plan, q if sinks is None else sinks, out, partial,
            lse_start, scale, softcap, tokens, capacity, *strides,
        ),
    )  # fmt: skip
    if lines and not fused:
        call.gather((tokens, heads.kv, 1), (plan, out, partial, lse_start, shares.programs))
    return out
