"""Plain-torch implementations of the attention ops: what CPUs run, and what the Triton kernels are held to.

Shapes and dtypes are those of `hybridgen.kernels.attention.ops`. Scores, softmax and sums are float32 whatever the
inputs are.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_GATHER_BYTES = 256 * 2**20
"""Upper bound for gathered K and V of one group of decode rows, so that long contexts do not exhaust memory."""
_SCORE_ELEMENTS = 2**24
"""Upper bound for the score matrix of one group of prefill queries."""


def write_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> None:
    """See `attention.write_kv`."""
    page_size = k_pages.shape[2]
    pages = block_table[slots.long(), positions // page_size].long()
    rows = positions % page_size
    as_bytes(k_pages)[pages, :, rows] = as_bytes(stored(k, k_pages.dtype))
    as_bytes(v_pages)[pages, :, rows] = as_bytes(stored(v, v_pages.dtype))


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as pages of this dtype keep them: in 8 bits those beyond 448 are 448, and what is no number stays none."""
    if dtype == torch.float8_e4m3fn:
        values = values.float().clamp(-448.0, 448.0)
    return values.to(dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor of 8-bit numbers as uint8, for which there are all operators that move values; others as they are."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def taken(pages: Tensor, ids: Tensor) -> Tensor:
    """Some of the pages, in their dtype."""
    return as_bytes(pages).index_select(0, ids).view(pages.dtype)


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
    """See `attention.decode_attention`; whatever the schedule."""
    if k is not None and v is not None:
        write_kv(k, v, k_pages, v_pages, block_table, slots, positions)
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, value_dim = v_pages.shape
    out = q.new_empty((tokens, heads, value_dim))
    if tokens == 0:
        return out
    low = _first_seen(positions, window, chunk)
    first = low // page_size
    columns = int((positions // page_size - first).max()) + 1
    row_bytes = columns * kv_heads * page_size * (head_dim + value_dim) * 4
    for rows in torch.arange(tokens, device=q.device).split(max(1, _GATHER_BYTES // row_bytes)):
        out[rows] = _decode_rows(
            q[rows], k_pages, v_pages, block_table[slots[rows].long()], positions[rows], low[rows], columns,
            scale, softcap, sinks,
        )  # fmt: skip
    return out


def _decode_rows(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    positions: Tensor,
    low: Tensor,
    columns: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of some rows, each over `columns` pages from the page of its first position, `low`, on.

    Pages stay a dimension of the products, [rows, columns, Hkv, ...], so that gathered pages need no transpose.
    """
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, value_dim = v_pages.shape
    column = (low // page_size)[:, None] + torch.arange(columns, device=q.device)
    used = column <= (positions // page_size)[:, None]
    pages = table.gather(1, column.clamp(max=table.shape[1] - 1)).masked_fill(~used, 0).flatten()
    seen = column[:, :, None] * page_size + torch.arange(page_size, device=q.device)
    visible = (seen <= positions[:, None, None]) & (seen >= low[:, None, None])
    visible = visible[:, :, None, :]  # over kv heads

    k = taken(k_pages, pages).view(tokens, columns, kv_heads, page_size, head_dim).float()
    queries = q.float().view(tokens, 1, kv_heads, heads // kv_heads, head_dim)
    scores = _cap(queries @ k.transpose(-1, -2) * scale, softcap)
    scores.masked_fill_(~visible[:, :, :, None], -torch.inf)
    peak = scores.amax(dim=(1, 4), keepdim=True)
    if sinks is not None:
        sink = sinks.float().view(1, 1, kv_heads, -1, 1)
        peak = torch.maximum(peak, sink)
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=(1, 4), keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    v = taken(v_pages, pages).view(tokens, columns, kv_heads, page_size, value_dim).float()
    v = v.masked_fill(~visible[..., None], 0.0)  # what nobody wrote may be NaN, and 0 * NaN is NaN
    mixed = (weights @ v).sum(dim=1, keepdim=True) / total
    return mixed.view(tokens, heads, value_dim).to(q.dtype)


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """See `attention.prefill_attention`."""
    tokens, heads, _ = q.shape
    out = q.new_empty((tokens, heads, v_pages.shape[3]))
    starts = query_starts.tolist()
    for begin, end in itertools.pairwise(starts):
        if begin == end:
            continue
        first = int(positions[begin])
        low = int(_first_seen(positions[begin], window, chunk))
        row = block_table[int(slots[begin])]
        k = _context(k_pages, row, low, first + end - begin)
        v = _context(v_pages, row, low, first + end - begin)
        queries = q[begin:end].float().transpose(0, 1)
        mixed = _attend(queries, k, v, first, low, scale, window, chunk, softcap, sinks)
        out[begin:end] = mixed.transpose(0, 1).to(q.dtype)
    return out


class Seeing(NamedTuple):
    """How a query of decode attention sees, where positions are known on the host."""

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


def _first_seen(positions: Tensor, window: int, chunk: int) -> Tensor:
    """The first position that a query at each of `positions` sees."""
    if chunk > 0:
        return positions // chunk * chunk
    return (positions - window + 1).clamp(min=0) if window > 0 else torch.zeros_like(positions)


def _context(pages: Tensor, row: Tensor, low: int, high: int) -> Tensor:
    """Positions low to high of a sequence: [Hkv, high - low, D], float32."""
    page_size = pages.shape[2]
    first = low // page_size
    ids = row[first : -(-high // page_size)]
    rows = taken(pages, ids).transpose(0, 1).flatten(1, 2)
    return rows[:, low - first * page_size : high - first * page_size].float()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    low: int,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of q [Hq, n, D] over k and v [Hkv, m, ...]; query i is at position `first + i`, and the m are from
    `low` on."""
    heads, tokens, _ = q.shape
    length = k.shape[1]
    limited = (0 < window < low + length) or (0 < chunk < low + length)
    plain = softcap == 0 and sinks is None
    if plain and first == low and not limited:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[
            0
        ]
    parts = []
    places = torch.arange(first, first + tokens, device=q.device)
    for block in places.split(max(1, _SCORE_ELEMENTS // (heads * length))):
        place = block[:, None]
        seen = torch.arange(low, low + length, device=q.device)
        visible = (seen <= place) & (seen >= _first_seen(place, window, chunk)) if limited else seen <= place
        queries = q[:, int(block[0]) - first : int(block[-1]) - first + 1]
        if plain:
            part = F.scaled_dot_product_attention(
                queries[None], k[None], v[None], attn_mask=visible, scale=scale, enable_gqa=True
            )[0]
        else:
            part = _explicit(queries, k, v, visible, scale, softcap, sinks)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention with softcap and sinks, scores in full: q [Hq, n, D], visible [n, m]."""
    heads, tokens, head_dim = q.shape
    kv_heads = k.shape[0]
    grouped = q.reshape(kv_heads, heads // kv_heads * tokens, head_dim)
    scores = (grouped @ k.transpose(1, 2) * scale).view(heads, tokens, -1)
    scores = _cap(scores, softcap).masked_fill_(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, tokens, 1)], dim=2)
    weights = scores.softmax(dim=2)[:, :, : k.shape[1]]
    return (weights.reshape(kv_heads, -1, k.shape[1]) @ v).view(heads, tokens, -1)


def _cap(scores: Tensor, softcap: float) -> Tensor:
    return torch.tanh(scores / softcap) * softcap if softcap > 0 else scores
