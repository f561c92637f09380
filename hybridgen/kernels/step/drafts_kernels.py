"""Triton: what steps that check drafts feed, accept and keep. What the ops promise: `hybridgen.kernels.step.drafts`.

A program takes a row. Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridgen.device.launcher import Launcher


@triton.jit(
    do_not_specialize=["table_stride", "width", "count", "padding"],
    do_not_specialize_on_alignment=["table", "drafts", "rows", "ids", "slots", "positions"],
)
def feed_kernel(  # type: ignore[no-untyped-def]
    table, drafts, rows, ids, slots, positions, table_stride, width, count, padding, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows + row)
    i = tl.arange(0, BLOCK)
    inside = i < count
    draft = tl.load(drafts + slot * width + i - 1, mask=inside & (i > 0), other=-1)
    token = tl.where(i == 0, tl.load(table + slot), draft)
    fed = token != -1  # drafts.NO_DRAFT
    place = row * count + i
    tl.store(ids + place, tl.where(fed, token, 0), mask=inside)
    tl.store(slots + place, tl.where(fed, slot, padding).to(tl.int32), mask=inside)
    tl.store(positions + place, tl.where(fed, tl.load(table + table_stride + slot) + i, 0), mask=inside)


@triton.jit(
    do_not_specialize=["width", "count"],
    do_not_specialize_on_alignment=["chosen", "drafts", "rows", "accepted", "brought"],
)
def accept_kernel(chosen, drafts, rows, accepted, brought, width, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows + row)
    i = tl.arange(0, BLOCK)
    inside = i < count
    token = tl.load(chosen + row * count + i, mask=inside, other=0)
    draft = tl.load(drafts + slot * width + i, mask=i < count - 1, other=-1)
    right = (token == draft) & (draft != -1)
    last = tl.min(tl.where(right, count - 1, i), 0)
    tl.store(accepted + row * count + i, tl.where(i <= last, token, -2), mask=inside)  # advance.REJECTED
    tl.store(brought + row, (last + 1).to(tl.int64))


@triton.jit(
    do_not_specialize=["width", "padding", "vocab", "checked"],
    do_not_specialize_on_alignment=["made", "drafts", "rows", "room", "told"],
)
def keep_kernel(made, drafts, rows, room, told, width, padding, vocab, checked, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows + row)
    i = tl.arange(0, BLOCK)
    inside = i < width
    before = tl.load(drafts + slot * width + i, mask=inside & (i < checked), other=-1)
    draft = tl.load(made + row * width + i, mask=inside, other=-1)
    known = (draft >= 0) & (draft < vocab) & (i < tl.load(room + row) - 1) & (slot < padding)
    kept = tl.min(tl.where(known, width, i), 0)
    odd = ((draft < -1) | (draft >= vocab)) & (slot < padding)
    tl.store(told + row * 3, tl.sum((before != -1).to(tl.int64), 0))
    tl.store(told + row * 3 + 1, tl.minimum(kept, width).to(tl.int64))
    tl.store(told + row * 3 + 2, tl.sum(odd.to(tl.int64), 0))
    tl.debug_barrier()
    tl.store(drafts + slot * width + i, tl.where(i < kept, draft, -1), mask=inside)


@functools.cache
def _launchers(device: int | None, block: int) -> tuple[Launcher, Launcher, Launcher]:
    options = {"BLOCK": block, "num_warps": 1}
    return Launcher(feed_kernel, options), Launcher(accept_kernel, options), Launcher(keep_kernel, options)


def launch_feed(table: Tensor, drafts: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `drafts.feed_drafts`."""
    tokens = rows.shape[0] * count
    ids, positions = (rows.new_empty(tokens) for _ in range(2))
    slots = rows.new_empty(tokens, dtype=torch.int32)
    if tokens:
        launch = _launchers(rows.device.index, triton.next_power_of_2(count))[0]
        sizes = table.stride(0), drafts.shape[1], count, table.shape[1] - 1
        launch((rows.shape[0], 1, 1), (table, drafts, rows, ids, slots, positions, *sizes))
    return ids, slots, positions


def launch_accept(chosen: Tensor, drafts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """See `drafts.accept_drafts`."""
    accepted, brought = torch.empty_like(chosen), torch.empty_like(rows)
    if rows.shape[0]:
        count = chosen.shape[1]
        launch = _launchers(rows.device.index, triton.next_power_of_2(count))[1]
        launch((rows.shape[0], 1, 1), (chosen.contiguous(), drafts, rows, accepted, brought, drafts.shape[1], count))
    return accepted, brought


def launch_keep(made: Tensor, drafts: Tensor, rows: Tensor, room: Tensor, vocab_size: int, checked: int) -> Tensor:
    """See `drafts.keep_drafts`."""
    told = rows.new_empty((rows.shape[0], 3))
    if rows.shape[0]:
        width = drafts.shape[1]
        launch = _launchers(rows.device.index, triton.next_power_of_2(width))[2]
        sizes = width, drafts.shape[0] - 1, vocab_size, checked
        launch((rows.shape[0], 1, 1), (made.contiguous(), drafts, rows, room.contiguous(), told, *sizes))
    return told
