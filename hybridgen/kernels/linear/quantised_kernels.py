"""Triton: products with quantised weights of a few hundred rows, and dequantised copies for more.

What they compute: `hybridgen.kernels.linear.quantised`. The product of a tile is made the other way round,
`weight[N, K] @ x.T[K, M]`, so that the tensor cores' long side holds outputs, of which there are many, and their short
side rows, of which there are few (as in SGLang's and vLLM's swapped small-batch products). Codes are loaded as they are
and become numbers in registers. A scale is applied where it costs least: to the finished sum where it is a row's, to a
block's sum where blocks are as long as the loop's steps, else to each value, which is what the reference does.

Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from hybridgen.device.launcher import Device, Launcher, device_of
from hybridgen.kernels.linear import int4_few
from hybridgen.kernels.linear import quantised_few_kernels as few
from hybridgen.kernels.linear.codes_kernels import (
    BLOCK,
    ROW,
    VALUE,
    as_scale,
    int4_pairs,
    int4_shift,
    scale_at,
    tile_values,
)
from hybridgen.kernels.linear.layout import Block, dequantise
from hybridgen.kernels.linear.splits_kernels import add_splits

MOST_ROWS = 256
"""Rows of a product by this kernel; more are multiplied with a dequantised copy by cuBLAS."""
_WIDTH = 64
"""Outputs of a tile: what one group of four warps multiplies at once."""
_SHARED_BYTES = 227 * 2**10
"""Of a multiprocessor of compute capability 9."""


class Tile(NamedTuple):
    """How a product is cut."""

    outputs: int
    rows: int
    inputs: int
    """A step of the loop."""
    splits: int
    """Parts of the inputs, whose sums are added by a second kernel in their order."""
    warps: int
    stages: int
    registers: int = 0
    """Of a thread at most; 0: as the compiler likes."""


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["bias", "zeros"])
def _product_kernel(  # type: ignore[no-untyped-def]
    x, data, scales, zeros, bias, out, rows, outputs, inputs, width, columns,
    KIND: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, WHERE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    steps = tl.cdiv(inputs, INPUTS)
    per = tl.cdiv(steps, tl.num_programs(2))
    begin, end = split * per, tl.minimum((split + 1) * per, steps)
    inside = n < outputs
    first = (n // BLOCK_OUT) * columns
    FLOAT16: tl.constexpr = x.dtype.element_ty == tl.float16
    # Scales and zeros are asked for a step before they are needed: the compiler does so for what it multiplies alone.
    if WHERE == 1:
        next_scale = tl.load(scales + first + tl.minimum(begin * INPUTS // GROUP, columns - 1), mask=inside, other=0)
    if PAIRS:
        next_shift = int4_shift(zeros, first + tl.minimum(begin * INPUTS // GROUP, columns - 1), inside, ZEROS, FLOAT16)
        words = data + (n.to(tl.int64) * width)[:, None] + tl.arange(0, INPUTS // 8)[None, :]
    if OVERLAP:
        # What comes next starts when all programs end: earlier it would crowd the few multiprocessors with room.
        gdc_wait()
    sums = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for step in range(begin, end):
        at = step * INPUTS
        k = at + tl.arange(0, INPUTS)
        real = (m < rows)[None, :] if EVEN else (m < rows)[None, :] & (k < inputs)[:, None]
        xt = tl.load(x + m.to(tl.int64)[None, :] * inputs + k[:, None], mask=real, other=0.0)
        following = tl.minimum((at + INPUTS) // GROUP, columns - 1)
        if PAIRS:
            shift = next_shift
            next_shift = int4_shift(zeros, first + following, inside, ZEROS, FLOAT16)
            item = at // 8 + tl.arange(0, INPUTS // 8)
            mask = inside[:, None] if EVEN else inside[:, None] & (item * 8 < inputs)[None, :]
            codes = tl.load(words + at // 8, mask=mask, other=0)
            values = int4_pairs(codes, shift, OUTPUTS, INPUTS, FLOAT16)
        else:
            values = tile_values(
                data, scales, zeros, n, at, outputs, inputs, width, columns,
                KIND, ZEROS, WHERE, BLOCK_OUT, GROUP, EVEN, OUTPUTS, INPUTS,
            ).to(xt.dtype)  # fmt: skip
        if WHERE == 1:
            scale = as_scale(next_scale, KIND)
            next_scale = tl.load(scales + first + following, mask=inside, other=0)
            sums += tl.dot(values, xt, input_precision=PRECISION) * scale[:, None]
        else:
            sums = tl.dot(values, xt, sums, input_precision=PRECISION)
    if WHERE == 0:
        sums *= scale_at(scales, first, inside, KIND)[:, None]
    if BIAS:
        sums += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    places = (split.to(tl.int64) * rows + m.to(tl.int64))[None, :] * outputs + n[:, None]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=(m < rows)[None, :] & inside[:, None])


@triton.jit(do_not_specialize_on_alignment=["zeros"])
def _dequantise_kernel(  # type: ignore[no-untyped-def]
    data, scales, zeros, out, outputs, inputs, width, columns,
    KIND: tl.constexpr, ZEROS: tl.constexpr, BLOCK_OUT: tl.constexpr, GROUP: tl.constexpr, WHERE: tl.constexpr,
    EVEN: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    at = tl.program_id(0) * INPUTS
    values = tile_values(
        data, scales, zeros, n, at, outputs, inputs, width, columns,
        KIND, ZEROS, WHERE, BLOCK_OUT, GROUP, EVEN, OUTPUTS, INPUTS,
    )  # fmt: skip
    if WHERE != 2:
        places = (n // BLOCK_OUT) * columns + (at // GROUP if WHERE == 1 else 0)
        values *= scale_at(scales, places, n < outputs, KIND)[:, None]
    k = at + tl.arange(0, INPUTS)
    mask = (n < outputs)[:, None] & (k < inputs)[None, :]
    tl.store(out + n.to(tl.int64)[:, None] * inputs + k[None, :], values.to(out.dtype.element_ty), mask=mask)


class Layout(NamedTuple):
    """What a launch has to know of a weight besides its sizes."""

    kind: str
    zeros: bool
    where: int
    block_out: int
    group: int
    step: int
    """Inputs of a step of the loop."""


@functools.cache
def layout_of(kind: str, zeros: bool, inputs: int, block: Block, columns: int) -> Layout | None:
    """How a weight's scales are applied; None where its blocks do not go into steps of 128, 64 or 32 inputs."""
    if columns == 1:
        return Layout(kind, zeros, ROW, block.outputs, max(inputs, 1), 128)
    for step in (128, 64, 32):
        if block.inputs % step == 0:
            return Layout(kind, zeros, BLOCK, block.outputs, block.inputs, step)
        if step % block.inputs == 0:
            return Layout(kind, zeros, VALUE, block.outputs, block.inputs, step)
    return None


