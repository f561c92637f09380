"""Triton: attention to latents in pages. Shapes: `hybridgen.kernels.attention.latent`.

All heads of a model share one latent a position, so that a page is read once for all of them, and is both keys and
values: scores are a product over rank + rope, the mean one over positions, of the same tile in shared memory. Positions
are rows of both products, since tensor cores of compute capability 9 want 64 of them, and heads may be 16.

Decode cuts a row's context into chunks of tiles, by its own length and by shapes alone, so that its bits do not depend
on its neighbours; a second kernel combines a row's chunks in their order (flash-decoding).

Prefill attends to latents too (absorbed), with the sizes of DeepSeek-V2 3.4 times the products of keys and values.
Where a call has its tokens' latents given, runs that begin in it attend to keys and values of their own
(`prefill_fresh`). Which run is which is known on the device alone: both kernels are launched, and each leaves out the
other's.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridgen.device.launcher import Device, Launcher, device_of, power_of_two
from hybridgen.kernels.attention.decode import Plan
from hybridgen.kernels.attention.latent_fresh_kernels import fresh_kernel
from hybridgen.kernels.attention.latent_kernels import combine_kernel, decode_kernel, prefill_kernel

_CHUNK_TOKENS = 2048
"""With several rows, no chunk is longer than this unless the scratch would be larger than _SCRATCH_BYTES."""
_SCRATCH_BYTES = 64 * 2**20
_MOST_RANK = 512


class Shape(NamedTuple):
    """What attends to what, as the launch configurations need it."""

    heads: int
    rank: int
    rope: int
    page_size: int
    bytes: int
    """Bytes of an element."""


class Tuning(NamedTuple):
    """Launch options of the decode or the prefill kernel for a shape."""

    block: int
    """Positions a tile."""
    rows: int
    """Heads of a program; in prefill, heads of tokens."""
    warps: int
    stages: int
    """Tiles of latents in shared memory."""
    programs: int = 1
    """Of decode, a multiprocessor."""
    chunk: int = _CHUNK_TOKENS
    """Positions of a chunk at most, with several rows."""
    parts: int = 0
    """Tensors that decode reads a tile's latents as, with heads as rows of its products; 0: positions are rows."""


def shape_of(q: Tensor, pages: Tensor, rank: int) -> Shape:
    """A checked `Shape`.

    Args:
        q: [T, H, ...]

    Raises:
        ValueError: the pages are not contiguous or of another dtype, or the kernels do not take the sizes.
    """
    _, _, page_size, width = pages.shape
    rope = width - rank
    if not pages.is_contiguous() or pages.dtype != q.dtype:
        raise ValueError(f"pages must be contiguous and {q.dtype}, as queries are; they are {pages.dtype}")
    if rank % 8 or rope % 8 or not (8 <= rank <= _MOST_RANK and 8 <= rope <= 128):
        raise ValueError(
            f"latents of {rank} with rotary keys of {rope}; give multiples of 8 up to {_MOST_RANK} and 128"
        )
    if page_size & (page_size - 1) or not 8 <= page_size <= 256:
        raise ValueError(f"page size {page_size}; give a power of two from 8 to 256")
    return Shape(q.shape[1], rank, rope, page_size, q.element_size())


def _shared_bytes(shape: Shape, block: int, rows: int, stages: int, by_heads: bool = False) -> int:
    """Of tiles, queries and weights, about as the compiler lays them out: where the rows of products are less than the
    64 of `wgmma`, one stage is what is multiplied, and its buffer the next tile's."""
    rank, rope = power_of_two(shape.rank), power_of_two(shape.rope)
    asynchronous = block >= 64 and not by_heads
    tiles = (stages if asynchronous else max(1, stages - 1)) * block * (rank + rope)
    return (tiles + rows * (rank + rope) + block * rows) * shape.bytes + 2 * 2**10


