"""int4 weights times up to 64 rows on the tensor cores of compute capability 9.0.

What is computed: `hybridgen.kernels.linear.quantised`; values are rounded to bfloat16 before they are multiplied, as
the reference does. Three kernels: one in Triton puts the rows into the order in which products take them,
`int4_rows.cu` multiplies, and where inputs are cut into parts a third one adds these up.

Imports Triton; only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.device.launcher import Device, Launcher, device_of
from hybridgen.device.program import Kernel, Program, Unfit, machine_code
from hybridgen.errors import DeviceError
from hybridgen.kernels.linear.splits_kernels import add_splits

logger = logging.getLogger(__name__)

IS_ON = False
"""Whether products run by this kernel at all. It has not run on a GPU yet."""
LEAST_ROWS, MOST_ROWS = 33, 64
PROGRAM = Program((__package__ or "",), "int4_rows.cu", (), "int4_rows")
_THREADS = 512
_OUTPUTS = 256
"""Of a block."""
_STEP = 128
"""Inputs that a block takes at once."""
_SHARED_BYTES = 6 * 2 * 64 * _STEP * 2
_MOST_SPLITS = 8


@triton.jit(do_not_specialize=["rows"])
def rows_image_kernel(x, out, rows, INPUTS: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows in the order in which products take them; x [rows, INPUTS] and out in pairs, as int32.

    A program: 16 rows of 128 inputs. Product j takes inputs 32 c + 4 j to 32 c + 4 j + 3 of c = 0 to 3: the first two
    of them are its inputs 2 c and 2 c + 1, the others its inputs 8 + 2 c and 9 + 2 c.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    step = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = tl.arange(0, 1024)
    c = i & 3
    line = (i >> 2) & 15
    half = i >> 6  # of a product
    row = part * 16 + line
    values = tl.load(x + row.to(tl.int64) * (INPUTS // 2) + step * 64 + c * 16 + half, mask=row < rows, other=0)
    tl.store(out + step * 4096 + half * 256 + part * 64 + line * 4 + c, values)


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias", "x", "out")),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "inputs", "columns", "group_steps", "splits")),
    )


@functools.cache
def _kernel(ordinal: int) -> Kernel | None:
    """The kernel in the device's context; None where it cannot be had, which is said once."""
    try:
        return Kernel(machine_code({}, (9, 0), PROGRAM), _SHARED_BYTES, PROGRAM)
    except (Unfit, DeviceError) as error:
        logger.warning("products of int4 weights with 33 to 64 rows take the slower kernel: %s", error)
        return None


@functools.cache
def _image(inputs: int, device: Device) -> Launcher:
    overlap = {"OVERLAP": device.overlap, **({"launch_pdl": True} if device.overlap else {})}
    return Launcher(rows_image_kernel, {"INPUTS": inputs, "num_warps": 4, **overlap})


@functools.cache
def _capability(ordinal: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(ordinal)


def takes(x: Tensor, data: Tensor, scales: Tensor, group: int) -> bool:
    """Whether the kernel is for rows of x and an int4 weight whose scales are each output's own.

    Args:
        group: inputs of a scale.
    """
    rows, inputs = x.shape
    sizes = inputs % _STEP == 0 and (scales.shape[1] == 1 or group % _STEP == 0)
    if not IS_ON or not LEAST_ROWS <= rows <= MOST_ROWS or not sizes or not x.is_cuda:
        return False
    usual = x.dtype == torch.bfloat16 == scales.dtype and data.is_contiguous() and scales.is_contiguous()
    if not usual or data.data_ptr() % 16 or x.data_ptr() % 4 or _capability(x.device.index) != (9, 0):
        return False
    return _kernel(x.device.index) is not None


def splits_of(outputs: int, inputs: int, processors: int) -> int:
    """Parts of the inputs: as many as let all blocks run at once."""
    blocks = -(-outputs // _OUTPUTS)
    return max(1, min(_MOST_SPLITS, processors // blocks, inputs // _STEP // 2))


def product(
    x: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int, splits: int = 0
) -> Tensor:
    """`x @ weight.T + bias` of x [M, K], contiguous, for what `takes` says yes to; [M, N] in x's dtype.

    Args:
        group: inputs of a scale.
        splits: parts of the inputs; 0 for the default.
    """
    (rows, inputs), (outputs, columns) = x.shape, scales.shape
    device = device_of(x)
    splits = splits or splits_of(outputs, inputs, device.processors)
    kernel = _kernel(device.ordinal)
    assert kernel is not None
    image = torch.empty(64 * inputs // 2, dtype=torch.int32, device=x.device)
    _image(inputs, device)((inputs // _STEP, 4, 1), (x.view(torch.int32), image, rows))
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    parts = out
    if splits > 1:
        parts = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    adds_bias = bias if splits == 1 else None  # else the last kernel does
    tensors = (data, scales, zeros, adds_bias, image, parts)
    group_steps = inputs // _STEP if columns == 1 else group // _STEP
    arguments = Arguments(
        *(0 if each is None else each.data_ptr() for each in tensors),
        *(rows, outputs, inputs, columns, group_steps, splits),
    )
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel.launch_early(-(-outputs // _OUTPUTS) * splits, _THREADS, arguments, stream)
    if splits > 1:
        add_splits(parts, bias, out)
    return out
