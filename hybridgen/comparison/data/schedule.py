"""Which calls are measured, and in which order.

Every round visits every cell once, in an order of its own, so that slow changes of the machine (clocks, heat, other
work) meet all cells alike. The order follows from the seed and the round alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from hybridgen.comparison.data.config import CompareConfig
from hybridgen.comparison.data.results import BASELINE, MODE, SWITCH


class Cell(NamedTuple):
    """One figure of the comparison: who runs, and what."""

    subject: str
    prompt_length: int
    batch_size: int


def names(config: CompareConfig) -> tuple[str, ...]:
    """All subjects of a comparison, in the order of the tables."""
    return (*config.variants, *config.baselines)


def kind_of(name: str, config: CompareConfig) -> str:
    """Of a subject: `mode`, `switch` or `baseline`."""
    if name not in config.variants:
        return BASELINE
    return MODE if name in config.modes else SWITCH


def cells(config: CompareConfig, subjects: Sequence[str]) -> list[Cell]:
    """All cells of these subjects, in the order of the tables."""
    return [
        Cell(subject, length, batch)
        for length in config.prompt_lengths
        for batch in config.batch_sizes
        for subject in subjects
    ]


def in_order(config: CompareConfig, subjects: Sequence[str], number: int) -> list[Cell]:
    """The cells in the order of one round; rounds count from 0."""
    order = cells(config, subjects)
    random.Random(f"{config.seed}:{number}").shuffle(order)
    return order


def prompts(config: CompareConfig, length: int, batch: int, vocab_size: int) -> list[list[int]]:
    """Random token ids, the same for every subject.

    They leave out the first ids, which are often special tokens, where the vocabulary has others.
    """
    draw = random.Random(f"{config.seed}:{length}:{batch}")
    first = 3 if vocab_size > 3 else 0
    return [[draw.randrange(first, vocab_size) for _ in range(length)] for _ in range(batch)]
