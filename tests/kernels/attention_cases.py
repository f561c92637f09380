"""Paged caches filled by hand and a dense float64 attention: what the attention ops are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_PAGE = 2**30
"""A page id that must never be looked up."""


@dataclass
class Cache:
    """Sequences and the same sequences in pages; everything that they do not fill is NaN or NO_PAGE."""

    keys: list[Tensor]
    values: list[Tensor]
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    slots: Tensor
    """[sequences] the slot of each."""
    fed: tuple[list[Tensor], list[Tensor]]
    """What keys and values are rounded from, in the dtype of a step's own; of pages that do not round, themselves."""

    @property
    def lengths(self) -> list[int]:
        return [len(k) for k in self.keys]

    def only(self, row: int) -> Cache:
        """One of the sequences, in the same pages."""
        fed = [self.fed[0][row]], [self.fed[1][row]]
        pages = self.k_pages, self.v_pages, self.block_table
        return Cache([self.keys[row]], [self.values[row]], *pages, self.slots[row : row + 1], fed)


def make_cache(
    lengths: list[int],
    kv_heads: int,
    dim: int,
    value_dim: int | None = None,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spare_pages: int = 2,
    filled: bool = True,
    kept: torch.dtype | None = None,
    exact: bool = False,
) -> Cache:
    """Sequences of random K and V in shuffled pages and slots; `filled=False` leaves the pages unwritten.

    `kept` is the dtype of the pages if it is another: keys and values are those of `dtype`, rounded to it by hand;
    with `exact` they are numbers that it has.
    """
    value_dim = dim if value_dim is None else value_dim
    counts = [-(-length // page_size) for length in lengths]
    pages = sum(counts) + 3
    k_pages = torch.full((pages, kv_heads, page_size, dim), torch.nan, dtype=kept or dtype, device=device)
    v_pages = torch.full((pages, kv_heads, page_size, value_dim), torch.nan, dtype=kept or dtype, device=device)
    table = torch.full((len(lengths) + 2, max(counts) + spare_pages), NO_PAGE, dtype=torch.int32)
    slots = torch.randperm(len(lengths) + 2)[: len(lengths)].to(torch.int32)
    order = (torch.randperm(pages - 1) + 1).to(torch.int32)
    keys, values, used = [], [], 0
    fed: tuple[list[Tensor], list[Tensor]] = [], []
    for slot, length, count in zip(slots.tolist(), lengths, counts, strict=True):
        ids = order[used : used + count]
        used += count
        table[slot, :count] = ids
        k = torch.randn(length, kv_heads, dim, device=device).to(dtype)
        v = torch.randn(length, kv_heads, value_dim, device=device).to(dtype)
        if exact:
            k, v = by_hand(k).to(dtype), by_hand(v).to(dtype)
        fed[0].append(k)
        fed[1].append(v)
        if kept is not None:
            k, v = by_hand(k), by_hand(v)
        keys.append(k)
        values.append(v)
        if filled:
            places = torch.arange(length, device=device)
            page = ids.to(device).long()[places // page_size]
            for head in range(kv_heads):
                k_pages[page, head, places % page_size] = k[:, head]
                v_pages[page, head, places % page_size] = v[:, head]
    return Cache(keys, values, k_pages, v_pages, table.to(device), slots.to(device), fed)


def by_hand(values: Tensor) -> Tensor:
    """The nearest numbers of float8_e4m3fn, ties to even codes, by looking for them in the list of all."""
    codes = torch.arange(127)  # 127 is no number
    exponent, mantissa = (codes // 8).double(), (codes % 8).double()
    numbers = torch.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    numbers = numbers.to(
        values.device
    )  # made on the CPU: a GPU's powers of two are not all exact, and ties would be none
    size = values.double().abs().clamp(max=448.0)
    above = torch.searchsorted(numbers, size).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = numbers[above] - size, size - numbers[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (numbers[code] * values.double().sign()).to(torch.float8_e4m3fn)


def newest_rows(cache: Cache) -> tuple[Tensor, Tensor]:
    """Copies of the last K [sequences, Hkv, D] and V [.., Dv] of each sequence, from the pages."""
    page_size = cache.k_pages.shape[2]
    last = torch.tensor(cache.lengths, device=cache.slots.device) - 1
    page = cache.block_table[cache.slots.long(), last // page_size].long()
    return cache.k_pages[page, :, last % page_size], cache.v_pages[page, :, last % page_size]


def take_newest(cache: Cache) -> dict[str, Tensor]:
    """The last K and V of each sequence, as views of one wide buffer, taken out of the pages (NaN is left there)."""
    k, v = (torch.stack([one[-1] for one in fed]) for fed in cache.fed)
    both = torch.cat([k, v], dim=2).transpose(0, 1).contiguous().transpose(0, 1)
    page_size = cache.k_pages.shape[2]
    for slot, length in zip(cache.slots.tolist(), cache.lengths, strict=True):
        page = int(cache.block_table[slot, (length - 1) // page_size])
        cache.k_pages[page, :, (length - 1) % page_size] = torch.nan
        cache.v_pages[page, :, (length - 1) % page_size] = torch.nan
    return {"k": both[:, :, : k.shape[2]], "v": both[:, :, k.shape[2] :]}


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [n, Hq, D] at `places` over k, v [m, Hkv, ...] in float64: [n, Hq, Dv]."""
    group = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(group, dim=1)
    values = v.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,mhd->nhm", q.double(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(len(k), device=q.device)
    hidden = position[None] > places[:, None]
    if window:
        hidden |= position[None] <= places[:, None] - window
    if chunk:
        hidden |= position[None] // chunk != places[:, None] // chunk
    weights = torch.exp(scores.masked_fill(hidden[:, None], -torch.inf))
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.double())[None, :, None]
    return torch.einsum("nhm,mhd->nhd", weights / total, values)


def pack(cache: Cache, new: list[int], sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """slots, positions and query_starts of each sequence's last `new` tokens; starts padded to `sequences`."""
    device = cache.slots.device
    counts = torch.tensor(new, device=device)
    slots = cache.slots.repeat_interleave(counts)
    positions = torch.cat([torch.arange(n - c, n, device=device) for n, c in zip(cache.lengths, new, strict=True)])
    starts = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
    starts[1 : len(new) + 1] = counts.cumsum(0)
    starts[len(new) + 1 :] = sum(new)
    return slots, positions, starts


def dense_packed(q: Tensor, cache: Cache, new: list[int], scale: float, **options: object) -> Tensor:
    """`dense` for the packed last `new` tokens of each sequence."""
    parts = []
    for part, k, v, count in zip(q.split(new), cache.keys, cache.values, new, strict=True):
        places = torch.arange(len(k) - count, len(k), device=q.device)
        parts.append(dense(part, k, v, places, scale, **options))  # type: ignore[arg-type]
    return torch.cat(parts)


def error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||, infinite where out has a value that is not finite."""
    out = out.double()
    if not out.isfinite().all():
        return float("inf")
    return float((out - expected).norm() / expected.norm())
