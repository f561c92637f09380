"""Launches of `many_rows.cu`: gate and up of thousands of rows in bfloat16, on compute capability 9.0.

Only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from hybridgen.device.launcher import device_of
from hybridgen.device.program import Kernel, Program, driver_call, driver_module
from hybridgen.kernels.hopper import is_hopper, loaded

PROGRAM = Program((__package__ or "",), "many_rows.cu", (), "many_rows")
DEFINES = {
    "ACROSS": 2,
    "BLOCKS": 2,
    "BOXES": 2,
    "BOX_WIDE": 32,
    "CONSUMERS": 2,
    "DOWN": 1,
    "GATED": 1,
    "PRODUCER": 1,
    "STAGES": 3,
    "WIDE": 192,
}
"""Constants of `many_rows.cu`: the form that was fastest for gate and up."""
# Sizes that follow from `DEFINES`.
TALL, WIDE = 256, 96
"""Rows and outputs of a tile; a cluster of two blocks makes two of them, side by side."""
SHARED_BYTES = 3 * ((TALL + 2 * WIDE) * 64 * 2 + 16) + 8 * 2 * 16 * 32 * 2
_THREADS = 384
_STEP, _BOX = 64, (32, 16)
_TOGETHER = 8
"""Rows of tiles that are taken together: 2,048 rows of x, 16 MB for 4,096 inputs."""


class _Map(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64 * 16),)


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, _Map) for name in ("x", "w", "out")),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "inputs", "group")),
        ("padding", ctypes.c_int * 12),
    )


def _kernel(ordinal: int) -> Kernel | None:
    return loaded(PROGRAM, tuple(DEFINES.items()), SHARED_BYTES, ordinal, "gate and up of many rows")


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


def serves(weight: Tensor) -> bool:
    """Whether the kernel is for a weight [2 * N, K], and there is one."""
    outputs, inputs = weight.shape
    sizes = inputs % 8 == 0 and outputs % 16 == 0 and not weight.data_ptr() % 16
    if not weight.is_cuda or weight.dtype != torch.bfloat16 or not sizes or not weight.is_contiguous():
        return False
    return is_hopper(weight.device.index) and _kernel(weight.device.index) is not None


def gated(rows: Tensor, weight: Tensor) -> Tensor:
    """silu(rows @ gate.T) * (rows @ up.T) of rows [M, K], contiguous, and a weight that `serves` says yes to."""
    out = torch.empty(rows.shape[0], weight.shape[0] // 2, dtype=rows.dtype, device=rows.device)
    product(rows, weight, out)
    return out


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """`gated`, into out [M, N]; all are bfloat16, contiguous, and begin at multiples of 16 bytes."""
    (rows, inputs), outputs = x.shape, out.shape[1]
    device = device_of(x)
    kernel = _kernel(device.ordinal)
    assert kernel is not None
    arguments = Arguments(
        _map(x.data_ptr(), rows, inputs, (_STEP, TALL // 2)),
        _map(weight.data_ptr(), 2 * outputs, inputs, (_STEP, WIDE)),
        _map(out.data_ptr(), rows, outputs, _BOX),
        rows, outputs, inputs, _TOGETHER,
    )  # fmt: skip
    clusters = min(device.processors // 2, -(-rows // TALL) * -(-outputs // (2 * WIDE)))
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel.launch_any(2 * clusters, _THREADS, arguments, stream)
