"""Triton: heads normalised, rotated and written. Shapes: `hybridgen.kernels.attention.rotary`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.device.launcher import Launcher, device_of
from hybridgen.kernels.attention.common import heads_of, stored


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    source, weight, cos, sin, head, eps, shift,
    stride_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The halves [heads, BLOCK_HALF] of one token's heads that are rotated, and what is left of them, in float32.

    `cos` and `sin` point to the token's row, in which those of the second halves are SECOND further on. Where all is
    rotated, the rest is the first half once more.
    """
    dims = tl.arange(0, BLOCK_HALF)
    mask = dims < HALF
    seen = (head[:, None] < HEADS) & mask[None, :]
    line = source + head[:, None] * stride_head + dims[None, :]
    first = tl.load(line, mask=seen, other=0.0).to(tl.float32)
    second = tl.load(line + HALF, mask=seen, other=0.0).to(tl.float32)
    rest = first
    others = 2 * HALF + tl.arange(0, BLOCK_REST)
    if DIM > 2 * HALF:
        seen_rest = (head[:, None] < HEADS) & (others[None, :] < DIM)
        rest = tl.load(source + head[:, None] * stride_head + others[None, :], mask=seen_rest, other=0.0)
        rest = rest.to(tl.float32)
    if NORM:
        total = tl.sum(first * first + second * second, 1)
        if DIM > 2 * HALF:
            total += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(total / DIM + eps)[:, None]
        first = first * factor * (tl.load(weight + dims, mask=mask, other=0.0).to(tl.float32) + shift)[None, :]
        second = second * factor * (tl.load(weight + HALF + dims, mask=mask, other=0.0).to(tl.float32) + shift)[None, :]
        if DIM > 2 * HALF:
            by = tl.load(weight + others, mask=others < DIM, other=0.0).to(tl.float32) + shift
            rest = rest * factor * by[None, :]
    cos_first = tl.load(cos + dims, mask=mask, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + SECOND + dims, mask=mask, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + dims, mask=mask, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + SECOND + dims, mask=mask, other=0.0).to(tl.float32)[None, :]
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second, rest


