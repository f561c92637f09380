"""Triton: K and V of packed tokens into their pages. Shapes: `hybridgen.kernels.attention.ops`."""

from __future__ import annotations

from collections.abc import Hashable

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from hybridgen.device.launcher import Launcher, device_of
from hybridgen.kernels.attention.common import heads_of, stored

_ELEMENTS = 4096
"""Elements of K (and of V) that one program moves at most."""


@triton.jit
def _copy_heads(  # type: ignore[no-untyped-def]
    source,
    pages,
    token,
    page,
    row,
    head,
    stride_token,
    stride_head,
    stride_dim,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_DIM)
    mask = (head[:, None] < HEADS) & (dims[None, :] < DIM)
    line = source + token.to(tl.int64) * stride_token
    values = tl.load(line + head[:, None] * stride_head + dims[None, :] * stride_dim, mask=mask)
    target = ((page * HEADS + head[:, None]) * PAGE + row) * DIM + dims[None, :]
    tl.store(pages + target, stored(values, pages), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["block_table", "slots", "positions"])
def _write_kernel(  # type: ignore[no-untyped-def]
    k,
    v,
    k_pages,
    v_pages,
    block_table,
    slots,
    positions,
    table_stride,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    v_stride_token,
    v_stride_head,
    v_stride_dim,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    position = tl.load(positions + token).to(tl.int32)
    slot = tl.load(slots + token).to(tl.int64)
    page = tl.load(block_table + slot * table_stride + position // PAGE).to(tl.int64)
    row = position % PAGE
    _copy_heads(
        k, k_pages, token, page, row, head, k_stride_token, k_stride_head, k_stride_dim,
        HEADS, PAGE, DIM, BLOCK_DIM,
    )  # fmt: skip
    _copy_heads(
        v, v_pages, token, page, row, head, v_stride_token, v_stride_head, v_stride_dim,
        HEADS, PAGE, VALUE_DIM, BLOCK_VALUE,
    )  # fmt: skip


_launchers: dict[Hashable, tuple[Launcher, int]] = {}


def write_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> None:
    """See `attention.write_kv`; a program per token and group of heads."""
    if k.shape[0] == 0:
        return
    strides = block_table.stride(0), *k.stride(), *v.stride()
    dtypes = k.dtype, v.dtype, k_pages.dtype, slots.dtype, positions.dtype
    key = dtypes, k.shape[1:], v.shape[1:], k_pages.shape, k.device.index, strides
    found = _launchers.get(key)
    if found is None:
        found = _launchers[key] = _prepare(k, k_pages, v_pages)
    launcher, groups = found
    launcher((k.shape[0], groups, 1), (k, v, k_pages, v_pages, block_table, slots, positions, *strides))


def _prepare(k: Tensor, k_pages: Tensor, v_pages: Tensor) -> tuple[Launcher, int]:
    """The kernel for these shapes, and programs per token.

    Raises:
        ValueError: the kernel does not take them.
    """
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous")
    _, kv_heads, page_size, dim = k_pages.shape
    heads = heads_of(kv_heads, kv_heads, dim, v_pages.shape[3], page_size, k.element_size())
    block_dim, block_value = triton.next_power_of_2(dim), triton.next_power_of_2(heads.value_dim)
    block_heads = min(triton.next_power_of_2(kv_heads), max(1, _ELEMENTS // max(block_dim, block_value)))
    device = device_of(k)
    constants = {
        "HEADS": kv_heads,
        "PAGE": page_size,
        "DIM": dim,
        "VALUE_DIM": heads.value_dim,
        "BLOCK_HEADS": block_heads,
        "BLOCK_DIM": block_dim,
        "BLOCK_VALUE": block_value,
        "OVERLAP": device.overlap,
        "num_warps": 4,
        **({"launch_pdl": True} if device.overlap else {}),
    }
    return Launcher(_write_kernel, constants), triton.cdiv(kv_heads, block_heads)
