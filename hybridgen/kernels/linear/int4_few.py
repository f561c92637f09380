"""Launches of `int4_few.cu`: int4 weights times a few rows, on compute capability 9.0.

Only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.device.launcher import device_of
from hybridgen.device.program import Kernel, Program
from hybridgen.kernels.hopper import OF_FEW_ROWS, loaded, serves

MOST_ROWS = 8
"""That it can multiply."""
_FASTER_ROWS, _LONG = 4, 8192
"""Where it is used: up to so many rows, of weights without zero points or with so many inputs. Elsewhere Triton's
kernels take no longer on an H200 (docs/quantisation.md)."""
PROGRAM = Program((__package__ or "",), "int4_few.cu", (), OF_FEW_ROWS)
_STEP = 128
_TILE = 16


class Form(NamedTuple):
    """How the kernel is compiled."""

    warps: int
    """They share the inputs."""
    resident: int
    """Blocks of a multiprocessor."""
    stages: int
    """Steps whose codes are under way."""


FORM = Form(8, 3, 5)


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias", "x", "out")),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "inputs", "columns", "group_shift", "turns")),
    )


def defines(form: Form) -> dict[str, int]:
    """Constants of `int4_few.cu`."""
    return {"WARPS": form.warps, "RESIDENT": form.resident, "STAGES": form.stages}


def _kernel(form: Form, ordinal: int) -> Kernel | None:
    shared = form.stages * 32 * form.warps * (2 * 16 + 4)
    return loaded(PROGRAM, tuple(defines(form).items()), shared, ordinal, "products of few rows with int4 weights")


def takes(x: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> bool:
    """Whether the kernel is for rows of x and an int4 weight whose scales are each output's own: right and faster.

    Args:
        group: inputs of a scale.
    """
    rows, inputs = x.shape
    steps = group // _STEP
    grouped = group % _STEP == 0 and steps > 0 and steps & (steps - 1) == 0
    sizes = inputs % _STEP == 0 and (scales.shape[1] == 1 or grouped)
    faster = 0 < rows <= _FASTER_ROWS and (zeros is None or inputs >= _LONG)
    return faster and sizes and can_multiply(x, data, scales)


def can_multiply(x: Tensor, data: Tensor, scales: Tensor) -> bool:
    """Whether the kernel can be had, and tensors lie as it wants them."""
    if not serves(PROGRAM.kernel, x.device):
        return False
    usual = x.dtype == torch.bfloat16 == scales.dtype and data.is_contiguous() and scales.is_contiguous()
    if not usual or data.data_ptr() % 16 or x.data_ptr() % 16:
        return False
    return _kernel(FORM, x.device.index) is not None


def product(
    x: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int, form: Form = FORM
) -> Tensor:
    """`x @ weight.T + bias` of x [M, K], contiguous, for what `takes` says yes to; [M, N] in x's dtype.

    Args:
        group: inputs of a scale.
        form: how the kernel is compiled.
    """
    (rows, inputs), (outputs, columns) = x.shape, scales.shape
    device = device_of(x)
    kernel = _kernel(form, device.ordinal)
    assert kernel is not None
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    tiles = -(-outputs // _TILE)
    turns = -(-tiles // (form.resident * device.processors))
    shift = 30 if columns == 1 else (group // _STEP).bit_length() - 1
    tensors = data, scales, zeros, bias, x, out
    arguments = Arguments(
        *(0 if each is None else each.data_ptr() for each in tensors), rows, outputs, inputs, columns, shift, turns
    )
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel.launch_early(-(-tiles // turns), 32 * form.warps, arguments, stream)
    return out
