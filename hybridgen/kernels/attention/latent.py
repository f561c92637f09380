"""Latent attention over pages: the ops `hybridgen::write_latent`, `latent_decode` and `latent_prefill`.

A position is stored once for all heads: its latent, from which keys and values of every head are projected, and behind
it the part of the keys that has the rotary embedding (multi-head latent attention, DeepSeek-V2, arXiv:2405.04434).

| tensor | shape | dtype |
|---|---|---|
| pages | [pages, 1, page_size, rank + rope] | float32, bfloat16 or float16 |
| latent, rotary | [T, 1, rank], [T, 1, rope] | any float |
| q, q_rotary | decode [T, H, rank], [T, H, rope], prefill [T, H, nope], [T, H, rope] | as pages |
| weight | [H * (nope + value_dim), rank], of a head first `nope` rows for keys, then those for values | as q |
| block_table, slots, positions, query_starts | as in `hybridgen.kernels.attention.ops` | |

Decode gets queries that went through the keys' part of the projection (absorbed), so that all heads attend to the
latents themselves. Prefill on a CPU projects the latents of each run to keys and values.

The CPU implementations are plain torch, and prefill reads the lengths of its runs on the host. Those for CUDA
(`latent_launches`) are Triton and never do; prefill attends to latents there as decode does. Their rank is a multiple
of 8 up to 512, rope one up to 128, and page_size a power of two from 8 to 256.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridgen.kernels.attention import cpu, reference
from hybridgen.kernels.attention.ops import on_device_of

_BYTES = 256 * 2**20
"""Upper bound for what is projected or scored at a time on a CPU."""

_PLACES = "Tensor block_table, Tensor slots, Tensor positions"

_library = torch.library.Library("hybridgen", "FRAGMENT")
for _schema in (
    f"write_latent(Tensor latent, Tensor rotary, Tensor(a!) pages, {_PLACES}) -> ()",
    f"latent_decode(Tensor q, Tensor q_rotary, Tensor(a!) pages, {_PLACES}, float scale, Tensor? latent=None, "
    "Tensor? rotary=None) -> Tensor",
    f"latent_prefill(Tensor q, Tensor q_rotary, Tensor pages, {_PLACES}, Tensor query_starts, Tensor weight, "
    "float scale, Tensor? latent=None, Tensor? rotary=None) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


class LatentPlaces(NamedTuple):
    """Where a step's tokens lie in the cache of one layer; shapes are in the module's text."""

    pages: Tensor
    block_table: Tensor
    slots: Tensor
    positions: Tensor


def write_latent(latent: Tensor, rotary: Tensor, places: LatentPlaces) -> None:
    """Write each token's latent and rotary key into its page, as `write_kv` does with keys."""
    torch.ops.hybridgen.write_latent.default(latent, rotary, *places)


