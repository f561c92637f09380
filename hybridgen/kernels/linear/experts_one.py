"""Launches of `experts_one.cu`: chosen experts in MXFP4 for one token, on compute capability 9.0.

Only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hybridgen.device.launcher import Device, device_of
from hybridgen.device.program import Kernel, Program
from hybridgen.kernels.linear.experts_form import Form, Projection
from hybridgen.kernels.linear.hopper import is_hopper, loaded

IS_ON = False
"""Whether it is used. It has not run on a GPU yet."""
PROGRAM = Program((__package__ or "",), "experts_one.cu", (), "experts_one")
WARPS = 4
"""They share the inputs, as those of the kernels for few tokens do."""
RESIDENT = 4
"""Blocks of a multiprocessor."""
_THREADS = 32 * WARPS
_STEP = 128 * WARPS
_TILE = 16
"""Outputs; gate and up of half as many."""


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "ids", "codes", "scales", "bias", "out")),
        *((name, ctypes.c_int) for name in ("tiles", "blocks", "pairs")),
    )


def defines(form: Form, outputs: int, inputs: int, padded: int, out_length: int, gated: bool) -> dict[str, str | int]:
    """Constants of the kernel for a projection.

    Args:
        padded: from one row of scales to the next.
        out_length: of a pair's activations, as down reads them.
        gated: it is gate and up.
    """
    return {
        "ALL": outputs,
        "ALPHA": f"{float(form.alpha)!r}f",
        "CLAMPED": int(form.activation == "clamped"),
        "GATED": int(gated),
        "GROUPS": inputs // 32,
        "INTERLEAVED": int(form.interleaved),
        "LIMIT": f"{float(form.limit)!r}f",
        "OUT_LENGTH": out_length,
        "PADDED": padded,
        "RESIDENT": RESIDENT,
        "STEPS": -(-inputs // _STEP),
    }


def blocks_of(tiles: int, pairs: int, device: Device) -> int:
    """Blocks of a pair: as many as run at once, each with tiles `blocks` apart."""
    return max(1, min(tiles, RESIDENT * device.processors // pairs))


def fits(part: Projection, halves: int) -> bool:
    """Whether tiles of a projection are whole, and pieces of memory that bulk copies take.

    Args:
        halves: pieces of a tile: 2 where gate and up lie apart.
    """
    assert part.scales is not None
    outputs, padded, rows = part.data.shape[1], part.scales.stride(1), _TILE // halves
    whole = outputs % _TILE == 0 and rows * padded % 16 == 0 and outputs // halves * padded % 16 == 0
    places = (part.data, part.scales)
    return whole and part.scales.stride(0) == outputs * padded and not any(each.data_ptr() % 16 for each in places)


def _launcher(
    part: Projection, form: Form, outputs: int, inputs: int, out_length: int, gated: bool, ordinal: int
) -> Kernel | None:
    assert part.scales is not None
    constants = defines(form, outputs, inputs, part.scales.stride(1), out_length, gated)
    shared = 2 * _TILE * (inputs // 2 + part.scales.stride(1)) + -(-inputs // _STEP) * _STEP * 2
    return loaded(PROGRAM, tuple(sorted(constants.items())), shared, ordinal, "experts in MXFP4 of one token")


def product(
    x: Tensor, ids: Tensor, gate_up: Projection, down: Projection, form: Form, acts: Tensor, out: Tensor,
    blocks: tuple[int, int] = (0, 0),
) -> bool:  # fmt: skip
    """Both projections of a token's pairs; False, and nothing done, where the kernel does not serve them.

    Args:
        x: the token's inputs, float16 [1, L], as `arrange_kernel` has them.
        acts: the pairs' activations, float16 [pairs, L], noughts behind the experts' width; written.
        out: float32 [pairs, H]; written.
        blocks: of a pair, for both; 0 for the default.
    """
    outputs, hidden = gate_up.data.shape[1], out.shape[1]
    width, bias = outputs // 2, gate_up.bias
    usual = form.activation in ("clamped", "silu") and ids.dtype == torch.int64
    biased = bias is None or (bias.dtype == torch.bfloat16 and bias.is_contiguous())
    whole = x.shape[1] == -(-hidden // _STEP) * _STEP and acts.shape[1] == -(-width // _STEP) * _STEP
    if not IS_ON or not x.is_cuda or not usual or not biased or not whole:
        return False
    if not fits(gate_up, 1 if form.interleaved else 2) or not fits(down, 1):
        return False
    device = device_of(x)
    if not is_hopper(device.ordinal):
        return False
    first = _launcher(gate_up, form, outputs, hidden, acts.shape[1], True, device.ordinal)
    second = _launcher(down, form, hidden, width, acts.shape[1], False, device.ordinal)
    if first is None or second is None:
        return False
    pairs, stream = ids.numel(), torch.cuda.current_stream(x.device).cuda_stream
    steps = (
        (first, x, gate_up, bias, acts, outputs // _TILE, blocks[0]),
        (second, acts, down, None, out, hidden // _TILE, blocks[1]),
    )
    for kernel, inputs, part, its_bias, to, tiles, given in steps:
        count = given or blocks_of(tiles, pairs, device)
        tensors = inputs, ids, part.data, part.scales, its_bias, to
        pointers = (0 if each is None else each.data_ptr() for each in tensors)
        kernel.launch_early(count * pairs, _THREADS, Arguments(*pointers, tiles, count, pairs), stream)
    return True
