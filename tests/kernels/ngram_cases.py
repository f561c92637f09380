"""Texts for the tests of `draft_ngrams`, what it is to find in plain Python, and the kernel in Triton's interpreter."""

from __future__ import annotations

import random

import torch
from torch import Tensor

CONTEXT, SLOTS = 2100, 5  # three programs a row


def by_hand(text: list[int], shortest: int, longest: int, count: int) -> list[int]:
    """The drafts behind one text: the last of the places that agree for longest."""
    best, place = 0, 0
    for at in range(1, len(text)):
        agree = 0
        while agree < min(longest, at) and text[at - agree - 1] == text[len(text) - agree - 1]:
            agree += 1
        if agree >= max(best, shortest):
            best, place = agree, at
    if not place:
        return [-1] * count
    drafts: list[int] = []
    for i in range(count):
        drafts.append(text[place + i] if place + i < len(text) else drafts[place + i - len(text)])
    return drafts


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
    """The arguments of `draft_ngrams`; what lies behind a row's text would be found, if it were looked at."""
    rng = random.Random(seed)
    letters = rng.choice([1, 2, 3, 12, 500])
    text = torch.full((SLOTS, CONTEXT), 7777, dtype=torch.int32)
    lengths = [rng.choice([0, 1, 2, 3, 60, 1024, 1025, CONTEXT - 1, CONTEXT]) for _ in range(SLOTS)]
    for slot, length in enumerate(lengths):
        own = rng.choices(range(letters), k=length)
        if length > 40 and rng.random() < 0.5:
            own[-12:] = own[3:15]
        text[slot, :length] = torch.tensor(own, dtype=torch.int32)
        if 2 < length < CONTEXT - 8:
            text[slot, length : length + 8] = text[slot, length - 1]
    slots = torch.tensor(rng.sample(range(SLOTS), rng.randint(1, SLOTS)))
    shortest = rng.choice([1, 2, 3])
    return text, slots, torch.tensor(lengths)[slots], shortest, shortest + rng.choice([0, 1, 6]), rng.choice([1, 3, 7])


def check_kernel() -> None:
    """The kernel on all cases; only in the interpreter, where test_ngrams.py runs it."""
    from hybridgen.kernels.step.ngrams import draft_ngrams
    from hybridgen.kernels.step.ngrams_kernels import launch_ngrams

    for seed in range(20):
        case = random_case(seed)
        assert torch.equal(launch_ngrams(*case), draft_ngrams(*case)), seed
