"""`draft_ngrams` on a CPU against loops over the text, and the Triton kernel in the interpreter."""

from __future__ import annotations

from pathlib import Path

import ngram_cases
import pytest
import torch
from interpreter import Interpreter
from ngram_cases import by_hand, random_case

from hybridgen.kernels.step.ngrams import draft_ngrams


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_loops(seed: int) -> None:
    text, slots, lengths, shortest, longest, count = random_case(seed)
    drafts = draft_ngrams(text, slots, lengths, shortest, longest, count)
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        assert drafts[row].tolist() == by_hand(text[slot, :length].tolist(), shortest, longest, count)


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ([1, 2, 3, 9, 1, 2, 3, 8, 5, 2, 3], [8, 5, 2]),  # both agree for two tokens: the last counts
        ([1, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3], [9, 4, 2]),  # the one that agrees for longer
        ([5, 6, 5, 6], [5, 6, 5]),  # a text that repeats itself goes on
        ([4, 4, 4], [4, 4, 4]),
        ([1, 2, 3, 4], [-1, -1, -1]),
        ([1, 2, 3, 2], [-1, -1, -1]),  # one token is not enough
        ([], [-1, -1, -1]),
    ],
)
def test_what_is_found(text: list[int], drafts: list[int]) -> None:
    table = torch.zeros(1, 16, dtype=torch.int32)
    table[0, : len(text)] = torch.tensor(text, dtype=torch.int32)
    found = draft_ngrams(table, torch.tensor([0]), torch.tensor([len(text)]), 2, 8, 3)
    assert found.tolist() == [drafts]


def test_op_registration() -> None:
    torch.library.opcheck(torch.ops.hybridgen.draft_ngrams.default, random_case(3))


def test_the_kernel_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(ngram_cases.__file__), "check_kernel")
