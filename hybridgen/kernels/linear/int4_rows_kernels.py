"""int4 weights times up to 8 or up to 64 rows on the tensor cores of compute capability 9.0.

What is computed: `hybridgen.kernels.linear.quantised`; values are rounded to bfloat16 before they are multiplied, as
the reference does. Three kernels: one in Triton puts the rows into the order in which products take them,
`int4_rows.cu` multiplies, and where inputs are cut into parts a third one adds these up.

Imports Triton; only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import NamedTuple

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
"""Whether products of 33 to 64 rows run by this kernel. It has not run on a GPU yet."""
IS_ON_FOR_FEW = False
"""The same of up to eight rows."""
LEAST_ROWS = 33
PROGRAM = Program((__package__ or "",), "int4_rows.cu", (), "int4_rows")
_THREADS = 512
_OUTPUTS = 256
"""Of a block."""
_STEP = 128
"""Inputs that a block takes at once."""
_MOST_SPLITS = 8


class Form(NamedTuple):
    """One of the kernels that `int4_rows.cu` is compiled to."""

    rows: int
    """Of a block: 8 or 64."""
    stages: int
    """Steps whose codes and rows are under way."""
    blocks: int
    """On a multiprocessor."""

    @property
    def shared_bytes(self) -> int:
        """Of a block: rows, codes, and a word of each thread."""
        return self.stages * (self.rows * _STEP * 2 + _OUTPUTS * _STEP // 2 + 4 * _THREADS)


FEW, MANY = Form(8, 5, 2), Form(64, 6, 1)


@triton.jit(do_not_specialize=["rows"])
def rows_image_kernel(  # type: ignore[no-untyped-def]
    x, out, rows, INPUTS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr
):
    """ROWS rows in the order in which products take them; x [rows, INPUTS] and out in pairs, as int32.

    A program: 8 rows of 128 inputs. Product j takes inputs 32 c + 4 j to 32 c + 4 j + 3 of c = 0 to 3: the first two
    of them are its inputs 2 c and 2 c + 1, the others its inputs 8 + 2 c and 9 + 2 c.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    step = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = tl.arange(0, 512)
    c = i & 3
    line = (i >> 2) & 7
    half = i >> 5  # of a product
    row = part * 8 + line
    values = tl.load(x + row.to(tl.int64) * (INPUTS // 2) + step * 64 + c * 16 + half, mask=row < rows, other=0)
    tl.store(out + (step * 16 + half) * (ROWS * 4) + part * 32 + line * 4 + c, values)


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias", "x", "out")),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "inputs", "columns", "group_steps", "splits")),
    )


def input_of(step: int, product: int, place: int) -> int:
    """Which input a product of a step takes in one of its 16 places."""
    return step * _STEP + 32 * (place % 8 // 2) + 4 * product + 2 * (place // 8) + place % 2


def defines(form: Form) -> dict[str, int]:
    """Constants of `int4_rows.cu`."""
    return {"ROWS": form.rows, "STAGES": form.stages, "BLOCKS": form.blocks}


@functools.cache
def _kernel(form: Form, ordinal: int) -> Kernel | None:
    """The kernel in the device's context; None where it cannot be had, which is said once."""
    try:
        return Kernel(machine_code(defines(form), (9, 0), PROGRAM), form.shared_bytes, PROGRAM)
    except (Unfit, DeviceError) as error:
        logger.warning("products with int4 weights take a slower kernel: %s", error)
        return None


@functools.cache
def _image(inputs: int, rows: int, device: Device) -> Launcher:
    overlap = {"OVERLAP": device.overlap, **({"launch_pdl": True} if device.overlap else {})}
    return Launcher(rows_image_kernel, {"INPUTS": inputs, "ROWS": rows, "num_warps": 4, **overlap})


@functools.cache
def _capability(ordinal: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(ordinal)


def takes(x: Tensor, data: Tensor, scales: Tensor, group: int) -> bool:
    """Whether the kernel is for rows of x and an int4 weight whose scales are each output's own.

    Args:
        group: inputs of a scale.
    """
    rows, inputs = x.shape
    on = IS_ON_FOR_FEW if rows <= FEW.rows else IS_ON and LEAST_ROWS <= rows <= MANY.rows
    sizes = inputs % _STEP == 0 and (scales.shape[1] == 1 or group % _STEP == 0)
    if not on or not sizes or not x.is_cuda:
        return False
    usual = x.dtype == torch.bfloat16 == scales.dtype and data.is_contiguous() and scales.is_contiguous()
    if not usual or data.data_ptr() % 16 or x.data_ptr() % 4 or _capability(x.device.index) != (9, 0):
        return False
    return _kernel(_form(rows), x.device.index) is not None


def _form(rows: int) -> Form:
    return FEW if rows <= FEW.rows else MANY


def splits_of(outputs: int, inputs: int, most: int) -> int:
    """Parts of the inputs: as many as let all blocks run at once, of which there are `most`."""
    tiles = -(-outputs // _OUTPUTS)
    return max(1, min(_MOST_SPLITS, most // tiles, inputs // _STEP // 2))


def product(
    x: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int, splits: int = 0,
    form: Form | None = None,
) -> Tensor:  # fmt: skip
    """`x @ weight.T + bias` of x [M, K], contiguous, for what `takes` says yes to; [M, N] in x's dtype.

    Args:
        group: inputs of a scale.
        splits: parts of the inputs; 0 for the default.
        form: of those for so many rows; None for the default.
    """
    (rows, inputs), (outputs, columns) = x.shape, scales.shape
    device = device_of(x)
    form = form or _form(rows)
    splits = splits or splits_of(outputs, inputs, form.blocks * device.processors)
    kernel = _kernel(form, device.ordinal)
    assert kernel is not None
    image = torch.empty(form.rows * inputs // 2, dtype=torch.int32, device=x.device)
    _image(inputs, form.rows, device)((inputs // _STEP, form.rows // 8, 1), (x.view(torch.int32), image, rows))
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
