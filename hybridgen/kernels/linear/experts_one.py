"""Launches of `experts_one.cu`: chosen experts in MXFP4 for one token, on compute capability 9.0.

Only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.device.launcher import Device, device_of
from hybridgen.device.program import Kernel, Program
from hybridgen.kernels.hopper import OF_ONE_TOKEN, loaded, prefers, serves
from hybridgen.kernels.linear.experts_form import Form, Projection, sizes_of

IS_ON = True
"""Whether it is used, where a trial finds it right and faster; benchmarks turn it off."""
PROGRAM = Program((__package__ or "",), "experts_one.cu", (), OF_ONE_TOKEN)
WARPS = 4
"""They share the inputs, as those of the kernels for few tokens do."""
STAGES = 5
RESIDENT = 6
"""Blocks of a multiprocessor."""
_THREADS = 32 * WARPS
_STAGE_BYTES = 2 * _THREADS * 16
_STEP = 128 * WARPS


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "ids", "codes", "scales", "bias", "out")),
        *((name, ctypes.c_int) for name in ("blocks", "turns")),
    )


def defines(
    form: Form, outputs: int, inputs: int, padded: int, out_length: int, gated: bool, ahead: bool = False
) -> dict[str, str | int]:
    """Constants of the kernel for a projection.

    Args:
        padded: from one row of scales to the next.
        out_length: of a pair's activations, as down reads them.
        gated: it is gate and up.
        ahead: its inputs are there before it waits, and its experts are not.
    """
    return {
        "AHEAD": int(ahead),
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
        "STAGES": STAGES,
        "STEPS": -(-inputs // _STEP),
    }


def turns_of(tiles: int, pairs: int, device: Device) -> int:
    """Tiles of a block: as few as let all blocks run at once."""
    return max(1, -(-tiles * pairs // (RESIDENT * device.processors)))


def _launcher(
    part: Projection, form: Form, outputs: int, inputs: int, out_length: int, gated: bool, ahead: bool, ordinal: int
) -> Kernel | None:
    assert part.scales is not None
    constants = defines(form, outputs, inputs, part.scales.stride(1), out_length, gated, ahead)
    shared = STAGES * _STAGE_BYTES + -(-inputs // _STEP) * _STEP * 2
    return loaded(PROGRAM, tuple(sorted(constants.items())), shared, ordinal, "experts in MXFP4 of one token")


class Launches(NamedTuple):
    """The kernels of a layer's shape, and where they run."""

    gate_up: Kernel
    down: Kernel
    device: Device


def length_of(inputs: int) -> int:
    """Of a row of inputs in memory."""
    return -(-inputs // _STEP) * _STEP


def launches(
    device: torch.device, hidden: int, gate_up: Projection, down: Projection, form: Form, ahead: bool = False
) -> Launches | None:
    """The kernels for a layer; None where they do not serve it.

    Args:
        ahead: the token's inputs are there since the kernel before the last one ended, and the last one chooses.
    """
    outputs, bias = gate_up.data.shape[1], gate_up.bias
    width = outputs // 2
    biased = bias is None or (bias.dtype == torch.bfloat16 and bias.is_contiguous())
    aligned = not gate_up.data.data_ptr() % 16 and not down.data.data_ptr() % 16
    usual = form.activation in ("clamped", "silu")
    if not serves(PROGRAM.kernel, device) or not usual or not biased or not aligned:
        return None
    ordinal = device.index or 0
    first = _launcher(gate_up, form, outputs, hidden, length_of(width), True, ahead, ordinal)
    second = _launcher(down, form, hidden, width, length_of(width), False, False, ordinal)
    return None if first is None or second is None else Launches(first, second, device_of(gate_up.data))


def launch(
    kernels: Launches, x: Tensor, ids: Tensor, gate_up: Projection, down: Projection, acts: Tensor, out: Tensor,
    turns: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    """Both projections of a token's pairs.

    Args:
        x: the token's inputs, float16 [1, L], as `arrange_kernel` has them.
        ids: int64.
        acts: the pairs' activations, float16 [pairs, L], noughts behind the experts' width; written.
        out: float32 [pairs, H]; written.
        turns: tiles of a block of both; 0 for the default.
    """
    pairs, stream = ids.numel(), torch.cuda.current_stream(x.device).cuda_stream
    width, hidden = gate_up.data.shape[1] // 2, out.shape[1]
    steps = (
        (kernels.gate_up, x, gate_up, gate_up.bias, acts, -(-width // 8), turns[0]),
        (kernels.down, acts, down, None, out, -(-hidden // 16), turns[1]),
    )
    for kernel, inputs, part, its_bias, to, tiles, given in steps:
        turns_each = given or turns_of(tiles, pairs, kernels.device)
        blocks = -(-tiles // turns_each)
        tensors = inputs, ids, part.data, part.scales, its_bias, to
        pointers = (0 if each is None else each.data_ptr() for each in tensors)
        kernel.launch_early(blocks * pairs, _THREADS, Arguments(*pointers, blocks, turns_each), stream)


def product(
    x: Tensor, ids: Tensor, gate_up: Projection, down: Projection, form: Form, acts: Tensor, out: Tensor,
    turns: tuple[int, int] = (0, 0),
) -> bool:  # fmt: skip
    """`launch`, where the kernels serve; False, and nothing done, where they do not."""
    hidden, width = out.shape[1], gate_up.data.shape[1] // 2
    whole = x.shape[1] == length_of(hidden) and acts.shape[1] == length_of(width)
    if not IS_ON or ids.dtype != torch.int64 or not whole:
        return False
    if not prefers(OF_ONE_TOKEN, x.device, sizes_of(gate_up, down)):
        return False
    kernels = launches(x.device, hidden, gate_up, down, form)
    if kernels is None:
        return False
    launch(kernels, x, ids, gate_up, down, acts, out, turns)
    return True
