"""The ops that feed, accept and keep drafts, on a CPU; and their kernels in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import draft_step_cases
import pytest
import torch
from draft_step_cases import SLOTS, VOCAB, random_chosen, random_made, random_tables
from interpreter import Interpreter

from hybridgen.kernels.step.advance import REJECTED
from hybridgen.kernels.step.drafts import accept_drafts, feed_drafts, keep_drafts


def test_what_is_fed() -> None:
    """A row's last token and its drafts; padding behind them, in the padding slot."""
    table = torch.tensor([[11, 12, 0], [5, 9, 0], [1, 1, 0]])
    drafts = torch.tensor([[3, 0, 4], [6, -1, -1], [-1, -1, -1]])
    ids, slots, positions = feed_drafts(table, drafts, torch.tensor([1, 0, 2]), 3)
    assert ids.view(3, 3).tolist() == [[12, 6, 0], [11, 3, 0], [0, 0, 0]]
    assert slots.view(3, 3).tolist() == [[1, 1, 2], [0, 0, 0], [2, 2, 2]]
    assert positions.view(3, 3).tolist() == [[9, 10, 0], [5, 6, 7], [0, 0, 0]]
    assert slots.dtype == torch.int32


@pytest.mark.parametrize(
    ("chosen", "drafts", "run"),
    [
        ([4, 5, 6], [4, 5], [4, 5, 6]),
        ([4, 5, 6], [4, 9], [4, 5]),
        ([4, 5, 6], [9, 5], [4]),
        ([-1, 5, 6], [0, 5], [-1]),
        ([4, -1, 6], [4, 0], [4, -1]),
        ([4, -1, 6], [4, -1], [4, -1]),  # nothing was drafted there, and nothing chosen
        ([-1, 5, 6], [-1, -1], [-1]),
        ([7], [4, 5], [7]),
    ],
)
def test_what_is_accepted(chosen: list[int], drafts: list[int], run: list[int]) -> None:
    accepted, brought = accept_drafts(torch.tensor([chosen]), torch.tensor([drafts, [-1, -1]]), torch.tensor([0]))
    assert accepted.tolist() == [run + [REJECTED] * (len(chosen) - len(run))]
    assert brought.tolist() == [len(run)]


@pytest.mark.parametrize(
    ("made", "room", "kept", "dropped"),
    [
        ([1, 2, 3], 9, [1, 2, 3], 0),
        ([1, 2, 3], 3, [1, 2], 0),  # one of the three is the step's own
        ([1, 2, 3], 1, [], 0),
        ([1, 2, 3], -4, [], 0),  # a step too many runs for a row that ended
        ([1, -1, 3], 9, [1], 0),
        ([1, VOCAB, 3], 9, [1], 1),
        ([-2, 2, 2**62], 9, [], 2),
    ],
)
def test_what_is_kept(made: list[int], room: int, kept: list[int], dropped: int) -> None:
    drafts = torch.tensor([[8, 8, -1], [9, 9, 9], [-1, -1, -1]])
    told = keep_drafts(torch.tensor([made]), drafts, torch.tensor([0]), torch.tensor([room]), VOCAB, 1)
    assert told.tolist() == [[1, len(kept), dropped]]
    assert drafts.tolist() == [kept + [-1] * (3 - len(kept)), [9, 9, 9], [-1, -1, -1]]


def test_padding_keeps_nothing() -> None:
    _, drafts, _ = random_tables(0)
    rows = torch.tensor([SLOTS - 1, 2, SLOTS - 1])
    made, room = torch.full((3, drafts.shape[1]), 4), torch.full((3,), 100)
    told = keep_drafts(made, drafts, rows, room, VOCAB, 0)
    assert told.tolist() == [[0, 0, 0], [0, drafts.shape[1], 0], [0, 0, 0]]
    assert drafts[-1].tolist() == [-1] * drafts.shape[1]


def test_op_registration() -> None:
    table, drafts, rows = random_tables(1)
    made, room = random_made(1, rows)
    torch.library.opcheck(torch.ops.hybridgen.feed_drafts.default, (table, drafts, rows, 4))
    chosen = random_chosen(1, drafts, rows, 4)
    torch.library.opcheck(torch.ops.hybridgen.accept_drafts.default, (chosen, drafts, rows))
    torch.library.opcheck(torch.ops.hybridgen.keep_drafts.default, (made, drafts, rows, room, VOCAB, 3))


def test_the_kernels_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(draft_step_cases.__file__), "check_kernels")
