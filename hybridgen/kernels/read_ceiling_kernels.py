"""Triton: read everything, keep nothing. What for: `hybridgen.kernels.read_ceiling`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

CONFIGS = ((4096, 4), (8192, 4), (16384, 8), (16384, 16))
"""(elements of a program, warps) to try."""


@triton.jit
def _read_kernel(values, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    total = tl.sum(tl.load(values + start + tl.arange(0, BLOCK), eviction_policy="evict_first"))
    # A sum that practically never occurs: the loads must happen, and nothing else.
    if total == -1987654321:
        tl.store(sums, total)


def read_all(values: Tensor, sums: Tensor, block: int, warps: int) -> None:
    """Read int32 [n], n a multiple of every block size; `sums` int32 [1] is scratch."""
    _read_kernel[(values.shape[0] // block,)](values, sums, block, num_warps=warps)
