"""Launches of the kernels of experts: how products are cut, and which pairs programs take.

Imports Triton; only the CUDA implementation imports this module.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hybridgen.device.launcher import Device, Launcher, device_of
from hybridgen.kernels.linear.codes_kernels import BLOCK, ROW, VALUE
from hybridgen.kernels.linear.experts_few import COLUMNS, UNPLANNED_ROWS, FewTile, few_products, takes_few
from hybridgen.kernels.linear.experts_form import DENSE, FEW_ROWS, Form, Projection
from hybridgen.kernels.linear.experts_kernels import combine_kernel, down_kernel, gate_up_kernel

_COMBINED = 1024
"""Outputs of a program of the weighted sum."""


class Tile(NamedTuple):
    """How a product is cut."""

    outputs: int
    rows: int
    inputs: int
    """A step of the loop."""
    splits: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """What is fixed of a projection."""

    kind: str
    outputs: int
    inputs: int
    transposed: bool
    zeros: bool
    bias: bool
    columns: int
    """Of the scales of an expert."""
    padded: int
    """From one row of them to the next."""
    lines: int
    """Rows of the scales of an expert."""
    block_outputs: int
    block_inputs: int


def where_scales(shape: Shape, step: int) -> int | None:
    """Where the scales of a packed weight are applied in steps of so many inputs; None: its blocks don't fit."""
    if shape.kind == DENSE or shape.columns == 1:
        return ROW
    if shape.block_inputs % step == 0:
        return BLOCK
    return VALUE if step % shape.block_inputs == 0 else None


