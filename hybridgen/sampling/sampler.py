"""The sampler: from logits to tokens on the device, with parameters of their own for every row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.kernels.sampling.allowed import keep_allowed
from hybridgen.sampling.choice import choose_greedy, choose_sampled
from hybridgen.sampling.history import apply_history
from hybridgen.sampling.own import OwnRows
from hybridgen.sampling.processors import (
    apply_rules,
    best_of,
    count_behind,
    count_drafted,
    cut_off,
    keep_typical,
    penalize,
    truncated,
    with_noise,
)
from hybridgen.sampling.state import SamplerPlan, SamplerState

__all__ = ["SampleOutput", "SamplerPlan", "SamplerState", "process", "sample", "truncate"]


class SampleOutput(NamedTuple):
    """What a step chose, by row; tensors on the device."""

    tokens: Tensor
    """int64 [B]; -1 where there was nothing to choose: NaN among the logits, or all of them -inf."""
    logprobs: Tensor | None = None
    """float32 [B], of the chosen tokens, in the distribution that the row asks for; NaN where the token is -1."""
    top_ids: Tensor | None = None
    """int64 [B, k], most likely first."""
    top_logprobs: Tensor | None = None
    """float32 [B, k]."""


def sample(
    logits: Tensor,
    state: SamplerState,
    slots: Tensor,
    positions: Tensor,
    generated: Tensor,
    plan: SamplerPlan,
    own: OwnRows | None = None,
    drafts: Tensor | None = None,
    behind: Tensor | None = None,
    allowed: tuple[Tensor, Tensor] | None = None,
) -> SampleOutput:
    """Choose a token for each row. Runs on the device; the host waits for nothing.

    A row's token depends on its logits, parameters, history, seed and position, not on the other rows: greedy
    rows (temperature 0) take the largest processed logit, the lowest id on ties; the others take the largest
    sum of tempered logit and Gumbel noise, which is a draw from the softmax of what the filters kept. A row
    that samples and has a logit of +inf has no softmax, and gives -1.

    Args:
        logits: [B, V], any floating type; computed on in float32.
        state: parameters and histories.
        slots: integer [B], each row's slot.
        positions: int64 [B], the position that the new token will have in its sequence.
        generated: int64 [B], how many tokens the row's request has generated before.
        plan: `state.needs()` of the slots. What it leaves out is skipped.
        own: rows with functions of their own, which then decide on the host what is launched.
        drafts: int64 [B / Q, Q - 1], where Q rows follow each other for each request: the tokens that are the text
            behind the first of them, -1 for none. The history has them already.
        behind: int64 [B, N]: the last tokens of each row's text, below 0 for none, that the counts of its output do not
            have yet. The history has them already.
        allowed: rows, and bits for the tokens that each of them may choose; see `kernels.sampling.allowed`. It comes
            behind everything else that changes logits.

    Raises:
        ValueError: the logits are not as wide as the state.
    """
    if logits.shape[-1] != state.vocab_size:
        raise ValueError(f"the logits have {logits.shape[-1]} columns and the sampler {state.vocab_size}")
    slots = slots.long()
    cuda = logits.is_cuda
    scores = logits if cuda else logits.float()
    if plan.processes:
        scores = process(logits.float(), state, slots, positions, generated, plan, drafts, behind)
    if own is not None and own.calls:
        scores = own.apply(None if state.history is None else state.history.text, scores)
    if allowed is not None:
        scores = scores.clone()  # log-probabilities are of the logits as they were
        keep_allowed(scores, *allowed)
    exact = plan.cuts or plan.sampled_logprobs
    scaled = truncate(scores.float(), state, slots, plan) if exact or (plan.sample and not cuda) else None
    if cuda:
        tokens = _choose(scores, scaled, state, slots, positions, plan)
    elif plan.sample and scaled is not None:
        noisy = with_noise(scores, scaled, state.reals, state.integers, slots, positions, state.noise)
        tokens = best_of(noisy)
    else:
        tokens = best_of(scores)
    if plan.by_length or (own is not None and own.calls):
        tokens = torch.where(logits.isnan().any(-1), -1, tokens)  # the NaN may be one of the banned ids
    sampled = state.of_sampled[slots] if plan.sampled_logprobs else None
    return _with_logprobs(tokens, logits, scaled, sampled, plan.logprobs)


def _choose(
    scores: Tensor, scaled: Tensor | None, state: SamplerState, slots: Tensor, positions: Tensor, plan: SamplerPlan
) -> Tensor:
    """The tokens, by the ops: scores are read once in their own type, and nothing as wide is written.

    `scaled`: what `truncate` made of them, which rows choose from that have cutoffs or tell its probabilities. Other
    rows take no notice of it, so that what they get does not depend on whom they run with.
    """
    if scores.dtype == torch.float64:
        scores = scores.float()
    if not plan.sample:
        return choose_greedy(scores)
    reals, integers = state.reals, state.integers
    if scaled is not None:
        reals, integers = reals[slots], integers[slots]
        cuts = (state.typical_p[slots] < 1) | (state.epsilon_cutoff[slots] > 0) | (state.eta_cutoff[slots] > 0)
        exact = (cuts | (state.of_sampled[slots] > 0)) & (reals[:, 0] > 0)
        scores = scores.masked_fill(exact[:, None] & (scaled == -torch.inf), -torch.inf)
        reals[:, 1] = torch.where(exact, 1.0, reals[:, 1])
        integers[:, 1] = torch.where(exact, 0, integers[:, 1])
        slots = torch.arange(len(slots), device=slots.device)
    return choose_sampled(scores, reals, integers, slots, positions, plan.top_k, plan.nucleus, plan.min_p)


def process(
    raw: Tensor,
    state: SamplerState,
    slots: Tensor,
    positions: Tensor,
    generated: Tensor,
    plan: SamplerPlan,
    drafts: Tensor | None = None,
    behind: Tensor | None = None,
) -> Tensor:
    """Apply what both greedy and sampling rows have: bias, penalties, rules by length; float32 [B, V].

    All bans by id or by sequence are in the bias: what follows leaves -inf as it is.
    """
    scores = raw
    if (plan.bias or plan.history) and state.bias is not None:
        bias = state.bias[slots]
        if plan.history and state.history is not None:
            text, tokens, ends, values = state.history
            apply_history(bias, text, tokens, ends, values, state.ngrams, slots, positions)
        scores = scores + bias
    if plan.penalties and state.prompt_seen is not None and state.output_counts is not None:
        counts = state.output_counts.index_select(0, slots)
        if drafts is not None:
            count_drafted(counts, drafts)
        if behind is not None:
            count_behind(counts, behind)
        scores = penalize(
            scores,
            state.prompt_seen.index_select(0, slots),
            counts,
            state.repetition_penalty.index_select(0, slots),
            state.presence_penalty.index_select(0, slots),
            state.frequency_penalty.index_select(0, slots),
        )
    if plan.by_length and state.rules is not None:
        scores = apply_rules(scores, state.rules[slots], generated, state.limits[slots])
    return scores


def truncate(scores: Tensor, state: SamplerState, slots: Tensor, plan: SamplerPlan) -> Tensor:
    """Temper, then -inf for what the filters leave out; float32 [B, V]. Its softmax is what a row draws from.

    Greedy rows come out with a temperature of 1. In batches where someone asks for that distribution, nothing is left
    out of it for greedy rows; in others nobody reads it.
    """
    scaled = truncated(scores, state.reals, state.integers, slots, plan.ranked, plan.nucleus, plan.min_p)
    if plan.cuts:
        scaled = keep_typical(scaled, state.typical_p[slots])
        scaled = cut_off(scaled, state.epsilon_cutoff[slots], state.eta_cutoff[slots])
    if plan.sampled_logprobs and (plan.filter or plan.cuts):
        greedy = state.temperature[slots] == 0
        scaled = torch.where(greedy[:, None], scores - scores.amax(-1, keepdim=True), scaled)
    return scaled


def _with_logprobs(
    tokens: Tensor, logits: Tensor, scaled: Tensor | None, sampled: Tensor | None, count: int | None
) -> SampleOutput:
    """`sampled`: which rows want those of `scaled` (above 0); None: no row does."""
    if count is None:
        return SampleOutput(tokens)
    everything = logits.float().log_softmax(-1)
    if sampled is not None and scaled is not None:
        everything = torch.where(sampled[:, None] > 0, scaled.log_softmax(-1), everything)
    chosen = everything.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
    chosen = torch.where(tokens < 0, torch.nan, chosen)
    if count == 0:
        return SampleOutput(tokens, chosen)
    top = everything.topk(min(count, everything.shape[-1]))
    return SampleOutput(tokens, chosen, top.indices, top.values)
