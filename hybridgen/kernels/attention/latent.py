"""Latent attention over pages: the ops `hybridgen::write_latent`, `latent_decode` and `latent_prefill`.

A position is stored once for all heads: its latent, from which keys and values of every head are projected, and behind
it the part of the keys that has the rotary embedding (multi-head latent attention, DeepSeek-V2, arXiv:2405.04434).

| tensor | shape | dtype |
|---|---|---|
| pages | [pages, 1, page_size, rank + rope] | float32, bfloat16 or float16 |
| new | [T, 1, rank + rope] | any float |
| q | decode [T, H, rank + rope], prefill [T, H, nope + rope] | as pages |
| weight | [H * (nope + value_dim), rank], of a head first `nope` rows for keys, then those for values | as q |
| block_table, slots, positions, query_starts | as in `hybridgen.kernels.attention.ops` | |

Decode gets queries that went through the keys' part of the projection (absorbed), so that all heads attend to the
latents themselves. Prefill projects the latents of each run to keys and values, which is less work for many queries.

All of it is plain torch, on CUDA too. There decode gathers whole rows of the block table, whatever their lengths, so
that it can be recorded; prefill reads the lengths of its runs on the host, so that it cannot.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridgen.kernels.attention import cpu, reference

_BYTES = 256 * 2**20
"""Upper bound for what is gathered, projected or scored at a time."""

_PLACES = "Tensor block_table, Tensor slots, Tensor positions"

_library = torch.library.Library("hybridgen", "FRAGMENT")
for _schema in (
    f"write_latent(Tensor new, Tensor(a!) pages, {_PLACES}) -> ()",
    f"latent_decode(Tensor q, Tensor pages, {_PLACES}, int rank, float scale) -> Tensor",
    f"latent_prefill(Tensor q, Tensor pages, {_PLACES}, Tensor query_starts, Tensor weight, float scale) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def write_latent(new: Tensor, pages: Tensor, block_table: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Write each token's latent and rotary key into its page, as `write_kv` does with keys."""
    torch.ops.hybridgen.write_latent.default(new, pages, block_table, slots, positions)


def latent_decode(
    q: Tensor, pages: Tensor, block_table: Tensor, slots: Tensor, positions: Tensor, rank: int, scale: float
) -> Tensor:
    """The mean of latents by each head's attention: [T, H, rank]. Token t sees positions 0 to `positions[t]`."""
    return torch.ops.hybridgen.latent_decode.default(q, pages, block_table, slots, positions, rank, scale)


def latent_prefill(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_starts: Tensor,
    weight: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of packed sequences over keys and values that are projected here: [T, H, value_dim].

    Runs of tokens are as in `prefill_attention`.
    """
    return torch.ops.hybridgen.latent_prefill.default(
        q, pages, block_table, slots, positions, query_starts, weight, scale
    )


def _write(new: Tensor, pages: Tensor, block_table: Tensor, slots: Tensor, positions: Tensor) -> None:
    page_size = pages.shape[2]
    ids = block_table[slots.long(), positions // page_size].long()
    pages[ids, :, positions % page_size] = new.to(pages.dtype)


def _decode_cpu(
    q: Tensor, pages: Tensor, block_table: Tensor, slots: Tensor, positions: Tensor, rank: int, scale: float
) -> Tensor:
    """Latents are the keys and the values of one head that all queries share."""
    mixed = cpu.decode_attention(q, pages, pages, block_table, slots, positions, scale, 0, 0, 0.0, None)
    return mixed[..., :rank].contiguous()


def decode_without_host(
    q: Tensor, pages: Tensor, block_table: Tensor, slots: Tensor, positions: Tensor, rank: int, scale: float
) -> Tensor:
    """`latent_decode` in shapes that no value decides, as recordings need it."""
    tokens, heads, width = q.shape
    page_size = pages.shape[2]
    length = block_table.shape[1] * page_size
    most = max(1, _BYTES // (4 * length * (width + heads)))
    places = torch.arange(length, device=q.device)
    out = q.new_empty((tokens, heads, rank))
    for begin in range(0, tokens, most):
        rows = slice(begin, min(tokens, begin + most))
        ids = block_table.index_select(0, slots[rows]).flatten()
        latents = pages.view(pages.shape[0], -1).index_select(0, ids).view(-1, length, width).float()
        hidden = places > positions[rows, None]
        latents = latents.masked_fill(hidden[..., None], 0.0)  # what nobody wrote may be NaN, and 0 * NaN is NaN
        scores = torch.bmm(q[rows].float(), latents.transpose(1, 2)) * scale
        weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1)
        out[rows] = torch.bmm(weights, latents[..., :rank]).to(q.dtype)
    return out


def _prefill(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_starts: Tensor,
    weight: Tensor,
    scale: float,
) -> Tensor:
    tokens, heads, _ = q.shape
    page_size, width, rank = pages.shape[2], pages.shape[3], weight.shape[1]
    nope = q.shape[2] - (width - rank)
    by_head = weight.view(heads, -1, rank)
    out = q.new_empty((tokens, heads, by_head.shape[1] - nope))
    starts = query_starts.tolist()
    runs = [(begin, end) for begin, end in itertools.pairwise(starts) if begin < end]
    begins = torch.tensor([begin for begin, _ in runs], dtype=torch.long, device=q.device)
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
            if not q.is_cuda:  # there, torch's kernels sum in float32 themselves
                queries, keys, values = queries.float(), keys.float(), values.float()
            mixed = reference._attend(queries, keys, values, first, 0, scale, 0, 0, 0.0, None)
            out[begin:end, part] = mixed.transpose(0, 1).to(q.dtype)
    return out


def _projected(latents: Tensor, weight: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Keys [h, L, nope + rope] and values [h, L, value_dim] of latents [L, rank + rope] and some heads' weight
    [h, nope + value_dim, rank]."""
    heads, size, rank = weight.shape
    both = F.linear(latents[:, :rank], weight.flatten(0, 1)).view(-1, heads, size).transpose(0, 1)
    rotary = latents[:, rank:].expand(heads, -1, -1)
    return torch.cat((both[..., :nope], rotary), dim=-1), both[..., nope:]


def _write_fake(*_: Tensor) -> None:
    return None


def _decode_fake(
    q: Tensor, pages: Tensor, block_table: Tensor, slots: Tensor, positions: Tensor, rank: int, scale: float
) -> Tensor:
    return q.new_empty((*q.shape[:2], rank))


def _prefill_fake(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_starts: Tensor,
    weight: Tensor,
    scale: float,
) -> Tensor:
    nope = q.shape[2] - (pages.shape[3] - weight.shape[1])
    return q.new_empty((*q.shape[:2], weight.shape[0] // q.shape[1] - nope))


for _device, _decode in (("CPU", _decode_cpu), ("CUDA", decode_without_host)):
    _library.impl("write_latent", _write, _device)
    _library.impl("latent_decode", _decode, _device)
    _library.impl("latent_prefill", _prefill, _device)
torch.library.register_fake("hybridgen::write_latent", _write_fake, lib=_library)
torch.library.register_fake("hybridgen::latent_decode", _decode_fake, lib=_library)
torch.library.register_fake("hybridgen::latent_prefill", _prefill_fake, lib=_library)
