"""Decode attention on a CPU in few operators; shapes and dtypes are those of `hybridgen.kernels.attention.ops`.

`reference` masks all rows to one length. Here lengths are read on the host, which costs a CPU nothing: rows of one
length are attended to together, each over exactly the positions that it sees, so that nothing is masked and what
nobody wrote is never read. Scores, softmax and sums are float32 whatever the inputs are.
"""

from __future__ import annotations

from collections import defaultdict

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
    if len(places) == 1:
        place, row = places[0], block_table[int(slots)]
        if k is not None and v is not None:
            page, line = int(row[place // k_pages.shape[2]]), place % k_pages.shape[2]
            k_pages[page, :, line] = k[0]
            v_pages[page, :, line] = v[0]
        return _attend(q, k_pages, v_pages, row[None], place, scale, window, chunk, softcap, sinks)
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
            out[rows] = _attend(q[rows], k_pages, v_pages, table[rows], place, scale, window, chunk, softcap, sinks)
    return out


def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    place: int,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of q [R, Hq, D], all of it at one position, over the pages of `table` [R, max_pages]."""
    rows, heads, head_dim = q.shape
    _, kv_heads, page_size, value_dim = v_pages.shape
    low = place // chunk * chunk if chunk > 0 else max(0, place - window + 1) if window > 0 else 0
    first, last = low // page_size, place // page_size
    ids = table[:, first : last + 1]
    seen = slice(low - first * page_size, place + 1 - first * page_size)
    keys, values = (_gather(pages, ids)[:, :, seen].float() for pages in (k_pages, v_pages))
    # The heads of a group are queries of one key head: nothing is repeated.
    queries = q.float().reshape(rows, kv_heads, heads // kv_heads, head_dim)
    if softcap == 0 and sinks is None:
        mixed = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    else:
        scores = queries @ keys.transpose(-1, -2) * scale
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        if sinks is not None:
            sink = sinks.float().view(1, kv_heads, -1, 1).expand(rows, -1, -1, 1)
            scores = torch.cat((scores, sink), dim=-1)
        mixed = scores.softmax(dim=-1)[..., : keys.shape[2]] @ values
    return mixed.reshape(rows, heads, value_dim).to(q.dtype)


def _gather(pages: Tensor, ids: Tensor) -> Tensor:
    """The pages `ids` [R, n] of each row, one after the other: [R, Hkv, n * page_size, D]. One copy; a page alone is
    none."""
    count, kv_heads, page_size, dim = pages.shape
    rows, columns = ids.shape
    if rows == columns == 1:
        return pages[int(ids)][None]
    if kv_heads > 1:
        ids = ids[:, None, :] * kv_heads + torch.arange(kv_heads, dtype=ids.dtype, device=ids.device)[:, None]
    found = pages.view(count * kv_heads, page_size * dim).index_select(0, ids.flatten())
    return found.view(rows, kv_heads, columns * page_size, dim)