def default_tile(shape: Shape, chosen: int, many: bool, dtype: torch.dtype, processors: int, cuts: bool) -> Tile:
    """How a projection is cut; of few tokens by the weights' shapes alone.

    Args:
        cuts: whether the inputs may be cut.
    """
    step = 32 if dtype == torch.float32 else 64 if shape.kind == "fp8" or (many and shape.kind != "mxfp4") else 128
    if shape.kind != DENSE and where_scales(shape, step) is None:
        step = 32
    if many:
        return Tile(128 if dtype != torch.float32 else 64, 64, step, 1, 8, 3)
    tiles, steps = -(-shape.outputs // 64) * chosen, -(-shape.inputs // step)
    splits = max(1, min(4, -(-5 * processors // (2 * tiles)), steps // 4)) if cuts else 1
    return Tile(64, 16, step, splits, 4, 4)


def takes(kind: str, block_inputs: int, columns: int) -> bool:
    """Whether blocks of a packed weight go into the kernels' steps."""
    return columns == 1 or any(block_inputs % step == 0 or step % block_inputs == 0 for step in (128, 64, 32))


def shape_of(one: Projection, kind: str, inputs: int, block: tuple[int, int], transposed: bool) -> Shape:
    """What is fixed of a projection."""
    data, scales = one.data, one.scales
    outputs = data.shape[2] if transposed else data.shape[1]
    lines, columns = (1, 1) if scales is None else scales.shape[1:]
    padded = columns if scales is None else scales.stride(1)
    zeros, bias = one.zeros is not None, one.bias is not None
    return Shape(
        kind, outputs, inputs, transposed, zeros, bias, columns, padded, lines, block[0] or 1, block[1] or inputs
    )


def unpacks(shape: Shape, tile: Tile, dtype: torch.dtype) -> bool:
    """Whether a packed weight becomes numbers by words, in the order of the tensor cores' operand."""
    if shape.kind == "mxfp4":
        usual = shape.block_inputs == 32 and shape.block_outputs == 1 and shape.inputs % 8 == 0
        return usual and dtype == torch.bfloat16 and tile.inputs == 128 and shape.padded % 4 == 0
    if shape.kind not in ("int4", "fp8") or where_scales(shape, tile.inputs) == VALUE:
        return False
    return dtype != torch.float32 or (shape.kind == "fp8" and tile.inputs >= 32)


def constants_of(shape: Shape, tile: Tile, dtype: torch.dtype) -> dict[str, object]:
    """What the product of a projection is compiled for."""
    where = where_scales(shape, tile.inputs)
    assert where is not None
    codes = {"int4": 8, "mxfp4": 8 if unpacks(shape, tile, dtype) else 2}.get(shape.kind, 1)
    return {
        "KIND": shape.kind,
        "TRANSPOSED": shape.transposed,
        "ZEROS": shape.zeros,
        "WHERE": where,
        "BLOCK_OUT": shape.block_outputs,
        "GROUP": shape.block_inputs,
        "ALL": shape.outputs,
        "INPUTS": shape.inputs,
        "WIDTH": -(-shape.inputs // codes),
        "LINES": shape.lines,
        "COLUMNS": shape.padded // 4 if codes == 8 and shape.kind == "mxfp4" else shape.padded,
        "EVEN": shape.inputs % tile.inputs == 0,
        "OUTPUTS": tile.outputs,
        "ROWS": tile.rows,
        "STEP": tile.inputs,
        "UNPACKS": unpacks(shape, tile, dtype),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _overlap(device: Device) -> dict[str, object]:
    return {"OVERLAP": device.overlap, **({"launch_pdl": True} if device.overlap else {})}


@functools.cache
def _gate_up(
    shape: Shape, tile: Tile, form: Form, chosen: int, planned: bool, most: int, dtypes: tuple[torch.dtype | None, ...],
    device: Device,
) -> Launcher:  # fmt: skip
    own = {"CHOSEN": chosen, "PLANNED": planned, "PAIRS": most, "INTERLEAVED": form.interleaved, "BIAS": shape.bias}
    activation = {"ACTIVATION": form.activation, "ALPHA": form.alpha, "LIMIT": form.limit}
    return Launcher(gate_up_kernel, {**own, **activation, **_overlap(device), **constants_of(shape, tile, dtypes[0])})  # type: ignore[arg-type]


@functools.cache
def _down(
    shape: Shape, tile: Tile, planned: bool, most: int, dtypes: tuple[torch.dtype | None, ...], device: Device
) -> Launcher:
    own = {"PLANNED": planned, "PAIRS": most}
    return Launcher(down_kernel, {**own, **_overlap(device), **constants_of(shape, tile, dtypes[0])})  # type: ignore[arg-type]


@functools.cache
def _combine(
    outputs: int, chosen: int, splits: int, bias: bool, dtypes: tuple[torch.dtype | None, ...], device: Device
) -> Launcher:
    sizes = {"CHOSEN": chosen, "SPLITS": splits, "ALL": outputs, "BIAS": bias, "OUTPUTS": _COMBINED}
    return Launcher(combine_kernel, {**sizes, **_overlap(device), "num_warps": 4})


def plan(ids: Tensor, experts: int, height: int) -> tuple[Tensor, Tensor]:
    """Pairs sorted by their experts, int32 [pairs], and blocks of up to `height` of them of one expert, int32 [blocks,
    3]: expert, first, stop; expert -1 for blocks that nobody needs. Nothing is decided on the host."""
    flat = ids.reshape(-1)
    chosen, order = torch.sort(flat, stable=True)
    everyone = torch.arange(experts + 1, device=ids.device)
    starts = torch.searchsorted(chosen, everyone)
    each = (starts[1:] - starts[:-1] + height - 1) // height
    ends = each.cumsum(0)
    blocks = torch.arange(min(flat.numel(), experts) + flat.numel() // height, device=ids.device)
    expert = torch.searchsorted(ends, blocks, right=True)
    own = expert.clamp(max=experts - 1)
    first = starts[own] + (blocks - ends[own] + each[own]) * height
    stop = torch.minimum(first + height, starts[own + 1])
    return order.int(), torch.stack((torch.where(expert < experts, expert, -1), first, stop), 1).int()


def _read_as(one: Projection, shape: Shape, tile: Tile, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Data and scales as the kernel reads them: of MXFP4 words of eight codes, and words of four exponents."""
    data, scales = one.data, one.scales
    if shape.kind != "mxfp4" or scales is None or not unpacks(shape, tile, dtype):
        return data, scales
    # With what lies behind each row up to a multiple of four bytes, which no code is multiplied with.
    size, stride = (data.shape[0], shape.lines, shape.padded), (shape.lines * shape.padded, shape.padded, 1)
    return data.view(torch.int32), scales.as_strided(size, stride).view(torch.int32)


def experts_on_cuda(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_zeros: Tensor | None,
    down_bias: Tensor | None,
    kind: str,
    block_outputs: int,
    block_inputs: int,
    transposed: bool,
    interleaved: bool,
    activation: str,
    alpha: float,
    limit: float,
    tiles: tuple[Tile, Tile] | None = None,
    few_tiles: tuple[FewTile, FewTile] | None = None,
) -> Tensor:
    """See `experts`; on CUDA.

    Args:
        tiles: of both projections, without the kernels for few tokens in MXFP4; None for the defaults.
        few_tiles: of those kernels.
    """
    form = Form(activation, interleaved, transposed, alpha, limit)
    up_part = Projection(gate_up, gate_up_scales, gate_up_zeros, gate_up_bias)
    down_part = Projection(down, down_scales, down_zeros, down_bias)
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    tokens, chosen = ids.shape
    pairs, hidden = tokens * chosen, x.shape[1]
    block = block_outputs, block_inputs
    first = shape_of(up_part, kind, hidden, block, transposed)
    width = first.outputs // 2
    second = shape_of(down_part, kind, width, block, transposed)
    if not tokens:
        return torch.empty_like(x)
    device, many = device_of(x), tokens > FEW_ROWS
    if tiles is None and takes_few(kind, block, x, tokens, up_part, down_part):
        planned = tokens > UNPLANNED_ROWS
        order, blocks = plan(ids, gate_up.shape[0], COLUMNS) if planned else (ids, ids)
        parts = few_products(x, ids, order, blocks, up_part, down_part, form, planned, few_tiles)
        return _combined(x, ids, weights, parts[None], down_bias, device)
    if tiles is None:
        tiles = (
            default_tile(first, chosen, many, x.dtype, device.processors, cuts=False),
            default_tile(second, chosen, many, x.dtype, device.processors, cuts=True),
        )
    order = blocks = ids
    # Not a kernel for each number of tokens.
    most = next(size for size in (1, 8, FEW_ROWS, tokens) if tokens <= size)
    programs, most = pairs, triton.next_power_of_2(most * chosen)
    if many:
        order, blocks = plan(ids, gate_up.shape[0], tiles[0].rows)
        programs, most = blocks.shape[0], 1
    acts = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    data, scales = _read_as(up_part, first, tiles[0], x.dtype)
    tensors = [x if each is None else each for each in (scales, gate_up_zeros, gate_up_bias)]
    dtypes = x.dtype, tensors[0].dtype, ids.dtype, weights.dtype
    grid = -(-width // (tiles[0].outputs // 2)), programs, 1
    launch = _gate_up(first, tiles[0], form, chosen, many, most, dtypes, device)
    launch(grid, (x, ids, order, blocks, data, *tensors, acts, pairs))
    splits = tiles[1].splits
    parts = torch.empty(splits, pairs, hidden, dtype=x.dtype if many else torch.float32, device=x.device)
    data, scales = _read_as(down_part, second, tiles[1], x.dtype)
    tensors = [x if each is None else each for each in (scales, down_zeros)]
    grid = -(-hidden // tiles[1].outputs), programs, splits
    launch = _down(second, tiles[1], many, most, dtypes, device)
    launch(grid, (acts, ids, order, blocks, data, *tensors, parts, pairs))
    return _combined(x, ids, weights, parts, down_bias, device)


def _combined(x: Tensor, ids: Tensor, weights: Tensor, parts: Tensor, bias: Tensor | None, device: Device) -> Tensor:
    """The weighted sums over each token's experts; parts: [splits, pairs, H]."""
    (tokens, chosen), hidden = ids.shape, x.shape[1]
    out = torch.empty_like(x)
    dtypes = x.dtype, ids.dtype, weights.dtype, None if bias is None else bias.dtype, parts.dtype
    launch = _combine(hidden, chosen, parts.shape[0], bias is not None, dtypes, device)
    grid = -(-hidden // _COMBINED), tokens, 1
    launch(grid, (parts, ids, weights, x if bias is None else bias, out, tokens * chosen))
    return out
