"""One token per row from its logits: the ops `hybridgen::choose_greedy` and `hybridgen::choose_sampled`.

| tensor | shape | dtype |
|---|---|---|
| logits | [B, V] | bfloat16, float16 or float32 on CUDA, any floating type on a CPU |
| reals | [slots, 3 or more] | float32: temperature (0: greedy), top-p (1: off), logarithm of min-p (-inf: off) |
| integers | [slots, 2 or more] | int64: seed, top-k (0: off) |
| slots | [B] | int64: each row's line in the two tables |
| positions | [B] | int64: the position that the new token will have in its sequence |
| the result | [B] | int64: -1 where there was nothing to choose |

The CPU implementations are the torch functions below, which sort; they define the result. The CUDA implementations are
Triton kernels that do not sort (`kernels.sampling`). There, a tempered logit has the same bits, and so has what greedy
rows, top-k and min-p decide. Two things can differ in a last bit:

- The noise: its logarithms are within a few units in the last place of the reference's.
- Top-p's edge: the reference adds float32 probabilities in float64; the kernels add multiples of 2^-44 of the most
  likely token's probability, each within 2^-19 of its value or half a multiple, without rounding the sums. So the kept
  set can differ by the tokens at the edge if the reference's running sum is within 2^-18 of p there.

What a row gets on CUDA depends on the row alone, bit for bit: not on other rows, their number, or the run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridgen.sampling.random import gumbel_noise

_library = torch.library.Library("hybridgen", "FRAGMENT")
_library.define("choose_greedy(Tensor logits) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "choose_sampled(Tensor logits, Tensor reals, Tensor integers, Tensor slots, Tensor positions, bool top_k, "
    "bool nucleus) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_INF = float("inf")

Noise = Callable[[Tensor, Tensor, int], Tensor]
"""Seeds int64 [B], positions [B] and V to noise [B, V]."""


def choose_greedy(logits: Tensor) -> Tensor:
    """The largest logit's id in each row, the lowest of equal ones; int64 [B].

    -1 where a logit is NaN or all are -inf.

    Raises:
        TypeError: on CUDA, the logits are of another type than the kernels take.
        ValueError: on CUDA, V is 2^19 or more.
    """
    return torch.ops.hybridgen.choose_greedy.default(logits)


def choose_sampled(
    logits: Tensor, reals: Tensor, integers: Tensor, slots: Tensor, positions: Tensor, top_k: bool, nucleus: bool
) -> Tensor:
    """A token for each row, drawn or (temperature 0) greedy, as `sampler.sample` describes; int64 [B].

    Args:
        top_k: some row may have top-k. Where False, nobody looks at it.
        nucleus: some row may have top-p. Where False, nobody looks at it.

    Raises:
        TypeError: on CUDA, the logits are of another type than the kernels take.
        ValueError: on CUDA, V is 2^19 or more.
    """
    return torch.ops.hybridgen.choose_sampled.default(logits, reals, integers, slots, positions, top_k, nucleus)


# What is done to logits before a token is chosen, one function per step. Logits and parameters are float32; parameters
# have shape [B], one for each row. The order and the meaning are those of Hugging Face's logits processors, in which
# every row has the same parameters; presence and frequency penalty are OpenAI's.
#
# What is kept is decided by values that a row's own kernel computes (maximum, softmax, running sum, sort) or the host.
# A sum over all rows could be rounded differently in a batch of another size.


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
    logits = torch.where(seen | (counts > 0), repeated, logits)
    return logits - presence[:, None] * (counts > 0) - frequency[:, None] * counts


def ban_early_end(logits: Tensor, banned: Tensor, generated: Tensor, min_new_tokens: Tensor) -> Tensor:
    """-inf for `banned` ids (bool [B, V]) while `generated` is below `min_new_tokens` (both int64 [B])."""
    return logits.masked_fill(banned & (generated < min_new_tokens)[:, None], -_INF)


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


def best_of(scores: Tensor) -> Tensor:
    """The id of each row's largest score, -1 where it is NaN or -inf; [B, V] to int64 [B]."""
    best, tokens = scores.max(-1)
    return torch.where(best.isnan() | (best == -torch.inf), -1, tokens)


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


def with_noise(
    scores: Tensor, scaled: Tensor, reals: Tensor, integers: Tensor, slots: Tensor, positions: Tensor, noise: Noise
) -> Tensor:
    """Of rows that draw the tempered logits with noise, of greedy rows the scores; float32 [B, V]."""
    noisy = scaled + noise(integers[slots, 0], positions, scores.shape[-1])
    return torch.where((reals[slots, 0] > 0)[:, None], noisy, scores)


def reference_greedy(logits: Tensor) -> Tensor:
    """`choose_greedy` in torch operators, on any device."""
    return best_of(logits.float())


def reference_sampled(
    logits: Tensor, reals: Tensor, integers: Tensor, slots: Tensor, positions: Tensor, top_k: bool, nucleus: bool
) -> Tensor:
    """`choose_sampled` in torch operators, on any device."""
    scores = logits.float()
    ranked = logits.shape[-1] if top_k or nucleus else 0
    if not top_k:
        integers = torch.stack((integers[:, 0], torch.zeros_like(integers[:, 1])), 1)
    scaled = truncated(scores, reals, integers, slots, ranked, nucleus, min_p=True)
    return best_of(with_noise(scores, scaled, reals, integers, slots, positions, gumbel_noise))


def _greedy_cuda(logits: Tensor) -> Tensor:
    from hybridgen.kernels.sampling.ops import launch_greedy

    return launch_greedy(logits)


def _sampled_cuda(
    logits: Tensor, reals: Tensor, integers: Tensor, slots: Tensor, positions: Tensor, top_k: bool, nucleus: bool
) -> Tensor:
    from hybridgen.kernels.sampling.ops import launch_sampled

    return launch_sampled(logits, reals, integers, slots, positions, top_k, nucleus)


def _tokens_like(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_library.impl("choose_greedy", reference_greedy, "CPU")
_library.impl("choose_greedy", _greedy_cuda, "CUDA")
_library.impl("choose_sampled", reference_sampled, "CPU")
_library.impl("choose_sampled", _sampled_cuda, "CUDA")
torch.library.register_fake("hybridgen::choose_greedy", _tokens_like, lib=_library)
torch.library.register_fake("hybridgen::choose_sampled", _tokens_like, lib=_library)
