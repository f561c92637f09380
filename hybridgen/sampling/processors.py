"""From logits to a token in torch operators: one function per step, rows independent of each other.

Logits and parameters are float32; per-row parameters have shape [B]. The order and the meaning are those of
Hugging Face's logits processors, in which every row has the same parameters; presence and frequency penalty
are OpenAI's.

Decisions are made on values that a row's own kernel computes (maximum, softmax, running sum, sort) or on the
host, not on free-standing sums, whose rounding can depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_INF = float("inf")

Noise = Callable[[Tensor, Tensor, int], Tensor]
"""Seeds int64 [B], positions [B] and V to noise [B, V]."""


def penalize(
    logits: Tensor, seen: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Repetition penalty over prompt and output (CTRL, arXiv:1909.05858), then presence and frequency.

    Args:
        logits: float32 [B, V].
        seen: bool [B, V], tokens of the prompt.
        counts: int32 [B, V], how often the output has each token.
        repetition, presence, frequency: float32 [B].
    """
    repeated = torch.where(logits < 0, logits * repetition[:, None], logits / repetition[:, None])
    told = counts > 0
    logits = torch.where(seen | told, repeated, logits)
    return logits - presence[:, None] * told - frequency[:, None] * counts


def count_drafted(counts: Tensor, drafts: Tensor) -> None:
    """Count, for each place of a row that has several, the drafts before it as its output.

    Args:
        counts: int32 [B * Q, V], how often each row's output has each token, the same for all places of a row; added
            to.
        drafts: int64 [B, Q - 1], the token fed at each place but the first; -1: none.
    """
    count = drafts.shape[1]
    places = torch.arange(count + 1, device=drafts.device)
    before = (places[:count] < places[:, None]) & (drafts >= 0)[:, None]
    ids = drafts.clamp(min=0)[:, None].expand_as(before)
    counts.scatter_add_(1, ids.reshape(-1, count), before.reshape(-1, count).to(counts.dtype))


def count_behind(counts: Tensor, tokens: Tensor) -> None:
    """Count tokens as a row's output that are not in its counts yet.

    Args:
        counts: int32 [B, V]; added to.
        tokens: int64 [B, N]; below 0: none.
    """
    counts.scatter_add_(1, tokens.clamp(min=0), (tokens >= 0).to(counts.dtype))


EARLY_END, AT_BEGIN, FORCED_FIRST, FORCED_LAST = 1, 2, 4, 8
"""Bits of an id's rules: banned before the minimum length, banned at the beginning, one of the first, of the last."""


def apply_rules(logits: Tensor, rules: Tensor, generated: Tensor, limits: Tensor) -> Tensor:
    """What is banned or forced by the number of generated tokens, in Hugging Face's order.

    Args:
        logits: float32 [B, V].
        rules: uint8 [B, V], the bits of each id.
        generated: int64 [B].
        limits: int64 [B, 4]: the minimum length, and which generated token (from 0; below 0: none) has its ids banned
            at the beginning, is forced as the first, is forced as the last.
    """
    least, begin, first, last = limits.unbind(1)
    early = (generated < least) * EARLY_END
    logits = logits.masked_fill((rules & early.to(torch.uint8)[:, None]) != 0, -_INF)
    forced = torch.where(generated == last, FORCED_LAST, (generated == first) * FORCED_FIRST).to(torch.uint8)[:, None]
    only = torch.where((rules & forced) != 0, 0.0, -_INF)
    logits = torch.where(forced != 0, only, logits)
    begins = ((generated == begin) * AT_BEGIN).to(torch.uint8)[:, None]
    return logits.masked_fill((rules & begins) != 0, -_INF)


def temper(logits: Tensor, temperature: Tensor) -> Tensor:
    """`(logits - max) / temperature`; temperature above 0.

    Taking the maximum first changes no probability and keeps a small temperature from reaching infinity,
    where all large logits would tie. A row with NaN or +inf, or of -inf only, comes out with NaN and without
    finite numbers that could be chosen.
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]


def keep_top(scaled: Tensor, top_k: Tensor, top_p: Tensor, ranked: int, nucleus: bool) -> Tensor:
    """-inf for what top-k and then top-p leave out.

    Top-k keeps all that tie with the k-th. Top-p keeps the smallest set whose probability, among what top-k
    kept, reaches p; tokens that tie at its edge enter in order of their ids. Each row's set is described by
    the lowest value kept and the number of tokens kept at that value, so that ranks need not be carried back
    to token ids and a partial sort of `ranked` values is enough for rows with top-k.

    Args:
        scaled: float32 [B, V], from `temper`.
        top_k: int64 [B]; 0: off. Not above `ranked`; rows with top-p need it, or `ranked` = V.
        top_p: float32 [B]; 1: off. Not looked at unless `nucleus`.
        ranked: how many of the largest values to sort.
    """
    vocab_size = scaled.shape[-1]
    if ranked < vocab_size:
        largest = scaled.topk(ranked).values
    else:
        largest = scaled.sort(descending=True).values
    kth = largest.gather(-1, (top_k - 1).clamp(0, ranked - 1)[:, None])
    kth = torch.where(top_k[:, None] > 0, kth, -_INF)
    if not nucleus:
        return scaled.masked_fill(scaled < kth, -_INF)
    edge, quota = _nucleus_edge(scaled, largest, kth, top_p[:, None])
    off = top_p[:, None] >= 1
    edge, quota = torch.where(off, kth, edge), torch.where(off, vocab_size, quota)
    tied = scaled == edge
    keep = (scaled > edge) | (tied & (tied.cumsum(-1, dtype=torch.int32) <= quota))
    return scaled.masked_fill(~keep, -_INF)


def _nucleus_edge(scaled: Tensor, largest: Tensor, kth: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest value that top-p keeps (float32 [B, 1]) and how many tokens it keeps there (int64 [B, 1]).

    A token stays if the tokens ranked before it do not reach p. The running sum is float64, so that how a
    device splits it does not show in what is kept. A full sort and a partial one give it the same bits, so that
    a row does not depend on which of them its batch needs.
    """
    ranked, vocab_size = largest.shape[-1], scaled.shape[-1]
    inside = largest >= kth
    # The largest value is 0, so its probability is the factor that normalises exp().
    scale = scaled.masked_fill(scaled < kth, -_INF).softmax(-1).amax(-1, keepdim=True)
    probability = torch.where(inside, largest.exp(), 0) * scale
    total = probability.cumsum(-1, dtype=torch.float64)
    kept = ((total - probability < top_p) & inside).sum(-1, keepdim=True).clamp(min=1)
    edge = largest.gather(-1, kept - 1)
    above = (largest > edge).sum(-1, keepdim=True)
    if ranked == vocab_size:
        return edge, kept - above
    # Tokens that tie with the k-th can go beyond a partial sort. If p is not reached in it, they fill up.
    lacking = (top_p - total[:, -1:]) / probability.gather(-1, kept - 1)
    beyond = lacking.nan_to_num().ceil().clamp(0, vocab_size).to(torch.int64)
    return edge, kept - above + torch.where(kept == ranked, beyond, 0)


