"""Triton: many small copies in one launch. What it takes: `hybridgen.kernels.step.metadata`.

Imports Triton; only the CUDA implementation imports this module.

The descriptor of the copies travels as kernel arguments, eight integers a pair. That needs no memory on the device
and no upload, a capture bakes it into the graph, and an integer costs the launch about 16 ns (Triton asks the
driver about the memory of each tensor argument, not about an integer).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_wait
from triton.runtime import driver

from hybridgen.device.launcher import device_of

PAIRS = 32
"""Pairs of one launch at most: 2 KiB of arguments of the 4 KiB that every driver takes."""
BLOCK = 256
"""Elements that one program copies at most."""
_WARPS = 1
"""Every warp searches the descriptor for its pair: one a program was fastest for 7 and for 32 pairs (H200)."""
_WIDTH_CODES = {1: 0, 2: 1, 4: 2, 8: 3}
"""Of the bytes of an element."""
_NO_PAIR = (0, 0, 1 << 32, 2**60, 0, 0, 0, 0)
"""Fills up the descriptor: begins after every program."""


class Work(NamedTuple):
    """The copies of one launch."""

    programs: int
    words: tuple[int, ...]
    """Eight a pair: see `_words`; the number of pairs is a power of two, from 8 on."""


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    source,
    destination,
    row,
    column,
    mask,
    source_row,
    source_column,
    destination_row,
    destination_column,
    TYPE: tl.constexpr,
):
    source = source.to(tl.pointer_type(TYPE))
    destination = destination.to(tl.pointer_type(TYPE))
    values = tl.load(source + (row * source_row + column * source_column), mask=mask)
    tl.store(destination + (row * destination_row + column * destination_column), values, mask=mask)


@triton.jit
def copy_kernel(  # type: ignore[no-untyped-def]
    words,
    COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program p copies a block of the last pair that begins at or before p."""
    if OVERLAP:
        gdc_wait()
    program = tl.program_id(0)
    source = words[0].to(tl.int64)
    destination = words[1].to(tl.int64)
    shape = words[2].to(tl.int64)
    start = words[3].to(tl.int64)
    source_row = words[4].to(tl.int64)
    source_column = words[5].to(tl.int64)
    destination_row = words[6].to(tl.int64)
    destination_column = words[7].to(tl.int64)
    last = program.to(tl.int64) << 2 | 3
    for i in tl.static_range(1, COUNT):
        later = words[8 * i + 3] <= last  # it starts at or before this program, whatever its width
        source = tl.where(later, words[8 * i], source)
        destination = tl.where(later, words[8 * i + 1], destination)
        shape = tl.where(later, words[8 * i + 2], shape)
        start = tl.where(later, words[8 * i + 3], start)
        source_row = tl.where(later, words[8 * i + 4], source_row)
        source_column = tl.where(later, words[8 * i + 5], source_column)
        destination_row = tl.where(later, words[8 * i + 6], destination_row)
        destination_column = tl.where(later, words[8 * i + 7], destination_column)
    place = (program - (start >> 2).to(tl.int32)) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = place < shape.to(tl.int32)  # the low half
    columns = (shape >> 32).to(tl.int32)
    row = place // columns
    column = (place - row * columns).to(tl.int64)
    row = row.to(tl.int64)
    strides = source_row, source_column, destination_row, destination_column
    width = start & 3
    if width == 0:
        _move(source, destination, row, column, mask, *strides, tl.int8)
    elif width == 1:
        _move(source, destination, row, column, mask, *strides, tl.int16)
    elif width == 2:
        _move(source, destination, row, column, mask, *strides, tl.int32)
    else:
        _move(source, destination, row, column, mask, *strides, tl.int64)


def _words(source: Tensor, destination: Tensor, start: int) -> tuple[int, ...]:
    """The descriptor of a pair whose first block is program `start`.

    Addresses of source and destination; columns << 32 | elements; start << 2 | code of the element's bytes; strides
    of the source's rows and columns, then of the destination's, in elements. A vector is a column of rows.
    """
    columns = source.shape[1] if source.dim() == 2 else 1
    row, column = (*source.stride(), 0, 0)[:2]
    destination_row, destination_column = (*destination.stride(), 0, 0)[:2]
    return (
        source.data_ptr(),
        destination.data_ptr(),
        columns << 32 | source.numel(),
        start << 2 | _WIDTH_CODES[source.element_size()],
        row,
        column,
        destination_row,
        destination_column,
    )


def work_of(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> list[Work]:
    """The launches that copy checked pairs; none for pairs without elements."""
    pairs = [pair for pair in zip(sources, destinations, strict=True) if pair[0].numel()]
    return [_work(pairs[i : i + PAIRS]) for i in range(0, len(pairs), PAIRS)]


def _work(pairs: list[tuple[Tensor, Tensor]]) -> Work:
    words: list[int] = []
    programs = 0
    for source, destination in pairs:
        words += _words(source, destination, programs)
        programs += -(-source.numel() // BLOCK)
    count = max(8, triton.next_power_of_2(len(pairs)))
    return Work(programs, (*words, *_NO_PAIR * (count - len(pairs))))


def source_of(count: int, overlap: bool) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for so many pairs, and its options.

    The types are given, not taken from arguments: an integer's would depend on its value.
    """
    signature = {"words": ("i64",) * (8 * count), **dict.fromkeys(("COUNT", "BLOCK_SIZE", "OVERLAP"), "constexpr")}
    constants = {"COUNT": count, "BLOCK_SIZE": BLOCK, "OVERLAP": overlap}
    options = {"num_warps": _WARPS, **({"launch_pdl": True} if overlap else {})}
    return ASTSource(copy_kernel, signature, constants), options


@functools.cache
def _compiled(count: int, device: int, overlap: bool) -> Any:
    """The kernel for so many pairs on the current device, whose index is `device`."""
    source, options = source_of(count, overlap)
    return triton.compile(source, target=driver.active.get_current_target(), options=options)


class Launches:
    """Copies between fixed addresses, ready to launch. Holds no tensors."""

    def __init__(self, device: int, calls: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self.device = device
        self.calls = calls

    def __call__(self) -> None:
        """Launch on the current stream of the tensors' device."""
        if torch.cuda.current_device() != self.device:  # Triton launches on the current device
            with torch.cuda.device(self.device):
                self()
            return
        for run, args in self.calls:
            run(*args)


def prepare(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> Launches:
    """Compile, where that has not been done, and load what copies these checked pairs on CUDA."""
    first = destinations[0]
    with torch.cuda.device(first.device):
        calls = []
        for programs, words in work_of(sources, destinations):
            count, overlap = len(words) // 8, device_of(first).overlap
            kernel = _compiled(count, first.get_device(), overlap)
            calls.append((kernel[programs, 1, 1], (words, count, BLOCK, overlap)))
        return Launches(first.get_device(), calls)
