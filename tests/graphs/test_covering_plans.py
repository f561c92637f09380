"""A sampler with more parts than a batch needs gives it the same tokens: what `SamplerPlan.covers` promises."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridgen.kernels.step.advance import advance
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerPlan, SamplerState, resolve, sample

VOCAB = 300  # above two widths of a partial sort
INF = float("inf")

kinds = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.4, 1.0, 1.6]),
        "top_k": st.sampled_from([0, 1, 40, 64, 65, 200, 280, 299]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.5]),
        "logit_bias": st.sampled_from([{}, {3: 5.0, 7: -INF}]),
        "min_new_tokens": st.sampled_from([0, 4]),
        "logprobs": st.sampled_from([None, 0, 3]),
        "seed": st.integers(0, 2**63 - 1),
    }
)
plans = st.builds(
    SamplerPlan,
    sample=st.booleans(),
    ranked=st.sampled_from([0, 64, 256, VOCAB]),
    nucleus=st.booleans(),
    min_p=st.booleans(),
    penalties=st.booleans(),
    bias=st.booleans(),
    by_length=st.booleans(),
    top_k=st.booleans(),
    history=st.booleans(),
    cuts=st.booleans(),
    sampled_logprobs=st.booleans(),
    logprobs=st.sampled_from([None, 0, 3, 10]),
)


def joined(plan: SamplerPlan, other: SamplerPlan) -> SamplerPlan:
    """The smallest plan that covers both."""
    largest = [max(a, b) for a, b in zip(plan[:-1], other[:-1], strict=True)]
    wanted = [count for count in (plan.logprobs, other.logprobs) if count is not None]
    return SamplerPlan(*largest, max(wanted, default=None))


@settings(max_examples=150, deadline=None)
@given(requests=st.lists(kinds, min_size=1, max_size=4), more=plans, seed=st.integers(0, 1000))
def test_a_covering_plan_gives_the_same_tokens(requests: list[dict], more: SamplerPlan, seed: int) -> None:
    source = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    state = SamplerState(len(requests), VOCAB, "cpu")
    outputs = [source.choices(range(VOCAB), k=source.randint(0, 6)) for _ in requests]
    for slot, fields in enumerate(requests):
        params = resolve(SamplingParams(**fields, stop_token_ids=[9, 17]), None, (), VOCAB)
        state.assign(slot, params, source.choices(range(VOCAB), k=20), outputs[slot])
    slots = torch.arange(len(requests))
    needed = state.needs(range(len(requests)))
    covering = joined(needed, more)
    assert covering.covers(needed)
    assert covering.covers(more)
    state.allocate(covering)
    logits = torch.randn(len(requests), VOCAB, generator=generator) * source.choice([1, 3, 10])
    logits = logits.round(decimals=source.choice([1, 6]))  # ties
    generated = torch.tensor([len(output) for output in outputs])
    inputs = logits, state, slots, generated + 20, generated
    mine, theirs = sample(*inputs, needed), sample(*inputs, covering)
    assert torch.equal(mine.tokens, theirs.tokens)
    if needed.logprobs is not None:
        assert torch.equal(mine.logprobs, theirs.logprobs)
    if needed.logprobs:
        assert torch.equal(mine.top_logprobs, theirs.top_logprobs[:, : needed.logprobs])
    if covering.penalties:  # counted for all; requests without penalties do not look
        none = torch.zeros_like(slots)
        table, ring = torch.zeros(3, state.max_batch + 1, dtype=torch.int64), torch.zeros(1, 99, dtype=torch.int64)
        advance(theirs.tokens, slots, none, none, table, ring, none[:1], state.output_counts)
        again = sample(*inputs, needed), sample(*inputs, covering)
        assert torch.equal(again[0].tokens, again[1].tokens)


@given(plan=plans, other=plans, third=plans)
def test_covering_is_an_order(plan: SamplerPlan, other: SamplerPlan, third: SamplerPlan) -> None:
    assert plan.covers(plan)
    assert plan.covers(SamplerPlan())
    if plan.covers(other) and other.covers(plan):
        assert plan == other
    if plan.covers(other) and other.covers(third):
        assert plan.covers(third)
