"""Triton: publish a step's outputs and advance its rows. What they do: `hybridgen.kernels.step.advance`.

Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from hybridgen.device.launcher import Launcher


@triton.jit(
    do_not_specialize=["lines", "line_stride", "row_stride", "width", "values_stride"],
    do_not_specialize_on_alignment=["values", "ring", "counter"],
)
def _publish_kernel(values, ring, counter, lines, line_stride, row_stride, width, values_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    line = tl.load(counter) % lines
    column = tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(values + row * values_stride + column, mask=mask)
    tl.store(ring + line * line_stride + row * row_stride + column, value, mask=mask)


@triton.jit(
    do_not_specialize=["count", "padding", "table_stride", "lines", "line_stride", "counts_stride"],
    do_not_specialize_on_alignment=["tokens", "rows", "lengths", "generated", "table", "ring", "counter", "counts"],
)
def _advance_kernel(  # type: ignore[no-untyped-def]
    tokens, rows, lengths, generated, table, ring, counter, counts,
    count, padding, table_stride, lines, line_stride, counts_stride,
    BLOCK: tl.constexpr, QUERY: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """One program for all rows: nobody may read the counter after it was moved on. QUERY tokens a row."""
    step = tl.load(counter)
    row = tl.arange(0, BLOCK)
    mask = row < count
    slot = tl.load(rows + row, mask=mask, other=0)
    length = tl.load(lengths + row, mask=mask, other=0)
    made = tl.load(generated + row, mask=mask, other=0)
    real = mask & (slot < padding)
    accepted = tl.zeros_like(length)
    last = tl.zeros_like(length)
    for place in tl.static_range(QUERY):
        token = tl.load(tokens + row * QUERY + place, mask=mask, other=0)
        tl.store(ring + (step % lines) * line_stride + row * QUERY + place, token, mask=mask)
        taken = token != -2  # advance.REJECTED
        accepted += taken.to(tl.int64)
        last = tl.where(taken, token, last)
        if COUNTS:
            cell = counts + slot * counts_stride + token  # slots differ, so no two rows share one
            chosen = real & (token >= 0)
            tl.store(cell, tl.load(cell, mask=chosen, other=0) + 1, mask=chosen)
    # A failed row has token -1; it may run once more before the host knows, so it needs a valid id.
    tl.store(table + slot, tl.maximum(last, 0), mask=real)
    tl.store(table + table_stride + slot, length + accepted - 1, mask=real)
    tl.store(table + 2 * table_stride + slot, made + accepted, mask=real)
    tl.debug_barrier()
    tl.store(counter, step + 1)


@functools.cache
def _publisher(block: int, dtype: str, device: int) -> Launcher:
    return Launcher(_publish_kernel, {"BLOCK": block, "num_warps": 1})


@functools.cache
def _advancer(block: int, query: int, counts: bool, device: int) -> Launcher:
    return Launcher(_advance_kernel, {"BLOCK": block, "QUERY": query, "COUNTS": counts, "num_warps": 4})


def launch_publish(values: Tensor, ring: Tensor, counter: Tensor) -> None:
    """See `kernels.step.advance.publish`; a vector is one column."""
    width = values.shape[1] if values.dim() == 2 else 1
    row_stride = ring.stride(1)
    launch = _publisher(triton.next_power_of_2(width), str(values.dtype), values.device.index)
    args = values, ring, counter, ring.shape[0], ring.stride(0), row_stride, width, values.stride(0)
    launch((values.shape[0], 1, 1), args)


def launch_advance(
    tokens: Tensor,
    rows: Tensor,
    lengths: Tensor,
    generated: Tensor,
    table: Tensor,
    ring: Tensor,
    counter: Tensor,
    counts: Tensor | None,
) -> None:
    """See `kernels.step.advance.advance`."""
    block = max(16, triton.next_power_of_2(tokens.shape[0]))
    query = 1 if tokens.dim() == 1 else tokens.shape[1]
    launch = _advancer(block, query, counts is not None, tokens.device.index)
    counted = table if counts is None else counts  # never read without counts
    state = tokens, rows, lengths, generated, table, ring, counter, counted
    sizes = tokens.shape[0], table.shape[1] - 1, table.stride(0), ring.shape[0], ring.stride(0), counted.stride(0)
    launch((1, 1, 1), (*state, *sizes))
