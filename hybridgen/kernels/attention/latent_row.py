"""Attention of one row to latents by CUDA kernels; `latent_row.cu` says how.

Nothing calls them but `benchmarks/latent_row.py`: their first version was right on an H200 and slower than Triton's,
and this one has run in an emulation on a CPU alone (docs/performance.md has both). Shapes are in
`hybridgen.kernels.attention.latent`.

They serve bfloat16 and float16, up to 16 heads, a rank that is a multiple of 128 and compute capability 9, and are
compiled by NVRTC (extra `cuda`).

The row's pages and its line of the block table are read before the kernels in front have ended. They must have been
written before the last two of these; the row's queries and newest latent may be the last one's.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridgen.device.program import Kernel, Program, machine_code

TILE = 32
STAGES = 5
MOST_CHUNKS = 144
"""Of which one kernel combines all at once."""
_HEADERS = ("latent_row.cuh",)
_PROGRAMS = tuple(Program((__package__ or "",), "latent_row.cu", _HEADERS, name) for name in ("attend", "combine"))
_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "f16"}
_THREADS = 288
_SLICE = 64
"""Columns of a head that a program combines."""


class Sizes(NamedTuple):
    """What the kernels are compiled for."""

    heads: int
    rank: int
    rope: int
    page_size: int
    dtype: torch.dtype


class Parameters(ctypes.Structure):
    """The kernels' one argument, as `latent_row.cu` has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "q", "q_rotary", "latent", "rotary", "pages", "block_table", "slots", "positions", "out", "partial",
        )),
        *((name, ctypes.c_int64) for name in ("table_stride", "q_stride", "rotary_stride")),
        ("factor", ctypes.c_float), ("chunks", ctypes.c_int), ("wide_slots", ctypes.c_int),
    ]  # fmt: skip


def defines(sizes: Sizes) -> dict[str, Any]:
    """Constants of the kernels."""
    return {
        "HEADS": sizes.heads,
        "RANK": sizes.rank,
        "ROPE": sizes.rope,
        "PAGE": sizes.page_size,
        "NUMBER": _NUMBERS[sizes.dtype],
        "STAGES": STAGES,
        "MOST_CHUNKS": MOST_CHUNKS,
    }


def shared_bytes(sizes: Sizes, stages: int = STAGES) -> int:
    """Of the first kernel: tiles, scores and barriers."""
    line = (sizes.rank + sizes.rope) * 2 + 16
    return stages * TILE * line + 2 * (64 // TILE) * 16 * (TILE + 8) * 4 + 16 * stages + 64


def parameters(tensors: Sequence[Tensor], strides: tuple[int, int, int], scale: float, chunks: int) -> Parameters:
    """
    Args:
        tensors: those of `Parameters`, in its order.
        strides: of the block table's rows and of heads of `q` and `q_rotary`, in elements.
    """
    pointers = (each.data_ptr() for each in tensors)
    return Parameters(*pointers, *strides, scale * math.log2(math.e), chunks, int(tensors[6].dtype == torch.int64))


class Row:
    """The two kernels for some sizes, loaded on a device."""

    def __init__(
        self, sizes: Sizes, processors: int, capability: tuple[int, int], changes: Mapping[str, Any] | None = None
    ) -> None:
        """
        Args:
            changes: of the constants, to try others.

        Raises:
            Unfit: cuda-bindings are not installed, or the compiler refuses.
        """
        self.sizes = sizes
        self.chunks = min(processors, MOST_CHUNKS)
        constants = defines(sizes) | dict(changes or {})
        cubin = machine_code(constants, capability, _PROGRAMS[0])
        self.attend = Kernel(cubin, shared_bytes(sizes, constants["STAGES"]), _PROGRAMS[0])
        self.combine = Kernel(cubin, 0, _PROGRAMS[1])

    def __call__(
        self,
        q: Tensor,
        q_rotary: Tensor,
        pages: Tensor,
        block_table: Tensor,
        slots: Tensor,
        positions: Tensor,
        scale: float,
        latent: Tensor,
        rotary: Tensor,
    ) -> Tensor:
        """See `latent.latent_decode`."""
        heads, rank = self.sizes.heads, self.sizes.rank
        out = torch.empty((1, heads, rank), dtype=q.dtype, device=q.device)
        scratch = torch.empty(self.chunks * heads * (rank + 1), dtype=torch.float32, device=q.device)
        tensors = q, q_rotary, latent, rotary, pages, block_table, slots, positions, out, scratch
        strides = block_table.stride(0), q.stride(1), q_rotary.stride(1)
        given = parameters(tensors, strides, scale, self.chunks)
        stream = torch.cuda.current_stream(q.device).cuda_stream
        self.attend.launch_early(self.chunks, _THREADS, given, stream)
        self.combine.launch_early(heads * (rank // _SLICE), 256, given, stream)
        return out
