"""Triton: sums of products whose inputs were cut into parts, added in their order.

Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.device.launcher import Device, Launcher, device_of

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["bias"])
def add_splits_kernel(  # type: ignore[no-untyped-def]
    parts, bias, out, count, outputs, BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + count.to(tl.int64) * split + place, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias + place % outputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@functools.cache
def _adder(splits: int, bias: bool, dtype: torch.dtype, outputs: int, device: Device) -> Launcher:
    overlap = {"OVERLAP": device.overlap, **({"launch_pdl": True} if device.overlap else {})}
    return Launcher(add_splits_kernel, {"BIAS": bias, "SPLITS": splits, "BLOCK": _BLOCK, "num_warps": 4, **overlap})


def add_splits(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the sum of parts, float32 [splits, M, N], and bias [N] to out [M, N]."""
    (splits, _, outputs), count = parts.shape, out.numel()
    add = _adder(splits, bias is not None, out.dtype, outputs, device_of(out))
    add((-(-count // _BLOCK), 1, 1), (parts, out if bias is None else bias, out, count, outputs))
