"""Texts, sequences and n-gram sizes for the tests of `sampling.history`."""

from __future__ import annotations

import random

import torch
from torch import Tensor

CONTEXT, CAPACITY, VOCAB, SLOTS = 1100, 700, 30, 5


def random_tables(seed: int) -> list[Tensor]:
    """The arguments of `apply_history`, of which many sequences and n-grams match."""
    rng = random.Random(seed)
    letters = rng.choice([2, 3, 12])
    history = torch.randint(
        0, letters, (SLOTS, CONTEXT), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)
    )
    history[:, ::97], history[:, 5::97] = VOCAB, VOCAB - 1  # an id without a logit, and the last one with one
    tokens = torch.full((SLOTS, CAPACITY), 10**6, dtype=torch.int32)
    ends = torch.zeros(SLOTS, CAPACITY // 2 + 1, dtype=torch.int32)
    values = torch.full((SLOTS, CAPACITY // 2), 1e6)
    lengths = [rng.choice([1, 2, 5, 60, CONTEXT - 1, CONTEXT]) for _ in range(SLOTS)]
    for slot, length in enumerate(lengths):
        text = history[slot, :length].tolist()
        total, count = 0, 0
        for _ in range(rng.choice([0, 3, 200])):
            size = rng.choice([1, 1, 2, 3, 40])
            before = (
                text[len(text) - size :]
                if rng.random() < 0.5 and size <= length
                else rng.choices(range(letters), k=size)
            )
            if total + len(before) + 1 > CAPACITY:
                break
            sequence = torch.tensor([*before, rng.randrange(VOCAB)])
            tokens[slot, total : total + len(sequence)] = sequence
            values[slot, count] = rng.choice([-torch.inf, rng.randint(-64, 64) / 8])  # sums of eighths are exact
            total, count = total + len(sequence), count + 1
            ends[slot, count:] = total
    ngrams = torch.tensor([rng.choice([0, 1, 2, 3, 7, 64]) for _ in range(SLOTS)])
    slots = torch.tensor(rng.sample(range(SLOTS), rng.randint(1, SLOTS)))
    bias = torch.zeros(len(slots), VOCAB)
    table = torch.stack((ngrams, ngrams + 1), 1)  # a column of a table: strided
    return [bias, history, tokens, ends, values, table[:, 0], slots, torch.tensor(lengths)[slots]]
