"""The sampler: from logits to tokens on the device, with parameters of their own for every row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.sampling.choice import (
    ban_early_end,
    best_of,
    choose_greedy,
    choose_sampled,
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
    """float32 [B], of the chosen tokens, from the logits before any processor; NaN where the token is -1."""
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

    Raises:
        ValueError: the logits are not as wide as the state.
    """
    if logits.shape[-1] != state.vocab_size:
        raise ValueError(f"the logits have {logits.shape[-1]} columns and the sampler {state.vocab_size}")
    slots = slots.long()
    if logits.is_cuda:
        scores = process(logits.float(), state, slots, generated, plan) if plan.processes else logits
        tokens = _choose(scores, state, slots, positions, plan)
    else:
        scores = process(logits.float(), state, slots, generated, plan)
        if plan.sample:
            scaled = truncate(scores, state, slots, plan)
            scores = with_noise(scores, scaled, state.reals, state.integers, slots, positions, state.noise)
        tokens = best_of(scores)
    if plan.min_tokens:
        tokens = torch.where(logits.isnan().any(-1), -1, tokens)  # the NaN may be one of the banned ids
    return _with_logprobs(tokens, logits, plan.logprobs)


def _choose(scores: Tensor, state: SamplerState, slots: Tensor, positions: Tensor, plan: SamplerPlan) -> Tensor:
    """The tokens, by the ops: scores are read once in their own type, and nothing as wide is written."""
    if scores.dtype == torch.float64:
        scores = scores.float()
    if not plan.sample:
        return choose_greedy(scores)
    return choose_sampled(scores, state.reals, state.integers, slots, positions, plan.top_k, plan.nucleus)


def process(raw: Tensor, state: SamplerState, slots: Tensor, generated: Tensor, plan: SamplerPlan) -> Tensor:
    """Apply what both greedy and sampling rows have: bias, penalties, minimum length; float32 [B, V]."""
    scores = raw
    if plan.bias and state.bias is not None:
        scores = scores + state.bias[slots]
    if plan.penalties and state.prompt_seen is not None and state.output_counts is not None:
        scores = penalize(
            scores,
            state.prompt_seen[slots],
            state.output_counts[slots],
            state.repetition_penalty[slots],
            state.presence_penalty[slots],
            state.frequency_penalty[slots],
        )
    if plan.min_tokens and state.banned is not None:
        scores = ban_early_end(scores, state.banned[slots], generated, state.min_new_tokens[slots])
    return scores


def truncate(scores: Tensor, state: SamplerState, slots: Tensor, plan: SamplerPlan) -> Tensor:
    """Temper, then -inf for what top-k, top-p and min-p leave out; float32 [B, V], each row's maximum 0.

    Rows with temperature 0 come out with a temperature of 1; nobody reads them.
    """
    return truncated(scores, state.reals, state.integers, slots, plan.ranked, plan.nucleus, plan.min_p)


def _with_logprobs(tokens: Tensor, logits: Tensor, count: int | None) -> SampleOutput:
    if count is None:
        return SampleOutput(tokens)
    everything = logits.float().log_softmax(-1)
    chosen = everything.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
    chosen = torch.where(tokens < 0, torch.nan, chosen)
    if count == 0:
        return SampleOutput(tokens, chosen)
    top = everything.topk(min(count, everything.shape[-1]))
    return SampleOutput(tokens, chosen, top.indices, top.values)
