"""The fused decode step in plain PyTorch, float32: what the kernels must compute, and how a structure is checked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hybridgen.cache import LayerPages
from hybridgen.kernels.attention.reference import as_bytes, stored, taken
from hybridgen.models.decoder import Decoder, DecoderLayer, Linear, Norm, Unfit

_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest relative error of what a layer adds to its input, by the dtype in which the model computes it."""

_CHECKED = 8
"""Tokens that a layer is checked on."""


def norm(x: Tensor, by: Norm | None) -> Tensor:
    """float32 [..., width]; unchanged without a norm."""
    if by is None:
        return x
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + by.eps) * by.scale


def linear(x: Tensor, by: Linear) -> Tensor:
    """float32 [..., out]."""
    if by.parts:
        return torch.cat([linear(x, part) for part in by.parts], -1)
    return by.weight.matmul(x, None if by.bias is None else by.bias.float())


def linear_over_ranks(model: Decoder, x: Tensor, by: Linear) -> Tensor:
    """The same of a projection that reads what each rank has its own part of."""
    if model.share is None:
        return linear(x, by)
    total = model.share.add_up(by.weight.matmul(x, None))
    return total if by.bias is None else total + by.bias.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, head_dim] by the rows of the rotary table of its tokens, [T, head_dim / 2]."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def queries_keys_values(
    model: Decoder, layer: DecoderLayer, x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] of hidden states [T, hidden] at these positions."""
    qkv = linear(norm(x, layer.before_attention), layer.qkv)
    sizes = [model.heads * model.head_dim, *[model.kv_heads * model.head_dim] * 2]
    q, k, v = (part.unflatten(-1, (-1, model.head_dim)) for part in qkv.split(sizes, -1))
    q, k = _head_norm(q, layer.query_norm), _head_norm(k, layer.key_norm)
    if layer.rotates and model.rotary is not None:
        cos, sin = (table[positions] for table in model.rotary)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def _head_norm(x: Tensor, by: Norm | None) -> Tensor:
    if by is not None and by.scale.shape[0] != x.shape[-1]:
        return norm(x.flatten(-2), by).view_as(x)
    return norm(x, by)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, last: int) -> Tensor:
    """Attention of one token, q [heads, head_dim], at position `last` to k and v [kv_heads, last + 1, head_dim]."""
    first = max(0, last + 1 - window) if window else 0
    k, v = (part[:, first : last + 1].repeat_interleave(q.shape[0] // k.shape[0], 0) for part in (k, v))
    weights = torch.softmax(torch.einsum("hd,htd->ht", q, k) * scale, -1)
    return torch.einsum("ht,htd->hd", weights, v)


def finish_layer(model: Decoder, layer: DecoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """From attention's output [T, heads, head_dim] to the layer's."""
    x = x + layer.residual * norm(linear_over_ranks(model, attended.flatten(-2), layer.out), layer.after_attention)
    gate, up = linear(norm(x, layer.before_mlp), layer.gate_up).chunk(2, -1)
    active = F.silu(gate) if model.activation == "silu" else F.gelu(gate, approximate="tanh")
    return x + layer.residual * norm(linear_over_ranks(model, active * up, layer.down), layer.after_mlp)


def logits(model: Decoder, x: Tensor) -> Tensor:
    """float32 [T, vocab] of hidden states behind the last layer; the vocabulary of all ranks."""
    found = linear(norm(x, model.norm), model.head) * model.logits_scale
    return found if model.share is None else model.share.gather(found)


@torch.inference_mode()
def step(
    model: Decoder, pages: tuple[LayerPages, ...], tokens: Tensor, positions: Tensor, block_tables: Tensor
) -> Tensor:
    """One decode step over the paged cache; writes the new keys and values.

    Args:
        tokens, positions: int64 [B]; position p means that p positions are cached.
        block_tables: int32 [B, max_pages].

    Returns:
        float32 [B, vocab].
    """
    x = model.embedding[tokens].float() * model.embedding_scale
    size = pages[0].keys.shape[2]
    for layer, (keys, values) in zip(model.layers, pages, strict=True):
        q, k, v = queries_keys_values(model, layer, x, positions)
        attended = torch.empty_like(q)
        for row, position in enumerate(positions.tolist()):
            table = block_tables[row].long()
            page, offset = table[position // size], position % size
            for part, new in ((keys, k), (values, v)):
                as_bytes(part)[page, :, offset] = as_bytes(stored(new[row], part.dtype))
            used = table[: position // size + 1]
            k_cached, v_cached = (taken(part, used).transpose(0, 1).flatten(1, 2).float() for part in (keys, values))
            attended[row] = attend(q[row], k_cached, v_cached, layer.attention_scale, layer.window, position)
        x = finish_layer(model, layer, x, attended)
    return logits(model, x)


@torch.inference_mode()
def check(model: PreTrainedModel, decoder: Decoder) -> None:
    """Compare every layer, the embedding and the head with the model's own, on few tokens early and late in a context.

    Each layer gets the input that it had in the model's own forward, so that errors do not add up, and what it adds to
    that input is compared. Late, because some models change with the position (Ministral 3 scales its queries).

    Raises:
        Unfit: something differs by more than the model's dtype explains.
    """
    limit = decoder.max_context
    differences: list[str] = []
    for start in dict.fromkeys((0, max(0, limit - _CHECKED))):
        positions = torch.arange(start, min(start + _CHECKED, limit), device=decoder.device)
        differences += _check_at(model, decoder, positions)
    if differences:  # not before: other ranks compute all of it, too
        raise Unfit(differences[0])


def _check_at(model: PreTrainedModel, decoder: Decoder, positions: Tensor) -> list[str]:
    seen: list[tuple[Tensor, Tensor]] = []
    sites = _layers_of(model, len(decoder.layers))
    hooks = [
        layer.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(
                (args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)
            ),
            with_kwargs=True,
        )
        for layer in sites
    ]
    ids = torch.arange(len(positions), device=decoder.device) * 37 % decoder.embedding.shape[0]
    try:
        expected = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(decoder.layers):
        raise Unfit(f"{len(seen)} of its {len(decoder.layers)} layers were seen to run")
    tolerance = _TOLERANCE.get(decoder.dtype, 4e-2)
    embedded = decoder.embedding[ids].float() * decoder.embedding_scale
    found = [_difference("embedding", embedded, seen[0][0][0].float(), tolerance)]
    for index, (layer, (before, after)) in enumerate(zip(decoder.layers, seen, strict=True)):
        x = before[0].float()
        q, k, v = queries_keys_values(decoder, layer, x, positions)
        rows = [
            attend(q[i], k.transpose(0, 1), v.transpose(0, 1), layer.attention_scale, layer.window, i)
            for i in range(len(ids))
        ]
        out = finish_layer(decoder, layer, x, torch.stack(rows))
        # What the sum was rounded by is no error of the layer's.
        rounding = x.norm(dim=-1) * torch.finfo(decoder.dtype).eps
        found.append(_difference(f"layer {index}", out - x, after[0].float() - x, tolerance, rounding))
    found.append(_difference("head", logits(decoder, seen[-1][1][0].float()), expected, tolerance))
    return [each for each in found if each]


def _layers_of(model: PreTrainedModel, count: int) -> list[torch.nn.Module]:
    for candidate in model.modules():
        if isinstance(candidate, torch.nn.ModuleList) and len(candidate) == count:
            return list(candidate)
    raise Unfit("its decoder layers were not found")


def _difference(what: str, actual: Tensor, expected: Tensor, tolerance: float, slack: Tensor | float = 0.0) -> str:
    """What is wrong with a part, or nothing. Token by token: the first of a context can be a thousand times as large as
    the others.

    The tolerance holds for the typical token, four times as much for each: where a token's scores lie close together,
    the model's own rounding moves it that far.
    """
    error, size = (actual - expected).norm(dim=-1), expected.norm(dim=-1)
    for factor, enough in ((1, 0.5), (4, 1.0)):
        within = error <= factor * tolerance * size + slack
        if float(within.float().mean()) < enough:
            worst = float((error / size).nan_to_num().max())
            return f"its {what} computes something else than the fused step would (relative error {worst:.3g})"
    return ""
