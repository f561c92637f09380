"""`apply_history` and `remember` on a CPU, against loops over the text."""

from __future__ import annotations

import pytest
import torch
from sampling_history_cases import CONTEXT, VOCAB, random_tables
from torch import Tensor

from hybridgen.sampling.history import apply_history, remember


def by_hand(history: Tensor, tokens: Tensor, ends: Tensor, values: Tensor, size: int, length: int) -> list[float]:
    """The bias of one row."""
    text, bias = history[:length].tolist(), [0.0] * VOCAB
    for i, (start, end) in enumerate(zip(ends.tolist(), ends[1:].tolist(), strict=False)):
        *before, last = tokens[start:end].tolist() or [None]
        if before and text[-len(before) :] == before:
            bias[last] += values[i].item()
    for end in range(size, length + 1) if size else ():
        gram = text[end - size : end]
        if gram[:-1] == text[length - size + 1 :] and gram[-1] < VOCAB:
            bias[gram[-1]] = -torch.inf
    return bias


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_loops(seed: int) -> None:
    bias, *tables = random_tables(seed)
    apply_history(bias, *tables)
    history, tokens, ends, values, ngrams, slots, lengths = tables
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        expected = by_hand(history[slot], tokens[slot], ends[slot], values[slot], int(ngrams[slot]), length)
        assert bias[row].tolist() == expected


def test_tokens_are_written_behind_their_sequences() -> None:
    history = torch.zeros(3, CONTEXT, dtype=torch.int32)
    slots, lengths = torch.tensor([2, 0, 1]), torch.tensor([0, 5, CONTEXT])
    for _ in range(2):  # a step that failed runs again
        remember(torch.tensor([9, -1, 4]), slots, lengths, history)
    assert history[2, 0] == 9
    assert history.count_nonzero() == 1
