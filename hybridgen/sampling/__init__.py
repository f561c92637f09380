"""Choosing tokens.

The way through this room: `resolve()` turns what a caller asked for into numbers without gaps; `SamplerState`
keeps them on the device, one row per slot; `sample()` chooses a token for each row of a step there (on CUDA by the ops
of `choice`), with noise that depends on (seed, position, token id) alone, as `gumbel_noise()` defines it;
`kernels.step.advance` counts it for penalties, and `remember()` writes it down for what depends on the order of
tokens.
"""

from hybridgen.sampling.history import remember
from hybridgen.sampling.random import gumbel_noise
from hybridgen.sampling.resolve import DEFAULT_MAX_NEW_TOKENS, ResolvedSampling, resolve
from hybridgen.sampling.sampler import SampleOutput, sample
from hybridgen.sampling.state import SamplerPlan, SamplerState, plan_of

__all__ = [
    "DEFAULT_MAX_NEW_TOKENS",
    "ResolvedSampling",
    "SampleOutput",
    "SamplerPlan",
    "SamplerState",
    "gumbel_noise",
    "plan_of",
    "remember",
    "resolve",
    "sample",
]
