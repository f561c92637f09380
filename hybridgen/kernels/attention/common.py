"""What the Triton attention kernels share: addressing of pages, softcap, and the shape of heads.

Imports Triton; only the CUDA implementations import this module.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Heads(NamedTuple):
    """The shape of a layer's attention, as the launch configurations need it."""

    queries: int
    kv: int
    dim: int
    value_dim: int
    page_size: int
    bytes: int
    """Bytes of an element of the pages; 4 in calls with float32 queries, whatever the pages are."""

    @property
    def pairs(self) -> bool:
        """Whether decode reads two numbers of 8 bits at once (`decode_pairs_kernels`)."""
        return self.bytes == 1 and min(self.dim, self.value_dim) > 16


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
    element = 4 if q.element_size() == 4 else k_pages.element_size()
    heads = heads_of(q.shape[1], kv_heads, dim, v_pages.shape[3], page_size, element)
    return (q if q.stride(2) == 1 else q.contiguous()), heads


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
def stored(values, pages):  # type: ignore[no-untyped-def]
    """Values as `pages` keep them: in 8 bits those beyond 448 are 448, and what is no number stays none."""
    if pages.dtype.element_ty == tl.float8e4nv:
        values = values.to(tl.float32)
        values = tl.where(values > 448.0, 448.0, tl.where(values < -448.0, -448.0, values))
    return values.to(pages.dtype.element_ty)


@triton.jit
def packed_query(query, pages):  # type: ignore[no-untyped-def]
    """A query as it is multiplied with keys of these pages: a bfloat16 one becomes float16 beside keys of 8 bits.

    Those become float16 by one instruction for two, and bfloat16 by three more. A 64th of the query is taken, so that
    numbers up to 4 million fit (larger ones are infinite, and make their row NaN); `score_factor` is the other half.
    """
    if pages.dtype.element_ty == tl.float8e4nv and query.dtype == tl.bfloat16:
        query = (query.to(tl.float32) * 0.015625).to(tl.float16)
    return query


@triton.jit
def score_factor(scale, q, pages):  # type: ignore[no-untyped-def]
    """The factor on scores of a `packed_query`, of queries at `q`."""
    if pages.dtype.element_ty == tl.float8e4nv and q.dtype.element_ty == tl.bfloat16:
        scale = scale * 64.0
    return scale


@triton.jit
def unpacked(values, query):  # type: ignore[no-untyped-def]
    """Keys or values of pages as products take them: those of 8 bits in the dtype of a `packed_query`."""
    if values.dtype == tl.float8e4nv:
        values = values.to(query.dtype)
    return values


_TWO_OF_8_BITS = tl.constexpr(
    """{ .reg .b32 pairs; .reg .b16 low, high;
    prmt.b32 pairs, $2, 0, 0x3120;
    mov.b32 {low, high}, pairs;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high; }"""
)
"""Of two neighbours that each hold two numbers of 8 bits: both first ones as float16, and both second ones."""


@triton.jit
def as_pairs(pages):  # type: ignore[no-untyped-def]
    """A pointer to pages of 8 bits as one to two numbers at once, int16."""
    return pages.to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def unpacked_pairs(pairs):  # type: ignore[no-untyped-def]
    """The first and the second number e4m3 of each int16, in float16."""
    return tl.inline_asm_elementwise(
        _TWO_OF_8_BITS, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )


def limit_of(window: int, chunk: int) -> tuple[int, int]:
    """What kernels know a limit by: its kind for `first_seen` (0 none, 1 window, 2 chunk), and its size.

    Raises:
        ValueError: both are given.
    """
    if window > 0 and chunk > 0:
        raise ValueError(f"window={window} and chunk={chunk}; give one of them")
    return (2, chunk) if chunk > 0 else (1, window) if window > 0 else (0, 0)


@triton.jit
def first_seen(position, size, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first position that a query at `position` sees: in its window (LIMIT 1), or in its chunk (LIMIT 2)."""
    if LIMIT == 2:
        return position // size * size
    else:
        return tl.maximum(position + 1 - size, 0)


@triton.jit
def soft_capped(scores, softcap):  # type: ignore[no-untyped-def]
    """softcap * tanh(scores / softcap)."""
    # tanh(x) = 1 - 2 / (1 + exp(2x)); an infinite exponential gives 1, as it should.
    return softcap - 2.0 * softcap / (1.0 + tl.exp2(scores * (2.0 * 1.4426950408889634 / softcap)))