@triton.jit
def _query_heads(  # type: ignore[no-untyped-def]
    q, weight, cos, sin, out, block, eps, shift, stride_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A block of one token's query heads; all pointers are to the token's row."""
    head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    first, second, rest = _turned(
        q, weight, cos, sin, head, eps, shift, stride_head, HEADS, DIM, HALF, SECOND, BLOCK_HALF, BLOCK_REST, NORM
    )
    dims = tl.arange(0, BLOCK_HALF)
    target = out + head[:, None] * DIM + dims[None, :]
    seen = (head[:, None] < HEADS) & (dims[None, :] < HALF)
    tl.store(target, first.to(out.dtype.element_ty), mask=seen)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask=seen)
    if DIM > 2 * HALF:
        others = 2 * HALF + tl.arange(0, BLOCK_REST)
        seen_rest = (head[:, None] < HEADS) & (others[None, :] < DIM)
        tl.store(out + head[:, None] * DIM + others[None, :], rest.to(out.dtype.element_ty), mask=seen_rest)


@triton.jit
def _key_heads(  # type: ignore[no-untyped-def]
    k, v, weight, cos, sin, k_pages, v_pages, page, row, block, eps, shift, k_stride_head, v_stride_head,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HALF: tl.constexpr,
    SECOND: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """A block of one token's key and value heads, into a row of a page."""
    head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    places = (page * HEADS + head[:, None]) * PAGE + row
    values = tl.arange(0, BLOCK_VALUE)
    seen_value = (head[:, None] < HEADS) & (values[None, :] < VALUE_DIM)
    value = tl.load(v + head[:, None] * v_stride_head + values[None, :], mask=seen_value)
    first, second, rest = _turned(
        k, weight, cos, sin, head, eps, shift, k_stride_head, HEADS, DIM, HALF, SECOND, BLOCK_HALF, BLOCK_REST, NORM
    )
    # Rounded to the model's dtype before a page's, as keys are that come from the model's own code.
    kind: tl.constexpr = k.dtype.element_ty
    dims = tl.arange(0, BLOCK_HALF)
    target = k_pages + places * DIM + dims[None, :]
    seen = (head[:, None] < HEADS) & (dims[None, :] < HALF)
    tl.store(target, stored(first.to(kind), k_pages), mask=seen)
    tl.store(target + HALF, stored(second.to(kind), k_pages), mask=seen)
    if DIM > 2 * HALF:
        others = 2 * HALF + tl.arange(0, BLOCK_REST)
        seen_rest = (head[:, None] < HEADS) & (others[None, :] < DIM)
        tl.store(k_pages + places * DIM + others[None, :], stored(rest.to(kind), k_pages), mask=seen_rest)
    tl.store(v_pages + places * VALUE_DIM + values[None, :], stored(value, v_pages), mask=seen_value)


@triton.jit(do_not_specialize_on_alignment=["block_table", "slots", "positions"])
def _rotate_kernel(  # type: ignore[no-untyped-def]
    q, k, v, cos, sin, q_weight, k_weight, k_pages, v_pages, block_table, slots, positions, out,
    q_eps, k_eps, shift,
    table_stride, cos_stride, sin_stride, q_stride_token, q_stride_head, k_stride_token, k_stride_head,
    v_stride_token, v_stride_head,
    QUERY_HEADS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr, SECOND: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_QUERY_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, QUERY_BLOCKS: tl.constexpr,
    NORM_QUERY: tl.constexpr, NORM_KEY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program for a token and a block of its query heads, or of its key and value heads."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cos += token * cos_stride
    sin += token * sin_stride
    if block < QUERY_BLOCKS:
        _query_heads(
            q + token * q_stride_token, q_weight, cos, sin, out + token * (QUERY_HEADS * DIM), block, q_eps, shift,
            q_stride_head, QUERY_HEADS, DIM, HALF, SECOND, BLOCK_HALF, BLOCK_REST, BLOCK_QUERY_HEADS, NORM_QUERY,
        )  # fmt: skip
    else:
        position = tl.load(positions + token).to(tl.int32)
        slot = tl.load(slots + token).to(tl.int64)
        page = tl.load(block_table + slot * table_stride + position // PAGE).to(tl.int64)
        _key_heads(
            k + token * k_stride_token, v + token * v_stride_token, k_weight, cos, sin, k_pages, v_pages, page,
            position % PAGE, block - QUERY_BLOCKS, k_eps, shift, k_stride_head, v_stride_head,
            HEADS, PAGE, DIM, VALUE_DIM, HALF, SECOND, BLOCK_HALF, BLOCK_REST, BLOCK_VALUE, BLOCK_HEADS, NORM_KEY,
        )  # fmt: skip


class Tuning(NamedTuple):
    """Launch options."""

    elements: int = 1024
    """Elements of each half that one program has at most."""
    warps: int = 4


_launchers: dict[Hashable, tuple[Launcher, int]] = {}


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float,
    k_eps: float,
    shift: float,
    half: bool,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    tune: Tuning | None = None,
) -> Tensor:
    """See `rotary.rotate_and_write`; `tune` replaces the measured launch options."""
    q, k, v = (part if part.stride(2) == 1 else part.contiguous() for part in (q, k, v))
    cos, sin = (part if part.stride(1) == 1 else part.contiguous() for part in (cos, sin))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0] == 0:
        return out
    strides = (
        block_table.stride(0), cos.stride(0), sin.stride(0), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
    )  # fmt: skip
    tensors = q, k, v, cos, sin, q_weight, k_weight, k_pages, v_pages, block_table, slots, positions
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
    shapes = q.shape[1:], v.shape[1:], cos.shape[1], k_pages.shape[1:], v_pages.shape[1:]
    key = dtypes, shapes, half, q.device.index, strides, tune
    found = _launchers.get(key)
    if found is None:
        found = _launchers[key] = _prepare(q, cos, half, k_pages, v_pages, q_weight, k_weight, tune or Tuning())
    launcher, blocks = found
    by = q if q_weight is None else q_weight, q if k_weight is None else k_weight  # never read without a norm
    arguments = (q, k, v, cos, sin, *by, k_pages, v_pages, block_table, slots, positions, out)
    launcher((q.shape[0], blocks, 1), (*arguments, q_eps, k_eps, shift, *strides))
    return out


def _prepare(
    q: Tensor,
    cos: Tensor,
    half: bool,
    k_pages: Tensor,
    v_pages: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    tune: Tuning,
) -> tuple[Launcher, int]:
    """The kernel for these shapes, and programs per token.

    Raises:
        ValueError: the kernel does not take them.
    """
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous")
    _, kv_heads, page_size, dim = k_pages.shape
    heads = heads_of(q.shape[1], kv_heads, dim, v_pages.shape[3], page_size, q.element_size())
    rotated = cos.shape[1] * (2 if half else 1)
    if rotated % 2 or not 2 <= rotated <= dim:
        raise ValueError(f"cos is for {rotated} dimensions; give an even number up to the head size, {dim}")
    block_half = triton.next_power_of_2(rotated // 2)
    most = max(1, tune.elements // block_half)
    block_query = min(triton.next_power_of_2(heads.queries), most)
    block_heads = min(triton.next_power_of_2(kv_heads), most)
    query_blocks = triton.cdiv(heads.queries, block_query)
    device = device_of(q)
    constants = {
        "QUERY_HEADS": heads.queries,
        "HEADS": kv_heads,
        "PAGE": page_size,
        "DIM": dim,
        "VALUE_DIM": heads.value_dim,
        "HALF": rotated // 2,
        "SECOND": 0 if half else rotated // 2,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": triton.next_power_of_2(max(1, dim - rotated)),
        "BLOCK_VALUE": triton.next_power_of_2(heads.value_dim),
        "BLOCK_QUERY_HEADS": block_query,
        "BLOCK_HEADS": block_heads,
        "QUERY_BLOCKS": query_blocks,
        "NORM_QUERY": q_weight is not None,
        "NORM_KEY": k_weight is not None,
        "OVERLAP": device.overlap,
        "num_warps": tune.warps,
        **({"launch_pdl": True} if device.overlap else {}),
    }
    return Launcher(_rotate_kernel, constants), query_blocks + triton.cdiv(kv_heads, block_heads)
