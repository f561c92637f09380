"""Triton and torch's scaled product on CUDA: see `hybridgen.kernels.linear.rounded_rows`."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import ScalingType

from hybridgen.device.launcher import Launcher, device_of
from hybridgen.kernels.linear.rounded_rows import row_scales

_LONGEST = 32768
"""Numbers of a row that one program holds."""


@triton.jit
def _round_kernel(x, codes, scales, INPUTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    values = tl.load(x + row * INPUTS + place, mask=place < INPUTS, other=0.0).to(tl.float32)
    # A maximum passes over what is no number; a sum of zeros times it does not.
    poison = tl.sum(values * 0.0, 0)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / 448.0, 7.888609052210118e-31) + poison
    values = values / scale
    values = tl.where(values > 448.0, 448.0, tl.where(values < -448.0, -448.0, values))
    tl.store(codes + row * INPUTS + place, values.to(codes.dtype.element_ty), mask=place < INPUTS)
    tl.store(scales + row, scale)


@functools.cache
def _rounder(inputs: int, dtype: torch.dtype, index: int) -> Launcher:
    block = triton.next_power_of_2(inputs)
    return Launcher(_round_kernel, {"INPUTS": inputs, "BLOCK": block, "num_warps": max(4, min(16, block // 512))})


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `rounded_rows.round_rows`; x is contiguous."""
    rows, inputs = x.shape
    codes = torch.empty(rows, inputs, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _rounder(inputs, x.dtype, device_of(x).ordinal)((rows, 1, 1), (x, codes, scales))
    return codes, scales


def fits(x: Tensor) -> bool:
    """Whether rows [M, K] are of those that `product` takes; torch's product gives bfloat16 alone."""
    return x.dtype == torch.bfloat16 and x.shape[1] <= _LONGEST and torch.cuda.get_device_capability(x.device) >= (9, 0)


def product(
    x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, block_outputs: int, *, fast: bool = False
) -> Tensor:
    """See `rounded_rows.reference`; of rows that `fits`.

    Args:
        fast: sums in the tensor cores' own precision, of about 14 bits, instead of moving them to float32 on the way.
    """
    codes, row_scale = round_rows(x.contiguous())
    weight_scale = row_scales(scales, data.shape[0], block_outputs).contiguous()[None]
    row_wise = ScalingType.RowWise
    return F.scaled_mm(
        codes,
        data.t(),
        row_scale,
        row_wise,
        weight_scale,
        row_wise,
        bias=bias,
        output_dtype=x.dtype,
        use_fast_accum=fast,
    )