def default_tile(layout: Layout, rows: int, outputs: int, inputs: int, processors: int) -> Tile:
    """How a product of this size is cut: into as many programs as run at once, by memory and registers."""
    height = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    high = -(-rows // height)
    if layout.kind == "int4" and layout.where != VALUE and height == 64:
        return _pairs_tile(layout, outputs, inputs, processors)
    stages = 4 if height < 64 else 3
    bits = {"int4": 4, "mxfp4": 4}.get(layout.kind, 8)
    shared = stages * layout.step * (height * 2 + _WIDTH * bits // 8) + 1024
    resident = min(_SHARED_BYTES // shared, 5 if height == 16 else 3)
    tiles, steps = -(-outputs // _WIDTH) * high, -(-inputs // layout.step)
    most = 8 if height <= 16 else 4
    splits = max(1, min(most, max(1, resident) * processors // tiles, steps // 8))
    return Tile(_WIDTH, height, layout.step, splits, 4, stages)


def _pairs_tile(layout: Layout, outputs: int, inputs: int, processors: int) -> Tile:
    """Of int4 and 33 to 64 rows, by a sweep over the products of an 8B on an H200: wide tiles read x less often, and
    two programs of them run at once with 128 registers; what is too small for them is cut into more."""
    steps, tiles = -(-inputs // layout.step), -(-outputs // (2 * _WIDTH))
    if tiles >= processors or steps >= 64:
        splits = max(1, min(8, 2 * processors // tiles, steps // 8))
        return Tile(2 * _WIDTH, 64, layout.step, splits, 8, 3, 128)
    splits = max(1, min(4, 3 * processors // -(-outputs // _WIDTH), steps // 8))
    return Tile(_WIDTH, 64, layout.step, splits, 4, 3)


def _overlap(device: Device) -> dict[str, object]:
    return {"OVERLAP": device.overlap, **({"launch_pdl": True} if device.overlap else {})}


@functools.cache
def _product_launcher(
    layout: Layout, tile: Tile, bias: bool, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], device: Device
) -> Launcher:
    constants = {
        "KIND": layout.kind,
        "ZEROS": layout.zeros,
        "BIAS": bias,
        "WHERE": layout.where,
        "BLOCK_OUT": layout.block_out,
        "GROUP": layout.group,
        "EVEN": sizes[1] % tile.inputs == 0,
        "OUTPUTS": tile.outputs,
        "ROWS": tile.rows,
        "INPUTS": tile.inputs,
        "PAIRS": layout.kind == "int4" and layout.where != VALUE and dtypes[0] != torch.float32,
        "PRECISION": "ieee" if dtypes[0] == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **_overlap(device),
        **({"maxnreg": tile.registers} if tile.registers else {}),
    }
    return Launcher(_product_kernel, constants)


@functools.cache
def _dequantiser(layout: Layout, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], index: int) -> Launcher:
    constants = {
        "KIND": layout.kind,
        "ZEROS": layout.zeros,
        "BLOCK_OUT": layout.block_out,
        "GROUP": layout.group,
        "WHERE": layout.where,
        "EVEN": sizes[1] % layout.step == 0,
        "OUTPUTS": 16,
        "INPUTS": layout.step,
        "num_warps": 4,
    }
    return Launcher(_dequantise_kernel, constants)


def linear(
    x: Tensor,
    kind: str,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    inputs: int,
    block: Block,
) -> Tensor:
    """See `quantised.quantised_linear`; on CUDA."""
    layout = layout_of(kind, zeros is not None, inputs, block, scales.shape[1])
    rows = x.reshape(-1, inputs)
    if layout is not None and rows.shape[0] <= MOST_ROWS and x.element_size() == 2:
        rows = rows.contiguous()
        if kind == "int4" and block.outputs == 1 and int4_few.takes(rows, data, scales, zeros, layout.group):
            out = int4_few.product(rows, data, scales, zeros, bias, layout.group)
        elif kind == "int4" and block.outputs == 1 and few.takes(rows, data, zeros, scales.shape[1], layout.group):
            out = few.few_product(rows, data, scales, zeros, bias, layout.group)
        else:
            out = product(rows, data, scales, zeros, bias, layout, inputs)
        return out.view(*x.shape[:-1], data.shape[0])
    if layout is None:
        values = dequantise(kind, data, scales, zeros, inputs, block, x.dtype)
    else:
        values = dequantised(data, scales, zeros, layout, inputs, x.dtype)
    return F.linear(x, values, bias)


def product(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    inputs: int,
    tile: Tile | None = None,
) -> Tensor:
    """`x @ weight.T + bias` of x [M, K], contiguous; [M, N] in x's dtype.

    Args:
        layout: what `layout_of` says of the weight.
        tile: how it is cut; None for the default.
    """
    rows, outputs, columns = x.shape[0], data.shape[0], scales.shape[1]
    device = device_of(x)
    if tile is None:
        tile = default_tile(layout, rows, outputs, inputs, device.processors)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    parts = out
    if tile.splits > 1:
        parts = torch.empty(tile.splits, rows, outputs, dtype=torch.float32, device=x.device)
    grid = -(-outputs // tile.outputs), -(-rows // tile.rows), tile.splits
    sizes = outputs, inputs, data.shape[1], columns
    dtypes = x.dtype, scales.dtype
    adds_bias = bias is not None and tile.splits == 1  # else the second kernel does
    launch = _product_launcher(layout, tile, adds_bias, dtypes, sizes, device)
    tensors = x, data, scales, scales if zeros is None else zeros, x if bias is None else bias
    launch(grid, (*tensors, parts, rows, *sizes))
    if tile.splits > 1:
        add_splits(parts, bias, out)
    return out


def dequantised(
    data: Tensor, scales: Tensor, zeros: Tensor | None, layout: Layout, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The values [N, K] of a weight, as the reference rounds them."""
    outputs, columns = data.shape[0], scales.shape[1]
    out = torch.empty(outputs, inputs, dtype=dtype, device=data.device)
    sizes = outputs, inputs, data.shape[1], columns
    launch = _dequantiser(layout, (dtype, scales.dtype), sizes, device_of(data).ordinal)
    grid = -(-inputs // layout.step), -(-outputs // 16), 1
    launch(grid, (data, scales, scales if zeros is None else zeros, out, *sizes))
    return out
