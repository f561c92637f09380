"""What tells recordings apart."""

from __future__ import annotations

from typing import NamedTuple

from hybridgen.models.attention import Phase
from hybridgen.sampling import SamplerPlan

LAYERS = "layers"
"""The executor that serves every step: the model's own decoder layers, compiled or not."""
SAMPLER = "sampler"
"""Stands where a key has its executor, in keys of the rest of a step: see `GraphKey.rest`."""


class GraphKey(NamedTuple):
    """What distinguishes steps that cannot share a recording."""

    executor: str
    """Who makes logits of tokens: `layers`, `chain`, `persistent` or `rows`; `sampler`: the step begins at logits."""
    phase: Phase
    rows: int
    """Requests that it samples for: all of them in decode, those whose prompt ends in prefill."""
    tokens: int
    """Tokens fed in all: T."""
    query_len: int
    """Tokens a row in decode, 1 without drafts; 1 in prefill, whose runs have any length."""
    sampler: SamplerPlan | None
    """The sampler's parts; None: the step ends at the logits, and `ModelSteps.finish` runs after it."""
    quiet: bool = False
    """Whether nobody drafts at the end of a decode step, though somebody could; False where nobody can."""

    @property
    def size(self) -> int:
        """What buckets count: rows of a decode step, tokens of a prefill."""
        return self.rows if self.phase is Phase.DECODE else self.tokens

    @property
    def is_rest(self) -> bool:
        """Whether it is the rest of a step, see `rest()`."""
        return self.executor == SAMPLER

    def rest(self, sampler: SamplerPlan) -> GraphKey:
        """What is left of this step, which ended at its logits: masks of rows with a grammar, sampler, and all behind.

        It is recorded apart, so that the masks are made while the forward runs.
        """
        return self._replace(executor=SAMPLER, sampler=sampler)

    @classmethod
    def prefill(cls, tokens: int, rows: int, sampler: SamplerPlan | None) -> GraphKey:
        """A prefill of so many tokens in all, in which so many prompts end."""
        return cls(LAYERS, Phase.PREFILL, rows, tokens, 1, sampler)

    @classmethod
    def decode(
        cls,
        rows: int,
        sampler: SamplerPlan | None,
        *,
        query_len: int = 1,
        executor: str = LAYERS,
        quiet: bool = False,
    ) -> GraphKey:
        """A decode step of so many rows."""
        return cls(executor, Phase.DECODE, rows, rows * query_len, query_len, sampler, quiet)


def describe(key: GraphKey) -> str:
    """A recording's name in messages."""
    if key.is_rest:
        return f"the sampler's graph of {key.rows} rows"
    rows = "" if key.phase is Phase.DECODE else f" for {key.rows} prompts" if key.rows != 1 else ""
    return f"the {key.phase} graph of {key.size} {'rows' if key.phase is Phase.DECODE else 'tokens'}{rows}"


def describe_sampler(key: GraphKey) -> str:
    """The parts of the sampler that a recording has."""
    if key.sampler is None:
        return "outside"
    parts = [
        name for name, value in zip(key.sampler._fields, key.sampler, strict=True) if value not in (False, None, 0)
    ]
    if key.sampler.logprobs == 0:
        parts.append("logprobs")
    return ", ".join(parts) or "greedy"
