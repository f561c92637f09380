"""Decode attention on a CPU in few operators; shapes and dtypes are those of `hybridgen.kernels.attention.ops`.

`reference` masks all rows to one length. Here lengths are read on the host, which costs a CPU nothing: rows of one
length are attended to together, each over exactly the positions that it sees, so that nothing is masked and what
nobody wrote is never read. Scores, softmax and sums are float32 whatever the inputs are.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridgen.kernels.attention.reference import write_kv

_GATHER_BYTES = 256 * 2**20
"""Upper bound for gathered K and V of some rows, so that long contexts do not exhaust memory."""


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    k: Tensor | None = None,
    v: Tensor | None = None,
) -> Tensor:
    """See `attention.decode_attention`."""
    places = positions.tolist()
    see = _Seeing(scale, window, chunk, softcap, sinks)
    if len(places) == 1:
        return _one(q, k_pages, v_pages, block_table[int(slots)], places[0], see, k, v)
    if k is not None and v is not None:
        write_kv(k, v, k_pages, v_pages, block_table, slots, positions)
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for token, place in enumerate(places):
        groups[place].append(token)
    table = block_table[slots.long()]
    out = q.new_empty((*q.shape[:2], v_pages.shape[3]))
    row_bytes = k_pages.shape[1] * (k_pages.shape[3] + v_pages.shape[3]) * 4
    for place, tokens in groups.items():
        most = max(1, _GATHER_BYTES // (row_bytes * (place + 1)))
        for part in (tokens[i : i + most] for i in range(0, len(tokens), most)):
            # One row, or a run of rows, is a view.
            rows = slice(part[0], part[-1] + 1) if part[-1] - part[0] == len(part) - 1 else part
            first, last, skipped = see.pages(place, k_pages.shape[2])
            ids = table[rows, first : last + 1]
            out[rows] = _gathered(q[rows], k_pages, v_pages, ids, skipped, place, see)
    return out


class _Seeing(NamedTuple):
    """How a query sees; see `attention.decode_attention`."""

    scale: float
    window: int
    chunk: int
    softcap: float
    sinks: Tensor | None

    def pages(self, place: int, page_size: int) -> tuple[int, int, int]:
        """First and last column of the block table that a query at this position sees, and how many positions of the
        first page it does not."""
        low = 0
        if self.chunk > 0:
            low = place // self.chunk * self.chunk
        elif self.window > 0:
            low = max(0, place - self.window + 1)
        first = low // page_size
        return first, place // page_size, low - first * page_size


def _one(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    row: Tensor,
    place: int,
    see: _Seeing,
    k: Tensor | None,
    v: Tensor | None,
) -> Tensor:
    """One row, whose write and whose view of a page alone are each one operator on the pages."""
    page_size = k_pages.shape[2]
    first, last, skipped = see.pages(place, page_size)
    ids = row[first : last + 1]
    page = int(ids[-1])
    if k is not None and v is not None:
        for pages, new in ((k_pages, k), (v_pages, v)):
            _, heads, _, dim = pages.shape
            stride = page_size * dim
            at = pages.storage_offset() + page * heads * stride + place % page_size * dim
            pages.as_strided((1, heads, dim), (heads * stride, stride, 1), at).copy_(new)
    if first == last:
        seen = slice(skipped, place % page_size + 1)
        return _attend(q, k_pages[page, :, seen][None], v_pages[page, :, seen][None], see)
    return _gathered(q, k_pages, v_pages, ids[None], skipped, place, see)


def _gathered(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, ids: Tensor, skipped: int, place: int, see: _Seeing
) -> Tensor:
    """Attention of q [R, Hq, D], all of it at one position, over the pages `ids` [R, n]. One copy of K and of V puts
    the pages of a head next to each other."""
    count, kv_heads, page_size, _ = k_pages.shape
    rows, columns = ids.shape
    if kv_heads > 1:
        ids = ids[:, None, :] * kv_heads + _heads(kv_heads)
    ids = ids.flatten()
    length = (columns - 1) * page_size + place % page_size + 1 - skipped

    def of(pages: Tensor) -> Tensor:
        dim = pages.shape[3]
        run = columns * page_size * dim
        copy = pages.view(count * kv_heads, page_size * dim).index_select(0, ids)
        return copy.as_strided((rows, kv_heads, length, dim), (kv_heads * run, run, dim, 1), skipped * dim)

    return _attend(q, of(k_pages), of(v_pages), see)


@functools.cache
def _heads(count: int) -> Tensor:
    """int32 [count, 1]: 0, 1, ..."""
    return torch.arange(count, dtype=torch.int32)[:, None]


def _attend(q: Tensor, keys: Tensor, values: Tensor, see: _Seeing) -> Tensor:
    """q [R, Hq, D] over all of keys [R, Hkv, L, D] and values [.., Dv]: [R, Hq, Dv]."""
    rows, heads, head_dim = q.shape
    kv_heads, dtype = keys.shape[1], q.dtype
    if dtype != torch.float32:
        q, keys, values = q.float(), keys.float(), values.float()
    # The heads of a group are queries of one key head: nothing is repeated.
    queries = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    if see.softcap == 0 and see.sinks is None:
        mixed = F.scaled_dot_product_attention(queries, keys, values, scale=see.scale)
    else:
        scores = queries @ keys.transpose(-1, -2) * see.scale
        if see.softcap > 0:
            scores = torch.tanh(scores / see.softcap) * see.softcap
        if see.sinks is not None:
            sink = see.sinks.float().view(1, kv_heads, -1, 1).expand(rows, -1, -1, 1)
            scores = torch.cat((scores, sink), dim=-1)
        mixed = scores.softmax(dim=-1)[..., : keys.shape[2]] @ values
    mixed = mixed.reshape(rows, heads, values.shape[3])
    return mixed if dtype == torch.float32 else mixed.to(dtype)