@functools.cache
def tuning(shape: Shape, shared_memory: int, prefill: bool = False, alone: bool = False) -> Tuning:
    """Launch options by what was measured on an H200 (`tried-latent-alone-h200.json` and
    `latent-rows-h200.json` in `benchmarks/results/`), where it was.

    Up to 16 heads in 16 bits decode with heads as rows where one row is `alone`: of a tile of 64 positions each warp
    multiplies two pieces in turn. With several rows two programs a multiprocessor, each with tiles of 32 positions: one
    program waits while the other multiplies. Else the largest tiles that fit, which was not measured. Four warps are
    one warp group, whose products need no copies between groups.
    """
    most = 64 if prefill else min(64, power_of_two(shape.heads))
    if shape.bytes == 4:
        block, rows = (32, 16) if _shared_bytes(shape, 32, 16, 2) <= shared_memory else (16, 16)
        return Tuning(block, rows, warps=8, stages=1)
    few = not prefill and most <= 16
    # As far as it ran on a GPU: by tiles inside a page, of latents that are wide enough to be read in parts.
    by_heads = alone and shape.rank == 512 and shape.page_size >= 64
    if few and by_heads and _shared_bytes(shape, 64, 16, 3, by_heads=True) <= shared_memory:
        return Tuning(64, 16, warps=4, stages=3, parts=4)
    if few and 2 * _shared_bytes(shape, 32, 16, 3) <= shared_memory:
        return Tuning(32, 16, warps=4, stages=3, programs=2)
    for block in (64, 32, 16):
        for rows in (most, most // 2, most // 4):
            if rows >= 16 and _shared_bytes(shape, block, rows, 2) <= shared_memory:
                stages = 3 if _shared_bytes(shape, block, rows, 3) <= shared_memory else 2
                warps = 4 if rows * power_of_two(shape.rank) <= 2**13 else 8
                return Tuning(block, rows, warps, stages)
    return Tuning(16, 16, warps=4, stages=1)


@functools.lru_cache(maxsize=4096)
def plan(tokens: int, shape: Shape, max_tiles: int, processors: int, tune: Tuning) -> Plan:
    """The cut for `tokens` rows of up to `max_tiles` tiles: `tune.programs` a multiprocessor, of which some share a
    chunk.

    One row is cut as finely as there are programs for it, several rows no coarser than `tune.chunk`.
    """
    parts = triton.cdiv(shape.heads, tune.rows)
    resident = max(1, processors * tune.programs // parts)
    splits = min(max_tiles, max(1, resident // tokens))
    if tokens == 1:
        return Plan(splits, max_tiles, splits, splits * parts)
    row_chunks = max(1, _SCRATCH_BYTES // (tokens * shape.heads * shape.rank * 4))
    chunk_tiles = max(tune.chunk // tune.block, triton.cdiv(max_tiles, row_chunks))
    row_chunks = max(splits, triton.cdiv(max_tiles, chunk_tiles))
    return Plan(splits, chunk_tiles, row_chunks, min(resident, tokens * row_chunks) * parts)


def _row_block(tokens: int) -> int:
    """Rows that the kernel is compiled for: few variants, whatever the batch."""
    block = 1 if tokens == 1 else 16
    while block < tokens:
        block *= 4
    return block


def _combine_block(tokens: int, row_chunks: int, shape: Shape) -> tuple[int, int]:
    """Chunks and columns that a combining program holds at once: few columns where rows are few, so that they are
    spread over the device, all where most rows may have nothing to combine."""
    columns = triton.next_power_of_2(shape.rank)
    while columns > 64 and tokens * shape.heads * triton.cdiv(shape.rank, columns) < 128:
        columns //= 2
    chunks = triton.next_power_of_2(row_chunks)
    if tokens == 1:  # all chunks at once: it need not be known how many there are
        return chunks, max(16, min(columns, 8192 // chunks))
    return min(chunks, max(1, 8192 // columns)), columns


class Call(NamedTuple):
    """All that decode calls of one shape share."""

    attend: Launcher
    combine: Launcher
    cut: Plan
    columns: int
    """Programs of a row and head that combine."""
    lines: int
    """Rows, chunks and heads that have a place in scratch; 0 when nothing is to be combined."""


_calls: dict[Hashable, Call] = {}


def _sizes(shape: Shape) -> dict[str, Any]:
    return {"HEADS": shape.heads, "PAGE": shape.page_size, "RANK": shape.rank, "ROPE": shape.rope}


def _prepare(shape: Shape, tokens: int, max_pages: int, append: bool, device: Device, tune: Tuning) -> Call:
    max_tiles = triton.cdiv(max_pages * shape.page_size, tune.block)
    cut = plan(tokens, shape, max_tiles, device.processors, tune)
    chunks, columns = _combine_block(tokens, cut.row_chunks, shape)
    overlap = {"OVERLAP": device.overlap, **({"launch_pdl": True} if device.overlap else {})}
    attend = {
        **_sizes(shape),
        "BLOCK": tune.block,
        "BLOCK_HEADS": tune.rows,
        "BLOCK_RANK": power_of_two(shape.rank),
        "BLOCK_ROPE": power_of_two(shape.rope),
        "BLOCK_ROWS": _row_block(tokens),
        "PARTS": tune.parts,
        "APPEND": append,
        "num_warps": tune.warps,
        "num_stages": tune.stages,
        **overlap,
    }
    combine = {
        "HEADS": shape.heads,
        "RANK": shape.rank,
        "BLOCK": tune.block,
        "BLOCK_CHUNKS": chunks,
        "BLOCK_COLUMNS": columns,
        "ALONE": tokens == 1,
        "num_warps": 4,
        **overlap,
    }
    return Call(
        Launcher(decode_kernel, attend),
        Launcher(combine_kernel, combine),
        cut,
        triton.cdiv(shape.rank, columns),
        tokens * cut.row_chunks * shape.heads if cut.row_chunks > 1 else 0,
    )


def _adjacent(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


def decode(
    q: Tensor,
    q_rotary: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    latent: Tensor | None = None,
    rotary: Tensor | None = None,
    tune: Tuning | None = None,
) -> Tensor:
    """See `latent.latent_decode`; `tune` replaces the launch options."""
    tokens, heads, rank = q.shape
    shape = shape_of(q, pages, rank)
    out = torch.empty((tokens, heads, rank), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    q, q_rotary = _adjacent(q), _adjacent(q_rotary)
    append = latent is not None and rotary is not None
    if latent is None or rotary is None:
        latent = rotary = q  # never read
    else:
        latent, rotary = _adjacent(latent), _adjacent(rotary)
    strides = (
        block_table.stride(0), *q.stride()[:2], *q_rotary.stride()[:2], latent.stride(0), rotary.stride(0),
    )  # fmt: skip
    dtypes = q.dtype, latent.dtype, rotary.dtype, slots.dtype, positions.dtype
    key = dtypes, shape, tokens, block_table.shape[1], append, strides, q.device.index, tune
    call = _calls.get(key)
    if call is None:
        device = device_of(q)
        found = tune or tuning(shape, device.shared_memory, alone=tokens == 1)
        call = _calls[key] = _prepare(shape, tokens, block_table.shape[1], append, device, found)
    # Mean latents of each row, chunk and head, then the logarithms of their sums.
    partial = torch.empty((call.lines * (rank + 1),), dtype=torch.float32, device=q.device)
    lse_start, cut = call.lines * rank, call.cut
    inputs = q, q_rotary, latent, rotary, pages, block_table, slots, positions
    call.attend((cut.programs, 1, 1), (*inputs, out, partial, lse_start, scale, tokens, *cut[:3], *strides))
    if call.lines:
        call.combine((tokens, heads, call.columns), (positions, out, partial, lse_start, *cut[:3]))
    return out


_prefills: dict[Hashable, Launcher] = {}


def prefill(
    q: Tensor,
    q_rotary: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_starts: Tensor,
    scale: float,
    tune: Tuning | None = None,
    later: bool = False,
) -> Tensor:
    """The mean of latents by each head's causal attention: [T, H, rank].

    Args:
        q: [T, H, rank], queries through the keys' part of the projection; `q_rotary` [T, H, rope] their rest.
        tune: replaces the launch options.
        later: leave out runs that begin at position 0, whose rows hold anything then.
    """
    tokens, heads, rank = q.shape
    shape = shape_of(q, pages, rank)
    out = torch.empty((tokens, heads, rank), dtype=q.dtype, device=q.device)
    sequences = query_starts.shape[0] - 1
    if tokens == 0 or sequences == 0:
        return out
    q, q_rotary = _adjacent(q), _adjacent(q_rotary)
    device = device_of(q)
    tune = tune or tuning(shape, device.shared_memory, prefill=True)
    strides = block_table.stride(0), *q.stride()[:2], *q_rotary.stride()[:2]
    # A stride over heads can follow from the number of tokens: what Triton specialises on, not the number.
    kinds = tuple((stride % 16 == 0, stride == 1, stride >= 2**31) for stride in strides)
    block_sequences = triton.next_power_of_2(sequences)
    key = q.dtype, slots.dtype, positions.dtype, shape, tune, block_sequences, device, kinds, later
    launcher = _prefills.get(key)
    if launcher is None:
        constants = {
            **_sizes(shape),
            "BLOCK_ROWS": tune.rows,
            "BLOCK": tune.block,
            "BLOCK_RANK": power_of_two(rank),
            "BLOCK_ROPE": power_of_two(shape.rope),
            "BLOCK_SEQUENCES": block_sequences,
            "LATER": later,
            "num_warps": tune.warps,
            "num_stages": tune.stages,
        }
        launcher = _prefills[key] = Launcher(prefill_kernel, constants)
    tiles = tokens * heads // tune.rows + sequences
    inputs = q, q_rotary, pages, block_table, slots, positions, query_starts
    launcher((tiles, 1, 1), (*inputs, out, scale, sequences, *strides))
    return out


class Own(NamedTuple):
    """Sizes of what a fresh run attends with."""

    heads: int
    nope: int
    rope: int
    value_dim: int
    bytes: int


def own_tuning(own: Own, shared_memory: int) -> Tuning:
    """Launch options for runs that begin in a call: `rows` tokens and `block` positions of a program."""
    if own.bytes == 4:
        return Tuning(32, 32, warps=4, stages=1)
    widths = power_of_two(own.nope) + power_of_two(own.rope) + power_of_two(own.value_dim)
    for rows, block, warps, stages in ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2)):
        if (rows + stages * block) * widths * own.bytes <= shared_memory - 8 * 2**10:
            return Tuning(block, rows, warps, stages)
    return Tuning(16, 32, warps=4, stages=1)


_fresh: dict[Hashable, Launcher] = {}


def prefill_fresh(
    q: Tensor,
    q_rotary: Tensor,
    both: Tensor,
    rotary: Tensor,
    positions: Tensor,
    query_starts: Tensor,
    scale: float,
    out: Tensor,
    tune: Tuning | None = None,
) -> None:
    """Causal attention of the runs that begin at position 0 to keys and values of their own, into their rows of `out`.

    Args:
        q: [T, H, nope]; `q_rotary` [T, H, rope].
        both: [T, H, nope + value_dim], contiguous: keys, and values behind them.
        rotary: [T, 1, rope], of all heads.
        out: [T, H, value_dim], contiguous; rows of other runs stay.
        tune: replaces the launch options.
    """
    tokens, heads, nope = q.shape
    sequences = query_starts.shape[0] - 1
    if tokens == 0 or sequences == 0:
        return
    q, q_rotary, rotary = _adjacent(q), _adjacent(q_rotary), _adjacent(rotary)
    own = Own(heads, nope, q_rotary.shape[2], out.shape[2], q.element_size())
    device = device_of(q)
    tune = tune or own_tuning(own, device.shared_memory)
    strides = *q.stride()[:2], *q_rotary.stride()[:2], rotary.stride(0)
    kinds = tuple((stride % 16 == 0, stride == 1, stride >= 2**31) for stride in strides)
    block_sequences = triton.next_power_of_2(sequences)
    key = q.dtype, positions.dtype, query_starts.dtype, own, tune, block_sequences, device, kinds
    launcher = _fresh.get(key)
    if launcher is None:
        constants = {
            "HEADS": heads,
            "NOPE": nope,
            "ROPE": own.rope,
            "VALUE": own.value_dim,
            "BLOCK_ROWS": tune.rows,
            "BLOCK": tune.block,
            "BLOCK_NOPE": power_of_two(nope),
            "BLOCK_ROPE": power_of_two(own.rope),
            "BLOCK_VALUE": power_of_two(own.value_dim),
            "BLOCK_SEQUENCES": block_sequences,
            "num_warps": tune.warps,
            "num_stages": tune.stages,
        }
        launcher = _fresh[key] = Launcher(fresh_kernel, constants)
    tiles = tokens // tune.rows + sequences
    inputs = q, q_rotary, both, rotary, positions, query_starts
    launcher((tiles * heads, 1, 1), (*inputs, out, scale, sequences, *strides))
