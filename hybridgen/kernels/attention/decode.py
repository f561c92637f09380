"""Triton: paged attention of one query token per sequence. Shapes: `hybridgen.kernels.attention.ops`.

A row's context is cut into chunks of tiles; a program attends with all query heads of one kv head to one chunk,
and a second kernel combines the chunks of a row (flash-decoding). The cut depends on the row's own length and on
shapes. Programs are as many as the device holds at once: with one row each has one chunk or none, with more rows
each walks a list of chunks that it derives from all positions, so that a long row among short ones is spread too.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridgen.device.launcher import Device, Launcher, device_of, power_of_two
from hybridgen.kernels.attention.common import Heads, check_layout, limit_of
from hybridgen.kernels.attention.decode_kernels import combine_kernel, rows_kernel, single_kernel

_CHUNK_TOKENS = 1024
"""With several rows, no chunk is longer than this unless the scratch would be larger than _SCRATCH_BYTES."""
_SCRATCH_BYTES = 64 * 2**20
_LEAST_TOKENS = 64
"""No chunk is shorter than this, but a row's last one."""


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
    registers: int = 0
    """Of a thread at most; 0: as the compiler likes."""


@functools.cache
def tuning(heads: Heads, shared_memory: int) -> Tuning:
    """Measured on an H200 (`benchmarks/attention.py`); other devices get fewer stages where memory is short."""
    if heads.bytes == 4:
        return Tuning(block=32, warps=4, stages=1, programs=2, programs_single=2)
    wide = max(power_of_two(heads.dim), power_of_two(heads.value_dim))
    block = 64 if wide <= 128 else 32
    tile_bytes = block * 2 * wide * heads.bytes
    packed = heads.bytes == 1
    stages = 4 if packed else 3
    while stages > 1 and stages * tile_bytes > shared_memory - 16 * 2**10:
        stages -= 1
    programs, programs_single = (4, 3) if wide <= 64 or (packed and wide <= 128) else (2, 2)
    # Of 8 bits twice the programs fit, if each takes half the registers.
    registers = 128 if packed and wide <= 128 else 0
    return Tuning(block, 4, stages, programs, programs_single, registers)


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
def plan(tokens: int, heads: Heads, max_tiles: int, processors: int, tune: Tuning) -> Plan:
    """The cut for `tokens` rows of up to `max_tiles` tiles."""
    if tokens == 1:
        splits = min(max_tiles, max(1, processors * tune.programs_single // heads.kv))
        return Plan(splits, max_tiles, splits, splits * heads.kv)
    resident = max(1, processors * tune.programs // heads.kv)
    splits = min(max_tiles, max(1, resident // tokens))
    row_chunks = max(1, _SCRATCH_BYTES // (tokens * heads.queries * heads.value_dim * 4))
    chunk_tiles = max(_CHUNK_TOKENS // tune.block, triton.cdiv(max_tiles, row_chunks))
    row_chunks = max(splits, triton.cdiv(max_tiles, chunk_tiles))
    return Plan(splits, chunk_tiles, row_chunks, min(resident, tokens * row_chunks) * heads.kv)


def _row_block(tokens: int) -> int:
    """Rows that the kernel is compiled for: few variants, whatever the batch."""
    block = 1 if tokens == 1 else 16
    while block < tokens:
        block *= 4
    return block


def _combine_block(tokens: int, row_chunks: int, heads: Heads) -> tuple[int, int]:
    """Query heads and chunks that a combining program holds at once.

    One head where rows are few, for the shortest time; more where rows are many, since most of them may have
    nothing to combine.
    """
    wide = power_of_two(heads.value_dim)
    block_heads = 1
    while block_heads < 8 and tokens * heads.queries > 1024 * block_heads:
        block_heads *= 2
    return block_heads, min(triton.next_power_of_2(row_chunks), 8192 // (wide * block_heads))


class Variant(NamedTuple):
    """What the compiled kernels of a call depend on, besides strides."""

    heads: Heads
    tune: Tuning
    block_rows: int
    limit: int
    """By `limit_of`."""
    softcap: bool
    sinks: bool
    append: bool
    device: Device

    def _common(self) -> dict[str, Any]:
        return {
            "VALUE_DIM": self.heads.value_dim,
            "BLOCK": self.tune.block,
            "BLOCK_VALUE": power_of_two(self.heads.value_dim),
            "LEAST": max(1, _LEAST_TOKENS // self.tune.block),
            "LIMIT": self.limit,
            "OVERLAP": self.device.overlap,
            **({"launch_pdl": True} if self.device.overlap else {}),
        }

    def shape_constants(self) -> dict[str, Any]:
        """Constants and launch options of `single_kernel` or `rows_kernel`."""
        group = self.heads.queries // self.heads.kv
        return {
            "HEADS": self.heads.kv,
            "GROUP": group,
            "PAGE": self.heads.page_size,
            "DIM": self.heads.dim,
            "BLOCK_GROUP": power_of_two(group),
            "BLOCK_DIM": power_of_two(self.heads.dim),
            "SOFTCAP": self.softcap,
            "SINKS": self.sinks,
            "APPEND": self.append,
            "PAIRS": self.heads.pairs,
            **({"BLOCK_ROWS": self.block_rows} if self.block_rows > 1 else {}),
            "num_warps": self.tune.warps,
            "num_stages": self.tune.stages,
            **({"maxnreg": self.tune.registers} if self.tune.registers else {}),
            **self._common(),
        }

    def combine_constants(self, block_heads: int, block_chunks: int) -> dict[str, Any]:
        """Constants and launch options of `combine_kernel`."""
        return {
            "QUERY_HEADS": self.heads.queries,
            "BLOCK_HEADS": block_heads,
            "BLOCK_CHUNKS": block_chunks,
            "SINGLE": self.block_rows == 1,
            "num_warps": 4,
            **self._common(),
        }


class Call(NamedTuple):
    """All that calls of one shape share."""

    attend: Launcher
    """`single_kernel` or `rows_kernel`."""
    combine: Launcher
    combine_heads: int
    """Query heads of a combining program."""
    cut: Plan
    lines: int
    """Rows, chunks and query heads that have a place in scratch; 0 when nothing is to be combined."""


_calls: dict[Hashable, Call] = {}


def _prepare(
    heads: Heads,
    tokens: int,
    max_pages: int,
    limit: int,
    reach: int,
    softcap: bool,
    sinks: bool,
    append: bool,
    device: Device,
    tune: Tuning | None,
) -> Call:
    tune = tune or tuning(heads, device.shared_memory)
    max_tiles = triton.cdiv(max_pages * heads.page_size, tune.block)
    if limit:
        max_tiles = min(max_tiles, reach // tune.block + 2)
    cut = plan(tokens, heads, max_tiles, device.processors, tune)
    variant = Variant(heads, tune, _row_block(tokens), limit, softcap, sinks, append, device)
    block = _combine_block(tokens, cut.row_chunks, heads)
    lines = tokens * cut.row_chunks * heads.queries if tokens == 1 or cut.row_chunks > 1 else 0
    return Call(
        Launcher(single_kernel if tokens == 1 else rows_kernel, variant.shape_constants()),
        Launcher(combine_kernel, variant.combine_constants(*block)),
        block[0],
        cut,
        lines,
    )


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
    k: Tensor | None = None,
    v: Tensor | None = None,
    tune: Tuning | None = None,
) -> Tensor:
    """See `attention.decode_attention`; `tune` replaces the measured launch options."""
    q, heads = check_layout(q, k_pages, v_pages, scale)
    tokens = q.shape[0]
    out = torch.empty((tokens, heads.queries, heads.value_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    limit, reach = limit_of(window, chunk)
    append = k is not None and v is not None
    if k is None or v is None:
        k = v = q  # never read
    elif k.stride(2) != 1 or v.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    strides = block_table.stride(0), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    dtypes = q.dtype, k.dtype, k_pages.dtype, slots.dtype, positions.dtype, None if sinks is None else sinks.dtype
    key = dtypes, heads, tokens, block_table.shape[1], limit, reach, softcap > 0, append, strides, q.device.index, tune
    call = _calls.get(key)
    if call is None:
        call = _calls[key] = _prepare(
            heads,
            tokens,
            block_table.shape[1],
            limit,
            reach,
            softcap > 0,
            sinks is not None,
            append,
            device_of(q),
            tune,
        )
    # Mixed values of each row, chunk and head, then the logarithms of their sums.
    partial = torch.empty((call.lines * (heads.value_dim + 1),), dtype=torch.float32, device=q.device)
    lse_start = call.lines * heads.value_dim
    inputs = q, k, v, k_pages, v_pages, block_table, slots, positions, q if sinks is None else sinks
    options = scale, softcap, reach
    grid = call.cut.programs, 1, 1
    if tokens == 1:
        call.attend(grid, (*inputs, partial, lse_start, *options, call.cut.splits, *strides))
    else:
        call.attend(grid, (*inputs, out, partial, lse_start, *options, tokens, *call.cut[:3], *strides))
    if call.lines:
        grid = tokens, triton.cdiv(heads.queries, call.combine_heads), 1
        call.combine(grid, (positions, out, partial, lse_start, reach, *call.cut[:3]))
    return out
