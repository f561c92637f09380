"""Triton: -inf for tokens whose bit is 0. What it does: `kernels.sampling.allowed`.

A program has a block of a row's tokens. It reads the words of their bits, and of the logits that go only whether they
are NaN; what stays is not written.

Imports Triton; only the CUDA implementation imports this module.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridgen.device.launcher import Launcher

BLOCK = 2048
"""Tokens of a program."""
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(
    do_not_specialize=["vocab", "stride", "words"],
    do_not_specialize_on_alignment=["logits", "rows", "bits"],
)
def _kernel(logits, rows, bits, vocab, stride, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    line = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + line)
    inside = (token < vocab) & (row >= 0)
    word = tl.load(bits + line * words + token // 32, mask=inside, other=-1)
    banned = inside & (((word >> (token % 32)) & 1) == 0)
    place = logits + row * stride + token
    value = tl.load(place, mask=banned, other=0.0).to(tl.float32)
    tl.store(place, tl.full((BLOCK,), float("-inf"), tl.float32), mask=banned & (value == value))


@functools.cache
def _launcher(dtype: torch.dtype, device: int, block: int) -> Launcher:
    return Launcher(_kernel, {"BLOCK": block, "num_warps": 4})


def launch(logits: Tensor, rows: Tensor, bits: Tensor, block: int = BLOCK) -> None:
    """The op. `block` is a power of two."""
    if logits.dtype not in _TYPES:
        raise TypeError(f"logits of {logits.dtype}; give bfloat16, float16 or float32")
    if logits.stride(1) != 1 or not bits.is_contiguous():
        raise ValueError("the logits' columns, or the bits, do not lie beside each other")
    if len(rows) == 0 or logits.shape[1] == 0:
        return
    grid = len(rows), triton.cdiv(logits.shape[1], block), 1
    args = logits, rows, bits, logits.shape[1], logits.stride(0), bits.shape[1]
    _launcher(logits.dtype, -1 if logits.device.index is None else logits.device.index, block)(grid, args)
