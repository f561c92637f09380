"""Launches of `streamed.cu`: decode attention by a schedule, with pages streamed by bulk copies.

Shapes: `hybridgen.kernels.attention.ops`. `balanced` uses it on compute capability 9.0 for heads of 64 and 128 in 16
bits. Only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridgen.device.launcher import Device
from hybridgen.device.program import Kernel, Program
from hybridgen.kernels.attention.common import Heads
from hybridgen.kernels.hopper import is_hopper, loaded

PROGRAM = Program((__package__ or "",), "streamed.cu", (), "streamed")
BLOCK = 64
"""Positions of a tile."""
_ROOM = 227 * 2**10
"""Bytes of shared memory that the blocks of a multiprocessor have together, with a KiB more for each."""


class Form(NamedTuple):
    """How the kernel is compiled for a head shape."""

    piece: int
    """Positions of a stage, 64 at most."""
    warps: int
    """That attend."""
    resident: int
    """Blocks of a multiprocessor."""
    stages: int = 16
    """Of the ring, at most."""
    early: bool = True
    """Reading begins before the kernel in front has ended."""


_TENSORS = (
    "q", "k", "v", "k_pages", "v_pages", "plan", "table", "slots", "positions", "sinks", "out", "partial", "counters",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *(
            (name, ctypes.c_int64)
            for name in ("lse_start", "q_token", "k_token", "k_head", "v_token", "v_head", "table_stride")
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int) for name in ("tokens", "capacity", "most_chunks", "parts")),
    )


def takes(heads: Heads, device: Device) -> bool:
    """Whether there is a kernel for these heads, in pages of 16 bits."""
    group = heads.queries // heads.kv
    sizes = heads.dim == heads.value_dim and heads.dim in (64, 128) and group <= 8 and heads.page_size >= BLOCK
    return sizes and heads.bytes == 2 and device.overlap and is_hopper(device.ordinal)


def form_of(heads: Heads, few: bool) -> Form:
    """Launch options of a head shape, measured on an H200 for groups of two and four (`benchmarks/ragged.py`).

    A third block of a multiprocessor helps where rows are few; else it only takes the ring's memory from the others.
    """
    if heads.dim == 128:
        return Form(32, warps=4, resident=2)
    return Form(64, warps=4, resident=3 if few else 2)


def chunk_of(few: bool) -> int:
    """Positions of a chunk; shorter ones in steps of few rows, where there would be too few chunks for all blocks."""
    return 1024 if few else 2048


def _sizes(heads: Heads, form: Form) -> tuple[int, int]:
    """Stages, and bytes of shared memory."""
    group, row = heads.queries // heads.kv, 2 * heads.dim
    stage = 2 * form.piece * row + -(-group * row // 128) * 128
    scratch = form.warps * group * heads.dim * 4
    room = _ROOM // form.resident - 1024 - 1024 - scratch
    stages = max(2, min(form.stages, room // stage))
    return stages, stages * stage + scratch


def defines(
    heads: Heads,
    form: Form,
    dtype: torch.dtype,
    kinds: tuple[torch.dtype | None, torch.dtype, torch.dtype],
    softcap: bool,
    append: bool,
) -> dict[str, str | int]:
    """Constants of `streamed.cu`; see `stream_of`."""
    sinks, slots, positions = kinds
    widths = {torch.int32: "int", torch.int64: "i64"}
    return {
        "HEAD": heads.dim,
        "GROUP": heads.queries // heads.kv,
        "HEADS": heads.kv,
        "PAGE": heads.page_size,
        "BLOCK": BLOCK,
        "PIECE": form.piece,
        "STAGES": _sizes(heads, form)[0],
        "WARPS": form.warps,
        "RESIDENT": form.resident,
        "SOFTCAP": int(softcap),
        "SINKS": 0 if sinks is None else 1 if sinks == torch.float32 else 2,
        "APPEND": int(append),
        "HALF": int(dtype == torch.float16),
        "EARLY": int(form.early),
        "SLOT": widths[slots],
        "POSITION": widths[positions],
    }


def arguments_of(
    tensors: tuple[Tensor | None, ...],
    lse_start: int,
    scale: float,
    softcap: float,
    capacity: int,
    most_chunks: int,
    parts: int,
) -> Arguments:
    """Of tensors in the order of `Arguments`, whose first three lie as a copy needs it."""
    q, k, v, table = (tensors[_TENSORS.index(name)] for name in ("q", "k", "v", "table"))
    assert q is not None and k is not None and v is not None and table is not None  # noqa: PT018
    strides = q.stride(0), *k.stride()[:2], *v.stride()[:2], table.stride(0)
    addresses = (0 if each is None else each.data_ptr() for each in tensors)
    return Arguments(*addresses, lse_start, *strides, scale, softcap, q.shape[0], capacity, most_chunks, parts)


def _as_copied(heads: Tensor, together: bool) -> Tensor:
    """[tokens, heads, dim] with what a bulk copy needs: each head at a multiple of 16 bytes, and `together` those of a
    token side by side."""
    token, head, _ = heads.stride()
    fits = token % 8 == 0 and head % 8 == 0 and heads.data_ptr() % 16 == 0
    return heads if fits and (not together or head == heads.shape[2]) else heads.contiguous()


class Stream(NamedTuple):
    """A loaded kernel."""

    kernel: Kernel
    heads: Heads
    form: Form

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rest: tuple[Tensor | None, ...], *numbers: Any) -> None:
        """Launch it.

        Args:
            rest: the other tensors in the order of `Arguments`.
            numbers: see `arguments_of`.
        """
        tensors = _as_copied(q, together=True), _as_copied(k, together=False), _as_copied(v, together=False), *rest
        arguments = arguments_of(tensors, *numbers)
        blocks = arguments.parts * self.heads.kv
        stream = torch.cuda.current_stream(q.device).cuda_stream
        self.kernel.launch_early(blocks, 32 * (self.form.warps + 2), arguments, stream)


def stream_of(
    heads: Heads,
    dtype: torch.dtype,
    kinds: tuple[torch.dtype | None, torch.dtype, torch.dtype],
    softcap: bool,
    append: bool,
    device: Device,
    form: Form,
) -> Stream | None:
    """The kernel for heads that `takes` says yes to; None where it cannot be had.

    Args:
        dtype: of queries, keys and values.
        kinds: dtypes of sinks (None: there are none), slots and positions.
    """
    if kinds[0] not in (None, dtype, torch.float32):
        return None
    constants = tuple(defines(heads, form, dtype, kinds, softcap, append).items())
    kernel = loaded(PROGRAM, constants, _sizes(heads, form)[1], device.ordinal, "decode steps of many rows")
    return None if kernel is None else Stream(kernel, heads, form)
