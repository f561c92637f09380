"""Launches of `experts_one.cu`: chosen experts in MXFP4 for one token, on compute capability 9.0.

Only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from hybridgen.device.launcher import Device, device_of
from hybridgen.device.program import Kernel, Program
from hybridgen.kernels.linear.experts_form import Form, Projection
from hybridgen.kernels.linear.hopper import OF_ONE_TOKEN, loaded, serves

IS_ON = False
"""Whether it is used."""
PROGRAM = Program((__package__ or "",), "experts_one.cu", (), OF_ONE_TOKEN)
WARPS = 4
"""They share the inputs, as those of the kernels for few tokens do."""
RESIDENT = 4
"""Blocks of a multiprocessor at most: all of them run at once, as they wait for each other."""
EARLY = 1
"""Pieces, of four, that a block asks for before the inputs are there."""
_THREADS = 32 * WARPS
_STEP = 128 * WARPS
_TILE = 16
"""Outputs; gate and up of half as many."""
_BESIDE = 3072
"""Bytes of shared memory that a block needs beside what a launch asks for, at most."""


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "ids", "up_codes", "up_scales", "bias", "acts")),
        *((name, ctypes.c_void_p) for name in ("down_codes", "down_scales", "out", "counts")),
        *((name, ctypes.c_int) for name in ("blocks", "pairs")),
        ("trace", ctypes.c_void_p),
    )


def defines(form: Form, hidden: int, width: int, padded: tuple[int, int], resident: int) -> dict[str, str | int]:
    """Constants of the kernel for a layer's shape.

    Args:
        padded: from one row of scales to the next, of both projections.
        resident: blocks of a multiprocessor.
    """
    return {
        "ALPHA": f"{float(form.alpha)!r}f",
        "CLAMPED": int(form.activation == "clamped"),
        "DOWN_PADDED": padded[1],
        "EARLY": EARLY,
        "HIDDEN": hidden,
        "INTERLEAVED": int(form.interleaved),
        "LIMIT": f"{float(form.limit)!r}f",
        "RESIDENT": resident,
        "UP_PADDED": padded[0],
        "WIDTH": width,
    }


def shared_bytes(hidden: int, width: int, padded: tuple[int, int]) -> int:
    """Of a block: two tiles with their exponents, and the inputs."""
    tile = _TILE * max(size // 2 + line for size, line in zip((hidden, width), padded, strict=True))
    return 2 * tile + -(-max(hidden, width) // _STEP) * _STEP * 2


def resident_of(shared: int, processor_bytes: int) -> int:
    """Blocks of a multiprocessor that has so much shared memory; 0 where none fits."""
    return min(RESIDENT, processor_bytes // (shared + _BESIDE))


def blocks_of(tiles: int, pairs: int, resident: int, device: Device) -> int:
    """Blocks of a pair: as many as run at once, each with tiles `blocks` apart."""
    return min(tiles, resident * device.processors // pairs)


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


@functools.cache
def _kernel(form: Form, hidden: int, width: int, padded: tuple[int, int], ordinal: int) -> tuple[Kernel, int] | None:
    """The kernel, and the blocks of a multiprocessor."""
    shared = shared_bytes(hidden, width, padded)
    resident = resident_of(shared, torch.cuda.get_device_properties(ordinal).shared_memory_per_multiprocessor)
    if not resident:
        return None
    constants = tuple(defines(form, hidden, width, padded, resident).items())
    kernel = loaded(PROGRAM, constants, shared, ordinal, "experts in MXFP4 of one token")
    return None if kernel is None else (kernel, min(resident, kernel.resident(_THREADS)))


def product(
    x: Tensor, ids: Tensor, gate_up: Projection, down: Projection, form: Form, acts: Tensor, out: Tensor,
    counts: Tensor, blocks: int = 0,
) -> bool:  # fmt: skip
    """Both projections of a token's pairs; False, and nothing done, where the kernel does not serve them.

    Args:
        x: the token's inputs, float16 [1, L], as `arrange_kernel` has them.
        acts: the pairs' activations, float16 [pairs, L], noughts behind the experts' width; written.
        out: float32 [pairs, H]; written.
        counts: int32 [pairs], noughts; written.
        blocks: of a pair; 0 for the default.
    """
    hidden, width, bias = out.shape[1], gate_up.data.shape[1] // 2, gate_up.bias
    usual = form.activation in ("clamped", "silu") and ids.dtype == torch.int64
    biased = bias is None or (bias.dtype == torch.bfloat16 and bias.is_contiguous())
    whole = x.shape[1] == -(-hidden // _STEP) * _STEP and acts.shape[1] == -(-width // _STEP) * _STEP
    if not IS_ON or not serves(PROGRAM.kernel, x.device) or not usual or not biased or not whole:
        return False
    if not fits(gate_up, 1 if form.interleaved else 2) or not fits(down, 1):
        return False
    device, pairs = device_of(x), ids.numel()
    assert gate_up.scales is not None
    assert down.scales is not None
    padded = gate_up.scales.stride(1), down.scales.stride(1)
    found = _kernel(form._replace(transposed=False), hidden, width, padded, device.ordinal)
    most = 0 if found is None else blocks_of(2 * width // _TILE, pairs, found[1], device)
    if found is None or not most:
        return False
    count = min(blocks or most, most)
    tensors = x, ids, gate_up.data, gate_up.scales, bias, acts, down.data, down.scales, out, counts
    arguments = Arguments(*(0 if each is None else each.data_ptr() for each in tensors), count, pairs, 0)
    found[0].launch_early(count * pairs, _THREADS, arguments, torch.cuda.current_stream(x.device).cuda_stream)
    return True
