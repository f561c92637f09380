"""Triton on CUDA: see `hybridgen.kernels.linear.gated`."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridgen.device.launcher import Launcher, device_of

_BLOCK = 1024


@triton.jit
def _gate_kernel(both, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < WIDTH
    gate = tl.load(both + row * (2 * WIDTH) + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * (2 * WIDTH) + WIDTH + place, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + place, value.to(out.dtype.element_ty), mask=inside)


@functools.cache
def _launcher(width: int, dtype: torch.dtype, index: int) -> Launcher:
    return Launcher(_gate_kernel, {"WIDTH": width, "BLOCK": _BLOCK, "num_warps": 4})


def gate(both: Tensor) -> Tensor:
    """silu(gate) * up of both [M, 2 * N], contiguous, gate in front of up: [M, N]."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, width, dtype=both.dtype, device=both.device)
    if rows:
        launcher = _launcher(width, both.dtype, device_of(both).ordinal)
        launcher((triton.cdiv(width, _BLOCK), rows, 1), (both, out))
    return out
