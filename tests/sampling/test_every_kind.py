"""The plans that stand for all kernels of sampling."""

from __future__ import annotations

import itertools

import hybridgen
from hybridgen import SamplingParams
from hybridgen.sampling.resolve import ResolvedSampling, resolve
from hybridgen.sampling.state import SamplerPlan, every_kind, plan_of

VOCAB = 128


def kernels_of(plan: SamplerPlan) -> tuple[bool, ...]:
    """What decides about kernels on CUDA; see `sampler._choose` and `kernels.sampling.Variant`."""
    min_p_alone = plan.min_p and not (plan.top_k or plan.nucleus)
    return plan.sample, plan.top_k, plan.nucleus, min_p_alone, plan.processes


def resolved(**fields: object) -> ResolvedSampling:
    return resolve(SamplingParams(max_new_tokens=4, **fields), None, (), VOCAB)


def test_every_request_has_the_kernels_of_one_of_them() -> None:
    kinds = {kernels_of(plan) for plan in every_kind(VOCAB)}
    choices = itertools.product((0.0, 0.7), (0, 5), (1.0, 0.9), (0.0, 0.1), (0.0, 0.5), ({}, {3: 1.0}))
    for temperature, top_k, top_p, min_p, penalty, bias in choices:
        request = resolved(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, presence_penalty=penalty, logit_bias=bias
        )
        assert kernels_of(plan_of(request, VOCAB)) in kinds
    assert len(kinds) == 12


def test_running_them_changes_nothing(eager_engine: hybridgen.Engine) -> None:
    fields = {"max_new_tokens": 6, "temperature": 0.8, "seed": 3, "presence_penalty": 0.4, "ignore_eos": True}
    before = eager_engine.generate([[5, 6, 7], [8]], **fields)
    steps = dict(eager_engine.stats().steps)
    eager_engine.exercise_samplers()
    assert dict(eager_engine.stats().steps) == steps
    after = eager_engine.generate([[5, 6, 7], [8]], **fields)
    assert [out.token_ids for out in after] == [out.token_ids for out in before]
