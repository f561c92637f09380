"""Triton: a few rows times a 16-bit weight, bound by reading the weight once.

What it computes: `hybridgen.kernels.step.linear`. A program has a few outputs and all inputs: its weights are asked
for before it waits for the kernel that makes the rows, so that reading overlaps with that kernel's end; there are many
small programs, so that enough bytes are under way whatever the weight's size. Products and sums are float32; a row's
result depends on no other row.

Imports Triton; only the CUDA implementation imports this module.
"""

# ruff: noqa: RUF005 - Triton adds tuples, and does not unpack them
# mypy: disable-error-code="misc,assignment,var-annotated"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.device.launcher import Device, Launcher, device_of

_BLOCK = 1024
"""Inputs that a program's four warps take at once, 16 bytes a thread."""
_EARLY = 2
"""Blocks that are asked for together."""
_EACH = 2
"""Outputs of a program. Of 1, 2, 4 and 8, and of 2, 4 and 8 blocks, these were the best on an H200, by little."""


@triton.jit
def _block(weight, n, at, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    k = at + tl.arange(0, BLOCK)
    mask = (n < OUTPUTS)[:, None] & (k < INPUTS)[None, :]
    return tl.load(weight + n[:, None] * INPUTS + k[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["bias"])
def _few_rows_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, rows,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * EACH + tl.arange(0, EACH)).to(tl.int64)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((EACH, BLOCK), dtype=tl.float32),)
    for begin in tl.static_range(0, INPUTS, BLOCK * EARLY):
        blocks = ()
        for at in tl.static_range(begin, min(begin + BLOCK * EARLY, INPUTS), BLOCK):
            blocks = blocks + (_block(weight, n, at, OUTPUTS, INPUTS, BLOCK),)
        if OVERLAP and begin == 0:
            gdc_wait()
            gdc_launch_dependents()
        for number in tl.static_range(min(EARLY, (INPUTS - begin + BLOCK - 1) // BLOCK)):
            values = blocks[number].to(tl.float32)
            k = begin + number * BLOCK + tl.arange(0, BLOCK)
            added = ()
            for row in tl.static_range(ROWS):
                mask = (k < INPUTS) & (row < rows)
                one = tl.load(x + row * INPUTS + k, mask=mask, other=0.0).to(tl.float32)
                added = added + (sums[row] + values * one[None, :],)
            sums = added
    for row in tl.static_range(ROWS):
        total = tl.sum(sums[row], 1)
        if BIAS:
            total += tl.load(bias + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)
        tl.store(out + row * OUTPUTS + n, total.to(out.dtype.element_ty), mask=(n < OUTPUTS) & (row < rows))


@functools.cache
def _launcher(outputs: int, inputs: int, height: int, bias: bool, dtype: torch.dtype, device: Device) -> Launcher:
    constants = {
        "OUTPUTS": outputs,
        "INPUTS": inputs,
        "EACH": _EACH,
        "BLOCK": _BLOCK,
        "EARLY": _EARLY,
        "ROWS": height,
        "BIAS": bias,
        "OVERLAP": device.overlap,
        "num_warps": 4,
        **({"launch_pdl": True} if device.overlap else {}),
    }
    return Launcher(_few_rows_kernel, constants)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`rows @ weight.T + bias` of few rows and a weight that `linear.serves` says yes to."""
    rows = rows.contiguous()
    (count, inputs), outputs = rows.shape, weight.shape[0]
    device = device_of(rows)
    out = torch.empty(count, outputs, dtype=rows.dtype, device=rows.device)
    height = triton.next_power_of_2(count)
    launch = _launcher(outputs, inputs, height, bias is not None, rows.dtype, device)
    launch((-(-outputs // _EACH), 1, 1), (rows, weight, rows if bias is None else bias, out, count))
    return out
