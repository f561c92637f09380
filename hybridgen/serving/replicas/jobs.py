"""One prompt of a call for replicas, and which replica a list's prompts begin at."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hybridgen.params import SamplingParams


@dataclass
class Job:
    """One prompt of a call."""

    index: int
    prompt: Any
    sampling: SamplingParams
    """With a seed, so that a second try draws what the first drew."""
    stream: bool = False
    """Whether every token is an event, or completions alone."""
    cancelled: bool = False
    """Whether nobody wants it any more."""
    deaths: int = 0
    given: dict[int, int] = field(default_factory=dict)
    """Tokens of each choice that the caller has had."""
    ended: set[int] = field(default_factory=set)
    """Choices whose completion the caller has had."""


def job_of(index: int, prompt: Any, params: SamplingParams, stream: bool) -> Job:
    """A prompt, with a seed if it has none."""
    params = params if params.seed is not None else replace(params, seed=secrets.randbits(63))
    return Job(index, prompt, params, stream)


def length(job: Job) -> tuple[int, int]:
    """By what prompts are put in order: the tokens that they may have, then the size of the prompt."""
    prompt = job.prompt
    size = len(prompt) if isinstance(prompt, Sequence) else len(str(prompt))
    return job.sampling.max_new_tokens or 0, size


def dealt(jobs: list[Job], count: int, rows: int) -> list[deque[Job]]:
    """Shares of jobs for so many replicas: each job goes to the one with the fewest tokens to make, until none has a
    row left.

    Args:
        rows: completions that a replica makes at once.
    """
    shares: list[deque[Job]] = [deque() for _ in range(count)]
    tokens, room = [0] * count, [rows] * count
    for job in jobs:
        open_ = [number for number in range(count) if job.sampling.n <= room[number]]
        if not open_:
            break
        least = min(open_, key=tokens.__getitem__)
        shares[least].append(job)
        room[least] -= job.sampling.n
        tokens[least] += (job.sampling.max_new_tokens or 0) * job.sampling.n
    return shares
