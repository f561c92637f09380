"""Launches of `streamed.cu`: decode attention by a schedule, with pages streamed by bulk copies; compute capability 9.0.

Shapes: `hybridgen.kernels.attention.ops`. It goes by the same schedule as `balanced`, for heads of 64 and 128 in 16 bits.
Only the CUDA implementation imports this module.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.device.launcher import Device
from hybridgen.device.program import Kernel, Program
from hybridgen.kernels.attention.common import Heads
from hybridgen.kernels.linear.hopper import is_hopper, loaded

PROGRAM = Program((__package__ or "",), "streamed.cu", (), "streamed")
_ROOM = 227 * 2**10
"""Bytes of shared memory that the blocks of a multiprocessor have together, with a KiB more for each."""


class Form(NamedTuple):
    """How the kernel is compiled for a head shape."""

    piece: int
    """Positions of a stage."""
    warps: int
    """That attend."""
    resident: int
    """Blocks of a multiprocessor."""
    stages: int = 16
    """Of the ring, at most."""
    early: bool = True
    """Reading begins before the kernel in front has ended."""


class Arguments(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "q", "k", "v", "k_pages", "v_pages", "plan", "table", "slots", "positions", "sinks", "out", "partial",
                "counters",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("lse_start", "q_token", "k_token", "k_head", "v_token", "v_head", "table_stride")
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int) for name in ("tokens", "capacity", "most_chunks", "parts")),
    )  # fmt: skip


def takes(heads: Heads, device: Device) -> bool:
    """Whether there is a kernel for these heads, in pages of 16 bits."""
    group = heads.queries // heads.kv
    sizes = heads.dim == heads.value_dim and heads.dim in (64, 128) and group <= 8 and heads.page_size >= 64
    return sizes and heads.bytes == 2 and device.overlap and is_hopper(device.ordinal)


def form_of(heads: Heads) -> Form:
    """Launch options of a head shape."""
    return Form(piece=4096 // heads.dim, warps=4, resident=2)


def _sizes(heads: Heads, form: Form) -> tuple[int, int]:
    """Stages, and bytes of shared memory."""
    group, row = heads.queries // heads.kv, 2 * heads.dim
    stage = 2 * form.piece * row + -(-group * row // 128) * 128
    scratch = form.warps * group * heads.dim * 4
    room = _ROOM // form.resident - 1024 - 1024 - scratch
    stages = max(2, min(form.stages, room // stage))
    return stages, stages * stage + scratch


def defines(
    heads: Heads, form: Form, block: int, softcap: bool, sinks: torch.dtype | None, append: bool, half: bool,
    slots: torch.dtype, positions: torch.dtype,
) -> dict[str, str | int]:  # fmt: skip
    """Constants of `streamed.cu`."""
    widths = {torch.int32: "int", torch.int64: "i64"}
    return {
        "HEAD": heads.dim,
        "GROUP": heads.queries // heads.kv,
        "HEADS": heads.kv,
        "PAGE": heads.page_size,
        "BLOCK": block,
        "PIECE": min(form.piece, block),
        "STAGES": _sizes(heads, form)[0],
        "WARPS": form.warps,
        "RESIDENT": form.resident,
        "SOFTCAP": int(softcap),
        "SINKS": 0 if sinks is None else 1 if sinks == torch.float32 else 2,
        "APPEND": int(append),
        "HALF": int(half),
        "EARLY": int(form.early),
        "SLOT": widths[slots],
        "POSITION": widths[positions],
    }


def kernel(heads: Heads, form: Form, constants: dict[str, str | int], ordinal: int) -> Kernel | None:
    """The kernel; None where it cannot be had."""
    shared = _sizes(heads, form)[1]
    return loaded(PROGRAM, tuple(constants.items()), shared, ordinal, "steps of many rows")


def attend(
    call: Kernel, form: Form, heads: Heads, parts: int, capacity: int, row_chunks: int,
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, slots: Tensor,
    positions: Tensor, sinks: Tensor | None, out: Tensor, partial: Tensor, lse_start: int, counters: Tensor,
    plan: Tensor, scale: float, softcap: float,
) -> None:  # fmt: skip
    """Launch it."""
    tensors = q, k, v, k_pages, v_pages, plan, block_table, slots, positions, sinks, out, partial, counters
    strides = q.stride(0), *k.stride()[:2], *v.stride()[:2], block_table.stride(0)
    tokens = q.shape[0]
    arguments = Arguments(
        *(0 if each is None else each.data_ptr() for each in tensors), lse_start, *strides, scale, softcap,
        tokens, capacity, tokens * row_chunks, parts,
    )  # fmt: skip
    stream = torch.cuda.current_stream(q.device).cuda_stream
    call.launch_early(parts * heads.kv, 32 * (form.warps + 2), arguments, stream)
