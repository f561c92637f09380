"""What the scheduler tells the runner, and what the runner gives back: plain values.

A `StepPlan` holds numbers alone, so that it could be sent to another process: the ranks of a tensor-parallel group run
the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hybridgen.core import TokenLogprob
from hybridgen.sampling import ResolvedSampling


class Admission(NamedTuple):
    """A request gets a slot."""

    slot: int
    pages: Sequence[int]
    """Pages for its whole prompt and output."""
    sampling: ResolvedSampling
    prompt_ids: Sequence[int]


class Hidden(NamedTuple):
    """Which hidden states of a prompt are wanted."""

    layers: tuple[int, ...]
    """0: what goes into the first layer; the number of layers: what comes behind the last norm."""
    pool: str | None = None
    """`mean` or `last`; None: those of every token."""


class PrefillChunk(NamedTuple):
    """A run of consecutive prompt tokens of one request."""

    slot: int
    tokens: Sequence[int]
    start: int
    """Position of the first of them."""
    rope_length: int
    """Tokens of the whole prefill: the prompt, and what was generated before when a request is prefilled again."""
    generated: int
    """Tokens generated before (above 0 when a request is prefilled again)."""
    last: bool
    """Whether the prompt ends here, so that a token is sampled."""
    targets: Sequence[int] = ()
    """The tokens behind its last ones, whose log-probabilities are wanted: each follows on one of as many tokens."""
    others: Sequence[int] = ()
    """More tokens that could follow on its last one, whose log-probabilities are wanted too. Never without targets."""
    likely: int = 0
    """How many of the most likely tokens are told with each of them."""
    hidden: Hidden | None = None
    """Hidden states of its tokens that are wanted."""


class StepPlan(NamedTuple):
    """What one step runs, in this order."""

    admit: tuple[Admission, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    """Run in one call."""
    decode: tuple[int, ...] = ()
    """Slots that decode, one row each. The same tuple object while the batch stays as it is: then nothing is looked up
    again."""
    together: bool = False
    """Whether prefill and decode are one step, in which each token of the prompts is a row."""


class DraftCounts(NamedTuple):
    """What became of a row's drafts in a step."""

    checked: int
    """Drafts that the step fed."""
    made: int
    """Drafts that wait for the row's next step."""
    dropped: int
    """Drafts that were no ids of the model."""


class StepOutput(NamedTuple):
    """What a step produced, by row."""

    tokens: list[list[int]]
    """As many tokens of each row as were accepted: one without drafts. -1 where the row's logits held no number that
    could be chosen."""
    logprobs: list[list[TokenLogprob]] | None
    """Of those tokens; None where no row wants any."""
    drafts: list[DraftCounts] | None = None
    """None where nobody drafts."""
