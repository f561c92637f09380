"""Launches of the kernels of chosen experts in MXFP4 for few tokens; see `experts_few_kernels`.

Imports Triton; only the CUDA implementation imports this module.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hybridgen.device.launcher import Device, Launcher, device_of
from hybridgen.kernels.linear import experts_one
from hybridgen.kernels.linear.experts_few_kernels import arrange_kernel, few_down_kernel, few_gate_up_kernel
from hybridgen.kernels.linear.experts_form import FEW_ROWS, Form, Projection

COLUMNS = 8
"""Tokens of a program."""
UNPLANNED_ROWS = 8
"""Tokens up to which a program finds its pairs by itself."""
_STEP = 128
_MOST_STEPS = 8
_ARRANGED = 1024
"""Inputs of a program that arranges them."""


class FewTile(NamedTuple):
    """How a product is cut."""

    warps: int
    """They share the inputs."""
    tiles: int
    """Of 16 outputs: 1 or 2."""
    registers: int = 0
    """Of a thread at most; 0: as the compiler likes."""
    turns: int = 1
    """Tiles of a program, one after the other."""
    late: bool = False
    """The next kernel starts with the last turn, not as soon as it can."""


class FewShape(NamedTuple):
    """What is fixed of a projection."""

    outputs: int
    inputs: int
    padded: int
    """From one row of scales to the next."""

    def steps(self, tile: FewTile) -> int:
        """Of a warp."""
        return -(-self.inputs // (_STEP * tile.warps))

    def length(self, tile: FewTile) -> int:
        """Of a token's inputs in memory."""
        return self.steps(tile) * tile.warps * _STEP


def takes_few(kind: str, block: tuple[int, int], x: Tensor, tokens: int, gate_up: Projection, down: Projection) -> bool:
    """Whether these kernels are for a call."""
    if kind != "mxfp4" or block != (1, 32) or x.dtype != torch.bfloat16 or not 0 < tokens <= FEW_ROWS:
        return False
    widths = x.shape[1], gate_up.data.shape[1] // 2
    whole = all(
        one.scales is not None and one.data.shape[2] * 2 == k for one, k in zip((gate_up, down), widths, strict=True)
    )
    return whole and all(k % 32 == 0 and k <= _STEP * _MOST_STEPS * 8 for k in widths)


def default_tile(inputs: int) -> FewTile:
    """How a projection is cut, by its size alone."""
    return FewTile(4 if inputs <= 4 * _STEP * _MOST_STEPS else 8, 1)


def _common(shape: FewShape, tile: FewTile, device: Device) -> dict[str, object]:
    return {
        "OVERLAP": device.overlap,
        "ALL": shape.outputs,
        "GROUPS": shape.inputs // 32,
        "PADDED": shape.padded,
        "LENGTH": shape.length(tile),
        "WARPS": tile.warps,
        "STEPS": shape.steps(tile),
        "TILES": tile.tiles,
        "TURNS": tile.turns,
        "LATE": tile.late,
        "num_warps": tile.warps,
        **({"launch_pdl": True} if device.overlap else {}),
        **({"maxnreg": tile.registers} if tile.registers else {}),
    }


class Calls(NamedTuple):
    """The kernels of a layer's shape."""

    arrange: Launcher
    gate_up: Launcher
    down: Launcher


@functools.cache
def _calls(
    first: FewShape, second: FewShape, tiles: tuple[FewTile, FewTile], form: Form, chosen: int, bias: bool,
    planned: bool, most: int, alone: bool, dtypes: tuple[torch.dtype | None, ...], device: Device,
) -> Calls:  # fmt: skip
    pairs = {"PLANNED": planned, "PAIRS": most, "ALONE": alone}
    lengths = first.length(tiles[0]), second.length(tiles[1])
    arrange = {
        "INPUTS": first.inputs,
        "LENGTH": lengths[0],
        "WIDTH": second.inputs,
        "ACTS_LENGTH": lengths[1],
        "BLOCK": _ARRANGED,
        "OVERLAP": device.overlap,
        "num_warps": 4,
        **({"launch_pdl": True} if device.overlap else {}),
    }
    gate_up = {
        "CHOSEN": chosen,
        **pairs,
        "INTERLEAVED": form.interleaved,
        "ACTIVATION": form.activation,
        "ALPHA": form.alpha,
        "LIMIT": form.limit,
        "BIAS": bias,
        "OUT_LENGTH": lengths[1],
        **_common(first, tiles[0], device),
    }
    return Calls(
        Launcher(arrange_kernel, arrange),
        Launcher(few_gate_up_kernel, gate_up),
        Launcher(few_down_kernel, {**pairs, **_common(second, tiles[1], device)}),
    )


def few_products(
    x: Tensor, ids: Tensor, order: Tensor, blocks: Tensor, gate_up: Projection, down: Projection, form: Form,
    planned: bool, tiles: tuple[FewTile, FewTile] | None = None,
) -> Tensor:  # fmt: skip
    """What down gives for each pair, without its bias, float32 [pairs, H]. All that is given is contiguous.

    Args:
        order, blocks: of `experts_launch.plan` with `COLUMNS`, if `planned`.
        tiles: of both projections; None for the defaults.
    """
    tokens, chosen = ids.shape
    pairs, hidden, width = tokens * chosen, x.shape[1], gate_up.data.shape[1] // 2
    assert gate_up.scales is not None
    assert down.scales is not None
    first = FewShape(2 * width, hidden, gate_up.scales.stride(1))
    second = FewShape(hidden, width, down.scales.stride(1))
    tiles = tiles or (default_tile(hidden), default_tile(width))
    alone = tokens == 1
    # Not a kernel for each number of tokens.
    most = 1 if planned else triton.next_power_of_2((1 if alone else UNPLANNED_ROWS) * chosen)
    programs = blocks.shape[0] if planned else pairs
    bias = gate_up.bias
    dtypes = x.dtype, ids.dtype, None if bias is None else bias.dtype
    calls = _calls(first, second, tiles, form, chosen, bias is not None, planned, most, alone, dtypes, device_of(x))
    inputs = torch.empty(tokens, first.length(tiles[0]), dtype=torch.float16, device=x.device)
    acts = torch.empty(pairs, second.length(tiles[1]), dtype=torch.float16, device=x.device)
    out = torch.empty(pairs, hidden, dtype=torch.float32, device=x.device)
    parts = -(-max(inputs.shape[1], acts.shape[1]) // _ARRANGED)
    calls.arrange((tokens, parts, 1), (x, inputs, acts, chosen))
    if alone and experts_one.product(inputs, ids, gate_up, down, form, acts, out):
        return out
    chosen_by = ids, order, blocks
    codes = gate_up.data.view(torch.int32), gate_up.scales, x if bias is None else bias
    grid = -(-width // (8 * tiles[0].tiles * tiles[0].turns)), programs, 1
    calls.gate_up(grid, (inputs, *chosen_by, *codes, acts, pairs))
    grid = -(-hidden // (16 * tiles[1].tiles * tiles[1].turns)), programs, 1
    calls.down(grid, (acts, *chosen_by, down.data.view(torch.int32), down.scales, out, pairs))
    return out
