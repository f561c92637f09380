"""Launches of `many_rows.cu`: bfloat16 weights times thousands of rows, on compute capability 9.0.

Only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.device.launcher import device_of
from hybridgen.device.program import Kernel, Program, driver_call, driver_module
from hybridgen.kernels.linear.hopper import is_hopper, loaded

PROGRAM = Program((__package__ or "",), "many_rows.cu", (), "many_rows")
_STEP = 64


class Form(NamedTuple):
    """How the kernel is compiled, and in which order it takes its tiles."""

    consumers: int = 2
    """Groups of four warps that multiply."""
    producer: bool = True
    """Whether another group copies; else a thread of the first that multiplies."""
    blocks: int = 1
    """64 rows of each group."""
    wide: int = 256
    """Columns of a tile."""
    stages: int = 4
    boxes: int = 2
    """Of 16 x 64 outputs, for each warp, on their way out."""
    box_wide: int = 64
    down: int = 2
    """Blocks of a cluster one above the other, which share columns of the weight."""
    across: int = 1
    """Blocks of a cluster side by side, which share rows of x."""
    group: int = 2048
    """Rows that are taken together, about."""
    probe: int = 7


FORM = Form(blocks=2, wide=192, stages=3, box_wide=32, down=1, across=2)


class _Map(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64 * 16),)


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, _Map) for name in ("x", "w", "out")),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "inputs", "group")),
        ("padding", ctypes.c_int * 12),
    )


def defines(form: Form, gated: bool) -> dict[str, int]:
    """Constants of `many_rows.cu`."""
    return {
        "ACROSS": form.across,
        "BLOCKS": form.blocks,
        "BOXES": form.boxes,
        "BOX_WIDE": form.box_wide,
        "CONSUMERS": form.consumers,
        "DOWN": form.down,
        "GATED": int(gated),
        "PROBE": form.probe,
        "PRODUCER": int(form.producer),
        "STAGES": form.stages,
        "WIDE": form.wide,
    }


def shared_bytes(form: Form) -> int:
    """Shared memory of a block."""
    stage = (64 * form.blocks * form.consumers + form.wide) * _STEP * 2
    return form.stages * (stage + 16) + 4 * form.consumers * form.boxes * form.box_wide * 16 * 2


def _kernel(form: Form, gated: bool, ordinal: int) -> Kernel | None:
    constants = tuple(defines(form, gated).items())
    return loaded(PROGRAM, constants, shared_bytes(form), ordinal, "products of many rows")


@functools.lru_cache(4096)
def _map(pointer: int, rows: int, columns: int, box: tuple[int, int]) -> _Map:
    """How the copy engine sees a matrix of 16-bit numbers, in boxes of (columns, rows)."""
    driver = driver_module()
    swizzle = f"CU_TENSOR_MAP_SWIZZLE_{box[0] * 2}B"
    encoded = driver_call(
        "cuTensorMapEncodeTiled",
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2,
        pointer,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(columns * 2)],
        [driver.cuuint32_t(each) for each in box],
        [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, swizzle),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return _Map((ctypes.c_uint64 * 16)(*(int(word) for word in encoded.opaque)))


def serves(weight: Tensor, is_gated: bool) -> bool:
    """Whether the kernel is for a weight [N, K], and there is one."""
    outputs, inputs = weight.shape
    sizes = inputs % 8 == 0 and outputs % (16 if is_gated else 8) == 0 and not weight.data_ptr() % 16
    if not weight.is_cuda or weight.dtype != torch.bfloat16 or not sizes or not weight.is_contiguous():
        return False
    return is_hopper(weight.device.index) and _kernel(FORM, is_gated, weight.device.index) is not None


def gated(rows: Tensor, weight: Tensor) -> Tensor:
    """silu(rows @ gate.T) * (rows @ up.T) of rows [M, K], contiguous, and a weight that `serves` says yes to."""
    out = torch.empty(rows.shape[0], weight.shape[0] // 2, dtype=rows.dtype, device=rows.device)
    product(rows, weight, out, True)
    return out


def product(x: Tensor, weight: Tensor, out: Tensor, gated: bool = False, form: Form = FORM) -> None:
    """`x @ weight.T` of x [M, K] and weight [N, K] into out [M, N], bfloat16 and contiguous all.

    Args:
        gated: the weight is gate and up, one behind the other, and out is [M, N / 2]: `silu(gate) * up`.
        form: how the kernel is compiled.
    """
    (rows, inputs), outputs = x.shape, out.shape[1]
    device = device_of(x)
    kernel = _kernel(form, gated, device.ordinal)
    assert kernel is not None
    tall, out_wide = 64 * form.blocks * form.consumers, form.wide // 2 if gated else form.wide
    arguments = Arguments(
        _map(x.data_ptr(), rows, inputs, (_STEP, tall // form.across)),
        _map(weight.data_ptr(), weight.shape[0], inputs, (_STEP, form.wide // max(2, form.down))),
        _map(out.data_ptr(), rows, outputs, (form.box_wide, 16)),
        rows, outputs, inputs, max(1, form.group // (tall * form.down)),
    )  # fmt: skip
    cluster, threads = form.down * form.across, 128 * (form.consumers + form.producer)
    tiles = -(-rows // (tall * form.down)) * -(-outputs // (out_wide * form.across))
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel.launch_any(cluster * min(kernel.clusters(cluster, threads), tiles), threads, arguments, stream)