def drop_unlikely(scaled: Tensor, log_min_p: Tensor) -> Tensor:
    """-inf for tokens less likely than min-p times the most likely one (arXiv:2407.01082).

    Args:
        scaled: float32 [B, V] with maximum 0, so that `exp` of a value is that ratio, whatever was dropped
            before.
        log_min_p: float32 [B], the logarithm of min-p; -inf: off.
    """
    return scaled.masked_fill(scaled < log_min_p[:, None], -_INF)


def truncated(
    scores: Tensor, reals: Tensor, integers: Tensor, slots: Tensor, ranked: int, nucleus: bool, min_p: bool
) -> Tensor:
    """Temper, then -inf for what top-k, top-p and min-p leave out; float32 [B, V], each row's maximum 0.

    Rows with temperature 0 come out with a temperature of 1; nobody reads them.

    Args:
        scores: float32 [B, V].
        ranked, nucleus: see `keep_top`; `ranked` 0: no row has top-k or top-p.
        min_p: some row has min-p.
    """
    temperature = reals[slots, 0]
    scaled = temper(scores, torch.where(temperature > 0, temperature, 1))
    if ranked:
        scaled = keep_top(scaled, integers[slots, 1], reals[slots, 1], ranked, nucleus)
    if min_p:
        scaled = drop_unlikely(scaled, reals[slots, 2])
    return scaled


def keep_typical(scaled: Tensor, typical_p: Tensor) -> Tensor:
    """-inf for what typical sampling leaves out (arXiv:2202.00666).

    The kept tokens are those whose surprisal is nearest to the distribution's entropy, until their probability reaches
    `typical_p`; ties with the last of them stay.

    Args:
        scaled: float32 [B, V]; -inf where something was left out before.
        typical_p: float32 [B]; 1: off.
    """
    surprisal = -scaled.log_softmax(-1)
    probability = (-surprisal).exp()
    entropy = (surprisal * probability).nansum(-1, keepdim=True)
    distance = (surprisal - entropy).abs()
    nearest, order = distance.sort(-1)
    total = scaled.gather(-1, order).softmax(-1).cumsum(-1)
    last = (total < typical_p[:, None]).sum(-1, keepdim=True).clamp(max=scaled.shape[-1] - 1)
    dropped = (distance > nearest.gather(-1, last)) & (typical_p < 1)[:, None]
    return scaled.masked_fill(dropped, -_INF)


def cut_off(scaled: Tensor, epsilon: Tensor, eta: Tensor) -> Tensor:
    """-inf for tokens below a least probability: first `epsilon`, then, among the rest,
    `min(eta, sqrt(eta) * exp(-entropy))` (arXiv:2210.15191). The most likely ones stay.

    Args:
        scaled: float32 [B, V].
        epsilon, eta: float32 [B]; 0: off.
    """
    scaled = _drop_below(scaled, scaled.softmax(-1), epsilon[:, None])
    logarithm = scaled.log_softmax(-1)
    probability = logarithm.exp()
    entropy = -(logarithm * probability).nansum(-1)
    least = torch.minimum(eta, eta.sqrt() * (-entropy).exp())
    return _drop_below(scaled, probability, least[:, None])


def _drop_below(scaled: Tensor, probability: Tensor, least: Tensor) -> Tensor:
    return scaled.masked_fill((probability < least) & (scaled < scaled.amax(-1, keepdim=True)), -_INF)


def with_noise(
    scores: Tensor, scaled: Tensor, reals: Tensor, integers: Tensor, slots: Tensor, positions: Tensor, noise: Noise
) -> Tensor:
    """Of rows that draw the tempered logits with noise, of greedy rows the scores; float32 [B, V]."""
    noisy = scaled + noise(integers[slots, 0], positions, scores.shape[-1])
    return torch.where((reals[slots, 0] > 0)[:, None], noisy, scores)


def best_of(scores: Tensor) -> Tensor:
    """The id of each row's largest score, -1 where it is NaN or -inf; [B, V] to int64 [B]."""
    best, tokens = scores.max(-1)
    return torch.where(best.isnan() | (best == -torch.inf), -1, tokens)
