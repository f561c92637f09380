"""What the Triton attention kernels share: addressing of pages, softcap, and facts about the device.

Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Device(NamedTuple):
    """What a launch depends on."""

    processors: int
    """Multiprocessors."""
    shared_memory: int
    """Bytes that one program can have."""
    overlap: bool
    """Programmatic dependent launch: a kernel may start while the one before it ends (compute capability 9)."""
    ordinal: int = 0


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 96 * 2**10),
        properties.major >= 9,
        index,
    )


def device_of(tensor: Tensor) -> Device:
    """Facts about the tensor's device; a CPU tensor means Triton's interpreter."""
    if tensor.is_cuda:
        return _cuda_device(tensor.device.index)
    return Device(processors=4, shared_memory=64 * 2**10, overlap=False)


class Heads(NamedTuple):
    """The shape of a layer's attention, as the launch configurations need it."""

    queries: int
    kv: int
    dim: int
    value_dim: int
    page_size: int
    bytes: int
    """Bytes of an element."""


@functools.cache
def heads_of(query_heads: int, kv_heads: int, dim: int, value_dim: int, page_size: int, element: int) -> Heads:
    """A checked `Heads`.

    Raises:
        ValueError: the kernels do not take this shape.
    """
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads over {kv_heads} key/value heads; give a multiple")
    for name, size in (("key", dim), ("value", value_dim)):
        if size % 8 or not 8 <= size <= 256:
            raise ValueError(f"{name} head size {size}; give a multiple of 8 up to 256")
    if page_size & (page_size - 1) or not 8 <= page_size <= 256:
        raise ValueError(f"page size {page_size}; give a power of two from 8 to 256")
    return Heads(query_heads, kv_heads, dim, value_dim, page_size, element)


def check_layout(q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float) -> tuple[Tensor, Heads]:
    """q with adjacent elements in a head, and the heads.

    Raises:
        ValueError: the pages are not contiguous, the scale is not positive, or the kernels do not take the shape.
    """
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous")
    if scale <= 0:
        raise ValueError(f"scale={scale}; give a number above 0")
    _, kv_heads, page_size, dim = k_pages.shape
    heads = heads_of(q.shape[1], kv_heads, dim, v_pages.shape[3], page_size, q.element_size())
    return (q if q.stride(2) == 1 else q.contiguous()), heads


class Launcher:
    """Runs one kernel with fixed constants; the first call compiles, later ones take the shortest way.

    Triton's own launch binds and specialises every argument anew, most of the 35 us of host time that it took in a
    trial on an H200's host. That is skipped here, so a launcher serves only calls that are alike in all that Triton
    specialises on: device, dtypes, and the integers that it was not told to leave alone. A tensor that does not start
    at a multiple of 16 bytes goes Triton's way, unless the kernel does not specialise on its alignment.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self._kernel = kernel
        self._constants = constants
        self._aligned: list[int] | None = None
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        """Launch on the current stream of the first argument's device, which must be the current device."""
        if self._compiled is None or self._is_misaligned(args):
            self._launch_by_triton(grid, args)
            return
        if triton.knobs.runtime.launch_enter_hook is not None:  # a profiler listens
            self._compiled[grid](*args, *self._tail)
            return
        stream = torch._C._cuda_getCurrentRawStream(args[0].device.index)
        self._run(*grid, stream, self._function, self._metadata, None, None, None, *args, *self._tail)

    def _is_misaligned(self, args: tuple[Any, ...]) -> bool:
        return any(args[i].data_ptr() % 16 for i in self._aligned or ())

    def _launch_by_triton(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        compiled = self._kernel[grid](*args, **self._constants)
        if not args[0].is_cuda:  # the interpreter
            return
        if self._aligned is None:
            parameters = self._kernel.params
            self._aligned = [
                i
                for i, arg in enumerate(args)
                if isinstance(arg, Tensor) and not parameters[i].do_not_specialize_on_alignment
            ]
        if not self._is_misaligned(args):
            self._compiled = compiled
            self._tail = tuple(self._constants[name] for name in self._kernel.arg_names[len(args) :])
            self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata


def power_of_two(size: int) -> int:
    """The next power of two, at least 16: what `tl.dot` takes for a head size."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def load_pages(table, start, end, PAGE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Page ids of the BLOCK positions from `start` on: a scalar where a page holds them all, else one each.

    Nothing at or after position `end` is looked up (0 instead).
    """
    if BLOCK <= PAGE:
        return tl.load(table + start // PAGE, mask=start < end, other=0)
    else:
        place = start + tl.arange(0, BLOCK)
        return tl.load(table + place // PAGE, mask=place < end, other=0)


@triton.jit
def tile_pointers(  # type: ignore[no-untyped-def]
    base,
    pages,
    start,
    head,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Pointers [BLOCK, BLOCK_DIM] to the positions from `start` on in `base` [pages, HEADS, PAGE, DIM]."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_DIM)
    if BLOCK <= PAGE:
        # One 64-bit address and constant 32-bit offsets: a tile lies in one piece.
        first = (pages.to(tl.int64) * HEADS + head) * PAGE + (start & (PAGE - 1))
        return base + first * DIM + (rows[:, None] * DIM + dims[None, :])
    else:
        row = (pages.to(tl.int64) * HEADS + head) * PAGE + ((start + rows) & (PAGE - 1))
        return base + row[:, None] * DIM + dims[None, :]


@triton.jit
def soft_capped(scores, softcap):  # type: ignore[no-untyped-def]
    """softcap * tanh(scores / softcap)."""
    # tanh(x) = 1 - 2 / (1 + exp(2x)); an infinite exponential gives 1, as it should.
    return softcap - 2.0 * softcap / (1.0 + tl.exp2(scores * (2.0 * 1.4426950408889634 / softcap)))
