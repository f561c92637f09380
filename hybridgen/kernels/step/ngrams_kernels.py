"""Triton: drafts from a row's own text. What the op promises: `hybridgen.kernels.step.ngrams`.

1. `find_kernel`: a program takes 1024 places of a row's text and compares the tokens before each with the end of the
   text, backwards, as long as one of them agrees. It leaves its best place and how long that agrees in one integer,
   whose order is the order of places: longer first, then later.
2. `take_kernel`: a program takes the best of a row's programs, and copies what came behind that place.

Programs that lie behind a row's text end after two loads. Imports Triton; only the CUDA implementation imports this
module.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridgen.device.launcher import Launcher

PLACES = 1024
"""Places of a program. No result depends on it."""


@triton.jit(
    do_not_specialize=["context", "blocks", "shortest", "longest"],
    do_not_specialize_on_alignment=["text", "slots", "lengths", "found"],
)
def find_kernel(text, slots, lengths, found, context, blocks, shortest, longest, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The best place of a block: how long it agrees, times 2^32, plus the place; 0 for none."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    length = tl.minimum(tl.load(lengths + row), context)
    own = text + slot * context
    i = block * BLOCK + tl.arange(0, BLOCK)
    going = (i > 0) & (i < length)
    agree = tl.zeros_like(i)
    back = block * 0 + 1
    left = tl.max(going.to(tl.int32), 0)
    while (back <= longest) & (left > 0):
        going = going & (i >= back)
        theirs = tl.load(own + i - back, mask=going, other=0)
        going = going & (theirs == tl.load(own + length - back, mask=length >= back, other=-1))
        agree += going.to(tl.int32)
        left = tl.max(going.to(tl.int32), 0)
        back += 1
    packed = tl.where(agree >= shortest, agree.to(tl.int64) * 4294967296 + i, 0)
    tl.store(found + row * blocks + block, tl.max(packed, 0))


@triton.jit(
    do_not_specialize=["context", "blocks", "count"],
    do_not_specialize_on_alignment=["text", "slots", "lengths", "found", "drafts"],
)
def take_kernel(  # type: ignore[no-untyped-def]
    text, slots, lengths, found, drafts, context, blocks, count, BLOCKS: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Copy what came behind the best place; a copy that meets the end of the text begins again."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    length = tl.minimum(tl.load(lengths + row), context)
    j = tl.arange(0, BLOCKS)
    best = tl.max(tl.load(found + row * blocks + j, mask=j < blocks, other=0), 0)
    place = best % 4294967296
    i = tl.arange(0, COUNT)
    behind = tl.maximum(length - place, 1)
    token = tl.load(text + slot * context + place + i % behind, mask=(best > 0) & (i < count), other=-1)
    tl.store(drafts + row * count + i, token.to(tl.int64), mask=i < count)


@functools.cache
def _launchers(device: int | None, blocks: int, count: int) -> tuple[Launcher, Launcher]:
    return (
        Launcher(find_kernel, {"BLOCK": PLACES, "num_warps": 4}),
        Launcher(take_kernel, {"BLOCKS": blocks, "COUNT": count, "num_warps": 1}),
    )


def launch_ngrams(text: Tensor, slots: Tensor, lengths: Tensor, shortest: int, longest: int, count: int) -> Tensor:
    """See `ngrams.draft_ngrams`."""
    rows, context = slots.shape[0], text.shape[1]
    drafts = slots.new_empty((rows, count))
    if rows == 0:
        return drafts
    slots, lengths = slots.contiguous(), lengths.contiguous()
    blocks = triton.cdiv(context, PLACES)
    found = torch.empty((rows, blocks), dtype=torch.int64, device=text.device)
    find, take = _launchers(text.device.index, triton.next_power_of_2(blocks), triton.next_power_of_2(count))
    find((blocks, rows, 1), (text, slots, lengths, found, context, blocks, shortest, longest))
    take((rows, 1, 1), (text, slots, lengths, found, drafts, context, blocks, count))
    return drafts
