"""Triton: rules that read a request's tokens in their order. What the ops promise: `hybridgen.sampling.history`.

1. `sequences_kernel`: a program takes 128 of a row's sequences and compares their tokens with the end of the text.
2. `ngrams_kernel`: a program takes 1024 positions of a row's text and compares the tokens before each with the end of
   the text, backwards, as long as one of them agrees.

Grids follow from the tables' widths, so that a step can be recorded; programs that have nothing to do end after a load
or two. Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from hybridgen.device.launcher import Launcher

SEQUENCES = 128
"""Sequences of a program. No result depends on it."""
POSITIONS = 1024
"""Positions of a program. No result depends on it."""


@triton.jit(
    do_not_specialize=["vocab", "context", "capacity", "limit"],
    do_not_specialize_on_alignment=["bias", "history", "tokens", "ends", "values", "slots", "lengths"],
)
def sequences_kernel(  # type: ignore[no-untyped-def]
    bias, history, tokens, ends, values, slots, lengths, vocab, context, capacity, limit, BLOCK: tl.constexpr
):  # fmt: skip
    """Add a sequence's value where its tokens but the last end the text; `limit`: sequences of a slot at most."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    length = tl.minimum(tl.load(lengths + row), context)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < limit
    start = tl.load(ends + slot * (limit + 1) + i, mask=inside, other=0)
    end = tl.load(ends + slot * (limit + 1) + i + 1, mask=inside, other=0)
    before = end - start - 1
    matches = inside & (before > 0) & (before <= length)
    own, text = tokens + slot * capacity, history + slot * context
    longest = tl.max(tl.where(matches, before, 0), 0)
    step = longest * 0
    while step < longest:
        asked = matches & (step < before)
        wanted = tl.load(own + start + step, mask=asked, other=0)
        found = tl.load(text + length - before + step, mask=asked, other=0)
        matches = matches & ((wanted == found) | ~asked)
        longest = tl.max(tl.where(matches, before, 0), 0)
        step += 1
    last = tl.load(own + end - 1, mask=matches, other=0)
    value = tl.load(values + slot * limit + i, mask=matches, other=0)
    tl.atomic_add(bias + row * vocab + last, value, mask=matches & (last < vocab), sem="relaxed")


@triton.jit(
    do_not_specialize=["vocab", "context", "stride"],
    do_not_specialize_on_alignment=["bias", "history", "ngrams", "slots", "lengths"],
)
def ngrams_kernel(  # type: ignore[no-untyped-def]
    bias, history, ngrams, slots, lengths, vocab, context, stride, BLOCK: tl.constexpr
):  # fmt: skip
    """-inf for the token at each position whose tokens before it end the text too; `stride`: of `ngrams`."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    size = tl.load(ngrams + slot * stride)
    length = tl.minimum(tl.load(lengths + row), context)
    text = history + slot * context
    i = block * BLOCK + tl.arange(0, BLOCK)
    repeats = (size > 0) & (i < length) & (i >= size - 1)
    back = size * 0 + 1
    left = tl.max(repeats.to(tl.int32), 0)
    while (back < size) & (left > 0):
        found = tl.load(text + i - back, mask=repeats, other=0)
        repeats = repeats & (found == tl.load(text + length - back))
        left = tl.max(repeats.to(tl.int32), 0)
        back += 1
    token = tl.load(text + i, mask=repeats, other=0)
    tl.store(bias + row * vocab + token, -float("inf"), mask=repeats & (token < vocab))


@triton.jit(
    do_not_specialize=["count", "context"],
    do_not_specialize_on_alignment=["chosen", "slots", "lengths", "history"],
)
def remember_kernel(chosen, slots, lengths, history, count, context, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    token = tl.load(chosen + row, mask=mask, other=0)
    slot = tl.load(slots + row, mask=mask, other=0)
    length = tl.load(lengths + row, mask=mask, other=0)
    cell = history + slot * context + length
    tl.store(cell, tl.maximum(token, 0).to(tl.int32), mask=mask & (length < context))


@functools.cache
def _launchers(device: int | None) -> tuple[Launcher, Launcher, Launcher]:
    return (
        Launcher(sequences_kernel, {"BLOCK": SEQUENCES, "num_warps": 4}),
        Launcher(ngrams_kernel, {"BLOCK": POSITIONS, "num_warps": 4}),
        Launcher(remember_kernel, {"BLOCK": 128, "num_warps": 4}),
    )


def launch_history(
    bias: Tensor,
    history: Tensor,
    tokens: Tensor,
    ends: Tensor,
    values: Tensor,
    ngrams: Tensor,
    slots: Tensor,
    lengths: Tensor,
) -> None:
    """See `history.apply_history`."""
    rows, vocab = bias.shape
    if rows == 0:
        return
    slots, lengths = slots.contiguous(), lengths.contiguous()
    context, capacity, limit = history.shape[1], tokens.shape[1], values.shape[1]
    sequences, repeats, _ = _launchers(bias.device.index)
    arguments = bias, history, tokens, ends, values, slots, lengths, vocab, context, capacity, limit
    sequences((triton.cdiv(limit, SEQUENCES), rows, 1), arguments)
    grid = triton.cdiv(context, POSITIONS), rows, 1
    repeats(grid, (bias, history, ngrams, slots, lengths, vocab, context, ngrams.stride(0)))


def launch_remember(chosen: Tensor, slots: Tensor, lengths: Tensor, history: Tensor) -> None:
    """See `history.remember`."""
    rows = chosen.shape[0]
    if rows == 0:
        return
    slots, lengths = slots.contiguous(), lengths.contiguous()
    launch = _launchers(chosen.device.index)[2]
    launch((triton.cdiv(rows, 128), 1, 1), (chosen, slots, lengths, history, rows, history.shape[1]))
