"""Decode attention on a CPU in few operators; shapes and dtypes are those of `hybridgen.kernels.attention.ops`.

`reference` masks all rows to one length. Here lengths are read on the host, which costs a CPU nothing: rows of one
length are attended to together, each over exactly the positions that it sees, so that nothing is masked and what
nobody wrote is never read. Scores, softmax and sums are float32 whatever the inputs are. Little work is done by numpy
(`few`).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridgen.kernels.attention import few
from hybridgen.kernels.attention.reference import Seeing, as_bytes, stored, write_kv

_LITTLE = 2**19
"""Elements of K that are read, from which on several threads are worth their start."""

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
    schedule: Tensor | None = None,
) -> Tensor:
    """See `attention.decode_attention`; a schedule is not read."""
    see = Seeing(scale, window, chunk, softcap, sinks)
    places = positions.tolist()
    if _is_for_numpy(q, k_pages, v_pages, places):
        return few.attend(q, k_pages, v_pages, block_table, slots, places, see, k, v)
    table = block_table.index_select(0, slots)
    if k is not None and v is not None:
        if places.count(places[0]) != len(places):
            write_kv(k, v, k_pages, v_pages, block_table, slots, positions)
        else:
            _write(k, v, k_pages, v_pages, table, places[0])
    row_bytes = k_pages.shape[1] * (k_pages.shape[3] + v_pages.shape[3]) * 4
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for token, place in enumerate(places):
        groups[place].append(token)
    out = q.new_empty((*q.shape[:2], v_pages.shape[3]))
    for place, tokens in groups.items():
        most = max(1, _GATHER_BYTES // (row_bytes * (place + 1)))
        for part in (tokens[i : i + most] for i in range(0, len(tokens), most)):
            first, last, skipped = see.pages(place, k_pages.shape[2])
            # One row, or a run of rows, is a view.
            rows = slice(part[0], part[-1] + 1) if part[-1] - part[0] == len(part) - 1 else part
            found = _gathered(q[rows], k_pages, v_pages, table[rows, first : last + 1], skipped, place, see)
            if len(part) == len(places):
                return found
            out[rows] = found
    return out


def _is_for_numpy(q: Tensor, k_pages: Tensor, v_pages: Tensor, places: Sequence[int]) -> bool:
    """Whether `few.attend` takes this call: float32 throughout, no gradient, too little work for several threads."""
    if not q.dtype == k_pages.dtype == v_pages.dtype == torch.float32 or q.requires_grad:
        return False
    if torch.get_num_threads() == 1:
        return True
    return k_pages.shape[1] * k_pages.shape[3] * (sum(places) + len(places)) <= _LITTLE


def _write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, place: int) -> None:
    """`write_kv` of rows at one position, whose pages are `table` [R, n]."""
    _, kv_heads, page_size, _ = k_pages.shape
    column = place // page_size
    heads = table[:, column : column + 1] * kv_heads + _heads(kv_heads)[:, 0]
    where = (heads * page_size + place % page_size).flatten()
    for pages, new in ((k_pages, k), (v_pages, v)):
        dim = pages.shape[3]
        as_bytes(pages).view(-1, dim).index_copy_(0, where, as_bytes(stored(new.reshape(-1, dim), pages.dtype)))


def _gathered(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, ids: Tensor, skipped: int, place: int, see: Seeing
) -> Tensor:
    """Attention of q [R, Hq, D], all of it at one position, over the pages `ids` [R, n]. One copy of K and of V puts
    the pages of a head next to each other; of one page only what is seen is copied."""
    count, kv_heads, page_size, _ = k_pages.shape
    rows, columns = ids.shape
    if kv_heads > 1:
        ids = ids[:, None, :] * kv_heads + _heads(kv_heads)
    ids = ids.flatten()
    length = (columns - 1) * page_size + place % page_size + 1 - skipped

    # Both in one allocation, whose size is one of a few: two that are freed together make the C library give the memory
    # back to the system, and each page of it costs microseconds when it is touched again.
    positions = length if columns == 1 else columns * page_size
    sizes = [ids.shape[0] // columns * positions * pages.shape[3] for pages in (k_pages, v_pages)]
    flat = as_bytes(k_pages.new_empty(1 << (sum(sizes) - 1).bit_length()))[: sum(sizes)]
    for pages, part in zip((k_pages, v_pages), flat.split(sizes), strict=True):
        source = as_bytes(pages).view(count * kv_heads, -1)
        if columns == 1:
            source = source.narrow(1, skipped * pages.shape[3], part.shape[0] // ids.shape[0])
        torch.index_select(source, 0, ids, out=part.view(ids.shape[0], -1))
    keys, values = (
        part.view(rows * kv_heads, positions, pages.shape[3])
        for pages, part in zip((k_pages, v_pages), flat.view(k_pages.dtype).float().split(sizes), strict=True)
    )
    if columns > 1:
        keys, values = keys.narrow(1, skipped, length), values.narrow(1, skipped, length)
    return _attend(q, keys, values, see)


@functools.cache
def _heads(count: int) -> Tensor:
    """int64 [count, 1]: 0, 1, ..."""
    return torch.arange(count)[:, None]


def _attend(q: Tensor, keys: Tensor, values: Tensor, see: Seeing) -> Tensor:
    """q [R, Hq, D] over all of keys [R * Hkv, L, D] and values [.., Dv]: [R, Hq, Dv].

    Two products and a softmax: for one query a head they take less than `scaled_dot_product_attention`.
    """
    rows, heads, head_dim = q.shape
    dtype = q.dtype
    if dtype != torch.float32:
        q, keys, values = q.float(), keys.float(), values.float()
    # The heads of a group are queries of one key head: nothing is repeated.
    queries = q.reshape(len(keys), -1, head_dim)
    scores = torch.bmm(queries * see.scale, keys.transpose(1, 2))
    if see.softcap > 0:
        scores = torch.tanh(scores / see.softcap) * see.softcap
    if see.sinks is not None:
        sink = see.sinks.float().view(1, -1, queries.shape[1]).expand(rows, -1, -1).reshape(*scores.shape[:2], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1)
    if see.sinks is not None:
        weights = weights[..., : keys.shape[1]]
    mixed = torch.bmm(weights, values).view(rows, heads, values.shape[2])
    return mixed if dtype == torch.float32 else mixed.to(dtype)
