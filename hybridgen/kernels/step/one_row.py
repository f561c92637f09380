"""Launches of `one_row.cu`: one row times a weight in bfloat16, on compute capability 9.0.

Only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.device.launcher import device_of
from hybridgen.device.program import Kernel, Program
from hybridgen.kernels.hopper import OF_ONE_ROW, loaded, serves

IS_ON = False
"""Whether it is used. It has not run on a GPU."""
PROGRAM = Program((__package__ or "",), "one_row.cu", (), OF_ONE_ROW)
_PART = 16
_SHARED = 232448 - 1024
"""Bytes of a block at most, without what is beside the slots and the row."""
_MOST_INPUTS, _MOST_ROWS = 8192, 4
_WARPS = range(24, 7, -1)


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        ("outputs", ctypes.c_int),
    )


class Cut(NamedTuple):
    """How a weight is divided."""

    warps: int
    """Of a block; a multiprocessor has one block."""
    rows: int
    """Outputs of a warp."""
    depth: int
    """Parts of 16 bytes that a thread has room for."""


@functools.cache
def cut_of(outputs: int, inputs: int, processors: int) -> Cut | None:
    """As even as can be, with as many warps as can be; None where a warp would have too many outputs."""
    if inputs % 8 or inputs > _MOST_INPUTS:
        return None
    found, best = None, 0.0
    for warps in _WARPS:
        rows = -(-outputs // (processors * warps))
        even = outputs / (processors * warps * rows)
        if rows <= _MOST_ROWS and even > best + 0.03:
            parts = -(-inputs // (8 * 32)) * rows
            depth = min(parts, (_SHARED - 2 * inputs) // (32 * warps * _PART))
            found, best = Cut(warps, rows, depth), even
    return found


def defines(cut: Cut, inputs: int) -> dict[str, int]:
    """Constants of the kernel."""
    return {"DEPTH": cut.depth, "INPUTS": inputs, "ROWS": cut.rows, "WARPS": cut.warps}


def _kernel(cut: Cut, inputs: int, ordinal: int) -> Kernel | None:
    shared = cut.depth * cut.warps * 32 * _PART + 2 * inputs
    constants = tuple(defines(cut, inputs).items())
    return loaded(PROGRAM, constants, shared, ordinal, "products of one row")


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`x @ weight.T + bias` of x [1, K]; None where the kernel is not for a call."""
    if not IS_ON or not serves(PROGRAM.kernel, x.device) or x.shape[0] != 1:
        return None
    known = [each for each in (x, weight, bias) if each is not None]
    alike = all(each.dtype == torch.bfloat16 and each.is_contiguous() for each in known)
    device, (outputs, inputs) = device_of(x), weight.shape
    cut = cut_of(outputs, inputs, device.processors)
    if not alike or x.data_ptr() % 16 or weight.data_ptr() % 16 or cut is None:
        return None
    kernel = _kernel(cut, inputs, device.ordinal)
    if kernel is None:
        return None
    out = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    pointers = (0 if each is None else each.data_ptr() for each in (x, weight, bias, out))
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel.launch_early(-(-outputs // (cut.warps * cut.rows)), 32 * cut.warps, Arguments(*pointers, outputs), stream)
    return out
