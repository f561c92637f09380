"""Triton: log-probabilities of given tokens in one pass over the logits. What it does: `kernels.scoring.logprobs`.

One program a row. It goes through the row in blocks and keeps the largest logit so far, the sum of exponentials beside
it, and the lowest id of the largest. With more than one of the most likely ids, torch's `topk` finds them in the
logits' own type.

Imports Triton; only the CUDA implementation imports this module.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridgen.device.launcher import Launcher

BLOCK = 4096
"""Logits that a program reads at a time."""
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(
    do_not_specialize=["vocab", "stride"],
    do_not_specialize_on_alignment=["logits", "targets", "found", "best", "best_found", "totals"],
)
def _kernel(logits, targets, found, best, best_found, totals, vocab, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    place = tl.arange(0, BLOCK)
    largest = float("-inf")
    total = 0.0
    where = 0
    for block in range(tl.cdiv(vocab, BLOCK)):
        column = block * BLOCK + place
        inside = column < vocab
        x = tl.load(start + column, mask=inside, other=float("-inf")).to(tl.float32)
        high = tl.max(x, 0)
        here = tl.min(tl.where((x == high) & inside, column, vocab), 0)
        where = tl.where(high > largest, here, where)
        larger = tl.maximum(largest, high)
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # all of it is -inf so far
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 0)
        largest = larger
    log_total = tl.where(largest == float("-inf"), 0.0, largest) + tl.log(total)
    target = tl.load(targets + row)
    tl.store(found + row, tl.load(start + target).to(tl.float32) - log_total)
    tl.store(best + row, where)
    tl.store(best_found + row, largest - log_total)
    tl.store(totals + row, log_total)


@functools.cache
def _launcher(dtype: torch.dtype, device: int, block: int) -> Launcher:
    return Launcher(_kernel, {"BLOCK": block, "num_warps": 8})


def launch(logits: Tensor, targets: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `logprobs.with_likely` takes: found, best, best found and totals. `block` is a power of two."""
    if logits.dtype not in _TYPES:
        raise TypeError(f"logits of {logits.dtype}; give bfloat16, float16 or float32")
    rows, device = logits.shape[0], logits.device
    found, first, totals = torch.empty(3, rows, dtype=torch.float32, device=device).unbind(0)
    best = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return found, best, first, totals
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    args = logits, targets.contiguous(), found, best, first, totals, logits.shape[1], logits.stride(0)
    _launcher(logits.dtype, -1 if device.index is None else device.index, block)((rows, 1, 1), args)
    return found, best, first, totals