def latent_decode(
    q: Tensor,
    q_rotary: Tensor,
    places: LatentPlaces,
    scale: float,
    latent: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """The mean of latents by each head's attention: [T, H, rank]. Token t sees positions 0 to `positions[t]`.

    Its own latent and rotary key are written to its page first if they are given, else they must have been written.
    """
    return torch.ops.hybridgen.latent_decode.default(q, q_rotary, *places, scale, latent, rotary)


def latent_prefill(
    q: Tensor,
    q_rotary: Tensor,
    places: LatentPlaces,
    query_starts: Tensor,
    weight: Tensor,
    scale: float,
    latent: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed sequences over keys and values that `weight` makes of latents: [T, H, value_dim].

    Runs of tokens are as in `prefill_attention`. Where the tokens' own latents and rotary keys, which must be in their
    pages, are given, runs that begin at position 0 attend on CUDA to keys and values of their own.
    """
    return torch.ops.hybridgen.latent_prefill.default(q, q_rotary, *places, query_starts, weight, scale, latent, rotary)


def through_keys(q: Tensor, weight: Tensor) -> Tensor:
    """Queries [T, H, nope] through the keys' part of `weight`: [T, H, rank]."""
    by_head = weight.view(q.shape[1], -1, weight.shape[1])
    return torch.bmm(q.transpose(0, 1), by_head[:, : q.shape[2]]).transpose(0, 1)


def through_values(mixed: Tensor, weight: Tensor, nope: int) -> Tensor:
    """Mean latents [T, H, rank] through the values' part of `weight`: [T, H, value_dim]."""
    by_head = weight.view(mixed.shape[1], -1, weight.shape[1])
    return torch.bmm(mixed.transpose(0, 1), by_head[:, nope:].transpose(1, 2)).transpose(0, 1)


def _write(
    latent: Tensor, rotary: Tensor, pages: Tensor, block_table: Tensor, slots: Tensor, positions: Tensor
) -> None:
    page_size = pages.shape[2]
    ids = block_table[slots.long(), positions // page_size].long()
    pages[ids, :, positions % page_size] = torch.cat((latent, rotary), dim=-1).to(pages.dtype)


def _decode_cpu(
    q: Tensor,
    q_rotary: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    latent: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """Latents are the keys and the values of one head that all queries share."""
    if latent is not None and rotary is not None:
        _write(latent, rotary, pages, block_table, slots, positions)
    both = torch.cat((q, q_rotary), dim=-1)
    mixed = cpu.decode_attention(both, pages, pages, block_table, slots, positions, scale, 0, 0, 0.0, None)
    return mixed[..., : q.shape[2]].contiguous()


def _decode_cuda(q: Tensor, *args: Any) -> Tensor:
    from hybridgen.kernels.attention.latent_launches import decode

    with on_device_of(q):
        return decode(q, *args)


def _prefill_cpu(
    q: Tensor,
    q_rotary: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_starts: Tensor,
    weight: Tensor,
    scale: float,
    latent: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    tokens, heads, nope = q.shape
    q = torch.cat((q, q_rotary), dim=-1)
    page_size, width, rank = pages.shape[2], pages.shape[3], weight.shape[1]
    by_head = weight.view(heads, -1, rank)
    out = q.new_empty((tokens, heads, by_head.shape[1] - nope))
    starts = query_starts.tolist()
    runs = [(begin, end) for begin, end in itertools.pairwise(starts) if begin < end]
    begins = torch.tensor([begin for begin, _ in runs], dtype=torch.long)
    firsts, owners = torch.stack((positions[begins], slots[begins].long())).tolist()
    for (begin, end), first, slot in zip(runs, firsts, owners, strict=True):
        length = first + end - begin
        ids = block_table[slot, : -(-length // page_size)]
        latents = pages.index_select(0, ids).view(-1, width)[:length]
        most = max(1, _BYTES // (4 * length * (by_head.shape[1] + width - rank)))
        for some in torch.arange(heads).split(most):
            part = slice(int(some[0]), int(some[-1]) + 1)
            keys, values = _projected(latents, by_head[part], nope)
            queries = q[begin:end, part].transpose(0, 1)
            mixed = reference._attend(queries.float(), keys.float(), values.float(), first, 0, scale, 0, 0, 0.0, None)
            out[begin:end, part] = mixed.transpose(0, 1).to(q.dtype)
    return out


def _projected(latents: Tensor, weight: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Keys [h, L, nope + rope] and values [h, L, value_dim] of latents [L, rank + rope] and some heads' weight
    [h, nope + value_dim, rank]."""
    heads, size, rank = weight.shape
    both = F.linear(latents[:, :rank], weight.flatten(0, 1)).view(-1, heads, size).transpose(0, 1)
    rotary = latents[:, rank:].expand(heads, -1, -1)
    return torch.cat((both[..., :nope], rotary), dim=-1), both[..., nope:]


def _prefill_cuda(
    q: Tensor,
    q_rotary: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_starts: Tensor,
    weight: Tensor,
    scale: float,
    latent: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    from hybridgen.kernels.attention.latent_launches import prefill, prefill_fresh

    own = latent is not None and rotary is not None
    with on_device_of(q):
        places = pages, block_table, slots, positions
        mixed = prefill(through_keys(q, weight), q_rotary, *places, query_starts, scale, later=own)
        out = through_values(mixed, weight, q.shape[2]).contiguous()
        if latent is not None and rotary is not None:
            both = F.linear(latent[:, 0].to(q.dtype), weight).view(len(q), q.shape[1], -1)
            prefill_fresh(q, q_rotary, both, rotary.to(q.dtype), positions, query_starts, scale, out)
    return out


def _write_fake(*_: Tensor) -> None:
    return None


def _decode_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _prefill_fake(q: Tensor, q_rotary: Tensor, *args: Any) -> Tensor:
    weight: Tensor = args[5]
    return q.new_empty((*q.shape[:2], weight.shape[0] // q.shape[1] - q.shape[2]))


for _device, _implementations in (
    ("CPU", (_write, _decode_cpu, _prefill_cpu)),
    ("CUDA", (_write, _decode_cuda, _prefill_cuda)),
):
    for _name, _implementation in zip(
        ("write_latent", "latent_decode", "latent_prefill"), _implementations, strict=True
    ):
        _library.impl(_name, _implementation, _device)
torch.library.register_fake("hybridgen::write_latent", _write_fake, lib=_library)
torch.library.register_fake("hybridgen::latent_decode", _decode_fake, lib=_library)
torch.library.register_fake("hybridgen::latent_prefill", _prefill_fake, lib=_library)
