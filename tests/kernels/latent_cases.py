"""Latents in pages filled by hand and a dense float64 attention: what the ops for latents are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridgen.kernels.attention.latent import LatentPlaces

NO_PAGE = 2**30
"""A page id that must never be looked up."""


@dataclass
class Latents:
    """Sequences and the same sequences in pages; everything that they do not fill is NaN or NO_PAGE."""

    sequences: list[Tensor]
    """[length, rank + rope] each."""
    rank: int
    pages: Tensor
    table: Tensor
    slots: Tensor
    """[sequences] the slot of each."""

    @property
    def lengths(self) -> list[int]:
        return [len(each) for each in self.sequences]

    def places(self, fed: list[int]) -> LatentPlaces:
        """Pages, table, slots and positions of the last `fed` tokens of each sequence."""
        device = self.pages.device
        counts = torch.tensor(fed, device=device)
        positions = [torch.arange(n - m, n, device=device) for n, m in zip(self.lengths, fed, strict=True)]
        slots = torch.repeat_interleave(self.slots, counts)
        return LatentPlaces(self.pages, self.table, slots, torch.cat(positions))

    def starts(self, fed: list[int], sequences: int) -> Tensor:
        """Where the runs of `places(fed)` begin, as for `sequences` of them."""
        ends = [0, *fed] + [0] * (sequences - len(fed))
        return torch.tensor(ends, device=self.pages.device).cumsum(0).int()

    def take_newest(self) -> tuple[Tensor, Tensor]:
        """The last latent and rotary key of each sequence, as views of wider buffers, taken out of the pages."""
        newest = torch.stack([each[-1] for each in self.sequences])[:, None]
        size = self.pages.shape[2]
        for slot, length in zip(self.slots.tolist(), self.lengths, strict=True):
            self.pages[int(self.table[slot, (length - 1) // size]), 0, (length - 1) % size] = torch.nan
        return newest[..., : self.rank], newest[..., self.rank :]

    def newest(self) -> Tensor:
        """The same rows, from the pages."""
        size = self.pages.shape[2]
        last = torch.tensor(self.lengths, device=self.pages.device) - 1
        return self.pages[self.table[self.slots.long(), last // size].long(), 0, last % size]


def make_latents(
    lengths: list[int],
    rank: int,
    rope: int,
    page_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Latents:
    """Random sequences in shuffled pages and slots."""
    counts = [-(-length // page_size) for length in lengths]
    pages = torch.full((sum(counts) + 3, 1, page_size, rank + rope), torch.nan, dtype=dtype, device=device)
    table = torch.full((len(lengths) + 2, max(counts) + 2), NO_PAGE, dtype=torch.int32)
    slots = torch.randperm(len(lengths) + 2)[: len(lengths)].int()
    order = (torch.randperm(len(pages) - 1) + 1).int()
    sequences, used = [], 0
    for slot, length, count in zip(slots.tolist(), lengths, counts, strict=True):
        ids = order[used : used + count]
        used += count
        table[slot, :count] = ids
        sequence = torch.randn(length, rank + rope, device=device).to(dtype)
        places = torch.arange(length)
        pages[ids[places // page_size].long().to(device), 0, places.to(device) % page_size] = sequence
        sequences.append(sequence)
    return Latents(sequences, rank, pages, table.to(device), slots.to(device))


def dense(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last tokens in float64: q [n, H, D], keys [L, H or 1, D], values [L, H or 1, Dv]."""
    heads = q.shape[1]
    keys, values = (each.double().expand(-1, heads, -1) for each in (keys, values))
    scores = torch.einsum("nhd,lhd->hnl", q.double(), keys) * scale
    places = torch.arange(len(keys), device=q.device)
    hidden = places > places[len(keys) - len(q) :, None]
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def mean_latents(q: Tensor, q_rotary: Tensor, cache: Latents, fed: list[int], scale: float) -> Tensor:
    """What attention to latents gives for the last `fed` tokens of each sequence: [sum(fed), H, rank]."""
    both = torch.cat((q, q_rotary), dim=-1).split(fed)
    pairs = zip(both, cache.sequences, strict=True)
    return torch.cat([dense(one, each[:, None], each[:, None, : cache.rank], scale) for one, each in pairs])


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative to the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())
