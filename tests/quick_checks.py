"""Launches in Triton's interpreter that `quick_interpreter` must not change; run by test_quick_interpreter.py."""

from __future__ import annotations

import torch
import triton
from triton import language as tl


@triton.jit
def _largest(x, y):
    return tl.maximum(x, y)


@triton.jit
def _kernel(numbers, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    x = tl.load(numbers + places)
    y = _largest(x, x * x)
    tl.store(out + places, tl.where(places < 4, y, tl.sum(y, 0)))


@triton.jit
def _multiply(numbers, out):
    tl.store(out, tl.load(numbers) * tl.load(numbers + 1))


@triton.jit
def _tables(numbers, out, rows_of, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    places = row[:, None] * COLUMNS + column[None, :]
    x = tl.load(numbers + places)
    rows = tl.load(rows_of + row)
    y = x * rows[:, None] + tl.trans(tl.reshape(x, [COLUMNS, ROWS])) + tl.sum(x, 1)[:, None] - tl.max(x, 0)[None, :]
    tl.store(out + places, tl.where(row[:, None] == column[None, :], y.to(tl.float16).to(tl.float32), y))


def check_shapes(number: int) -> None:
    """Tensors of many shapes and dtypes, made one from the other: each has its own, whatever was described before."""
    for rows, columns in ((4, 8), (8, 4), (4, 4), (1, 8), (4, 8)):
        x = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns).sin()
        by_row = torch.arange(rows, dtype=torch.int32)
        out = torch.empty_like(x)
        _tables[(1,)](x, out, by_row, rows, columns)
        expected = x * by_row[:, None] + x.reshape(columns, rows).T + x.sum(1)[:, None] - x.max(0).values
        diagonal = torch.arange(min(rows, columns))
        expected[diagonal, diagonal] = expected[diagonal, diagonal].half().float()
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def check_launches(number: int) -> None:
    """Device functions and reductions, again and again; what is not running a kernel sees Triton as it is."""
    for dtype in (torch.float32, torch.int32, torch.float16, torch.int64):
        numbers = torch.arange(-3, 5, dtype=dtype)
        out = torch.empty_like(numbers)
        _kernel[(1,)](numbers, out, 8)
        largest = torch.maximum(numbers, numbers * numbers)
        expected = torch.cat((largest[:4], largest.sum(dtype=dtype).expand(4)))
        if not torch.equal(out, expected):
            raise AssertionError(f"{out} is not {expected}")
        if not tl.core.is_builtin(tl.load):
            raise AssertionError("the interpreter's load is still there")


def check_overflow(number: int) -> None:
    """Integers wrap, as they do on a device."""
    numbers = torch.tensor([2**31 - 1, 3], dtype=torch.int32)
    out = torch.empty(1, dtype=torch.int32)
    _multiply[(1,)](numbers, out)
    if out.item() != 2**31 - 3:
        raise AssertionError(f"{out.item()}")


def check_it_is_quick(number: int) -> None:
    """It is installed: Triton's language is patched for the kernel and for `tl.sum`, not for each device function."""
    from triton.runtime import interpreter

    made = []
    scope = interpreter._LangPatchScope
    interpreter._LangPatchScope = lambda: made.append(1) or scope()
    try:
        _kernel[(3,)](torch.ones(8), torch.empty(8), 8)
    finally:
        interpreter._LangPatchScope = scope
    if len(made) != 2:
        raise AssertionError(f"patched {len(made)} times")
