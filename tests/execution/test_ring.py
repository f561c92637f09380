"""The ring: what steps leave, when the host reads it, and what happens when nobody does."""

from __future__ import annotations

import torch

from hybridgen.core import TokenLogprob
from hybridgen.execution.ring import LINES, LaunchedStep, TokenRing
from hybridgen.kernels.step.advance import REJECTED
from hybridgen.sampling import SampleOutput

CPU = torch.device("cpu")


def finish(ring: TokenRing, sampled: SampleOutput) -> LaunchedStep:
    count = sampled.tokens.shape[0]
    rows = torch.arange(count)
    ring.reserve()
    ring.finish(sampled, rows, rows + 5, rows, torch.zeros(3, 5, dtype=torch.int64))
    return ring.launched(count, None if sampled.logprobs is None else 0, "eager", "why")


def test_tokens_come_back() -> None:
    ring = TokenRing(4, CPU)
    step = finish(ring, SampleOutput(torch.tensor([3, -1])))
    assert (step.rows, step.kind, step.reason) == (2, "eager", "why")
    assert step.read() == ([[3], [-1]], None, None)


def test_logprobs_come_back() -> None:
    ring = TokenRing(4, CPU)
    step = finish(ring, SampleOutput(torch.tensor([3, 4]), torch.tensor([-1.0, -2.0])))
    assert step.read().logprobs == [[TokenLogprob(3, -1.0)], [TokenLogprob(4, -2.0)]]


def test_top_logprobs_as_many_as_the_step_asked_for() -> None:
    ring = TokenRing(4, CPU)
    sampled = SampleOutput(
        torch.tensor([3]), torch.tensor([-1.0]), torch.tensor([[3, 9, 7]]), torch.tensor([[-1.0, -1.5, -2.0]])
    )
    ring.finish(sampled, torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.zeros(3, 5, dtype=torch.int64))
    assert ring.launched(1, 2, "", "").read().logprobs == [[TokenLogprob(3, -1.0, ((3, -1.0), (9, -1.5)))]]


def test_steps_that_nobody_read_in_time_are_not_lost() -> None:
    ring = TokenRing(2, CPU)
    steps = [finish(ring, SampleOutput(torch.tensor([i, 100 + i]))) for i in range(3 * LINES)]
    assert [step.read().tokens for step in steps] == [[[i], [100 + i]] for i in range(3 * LINES)]


def test_a_step_of_nobody_does_not_shift_the_lines() -> None:
    ring = TokenRing(2, CPU)
    finish(ring, SampleOutput(torch.tensor([1]))).read()
    table = torch.zeros(3, 5, dtype=torch.int64)
    ring.finish(SampleOutput(torch.tensor([66])), torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), table)
    ring.resynchronize()
    assert finish(ring, SampleOutput(torch.tensor([2]))).read().tokens == [[2]]


def test_several_tokens_a_row_as_many_as_were_accepted() -> None:
    ring = TokenRing(3, CPU, query_len=3)
    table = torch.zeros(3, 4, dtype=torch.int64)
    table[:, 1] = torch.tensor([5, 10, 2])
    tokens = torch.tensor([[7, REJECTED, REJECTED], [8, 9, 4]])
    places = torch.arange(6.0).view(6)
    sampled = SampleOutput(tokens, -places, torch.arange(6)[:, None], -places[:, None])
    rows = torch.tensor([0, 1])
    ring.finish(sampled, rows, torch.tensor([21, 11]), torch.tensor([1, 2]), table)
    output = ring.launched(2, 1, "", "", 3).read()
    assert output.tokens == [[7], [8, 9, 4]]
    assert output.logprobs == [
        [TokenLogprob(7, 0.0, ((0, 0.0),))],
        [TokenLogprob(token, -i, ((i, -i),)) for token, i in ((8, 3.0), (9, 4.0), (4, 5.0))],
    ]
    assert table.tolist() == [[7, 4, 0, 0], [21, 13, 0, 0], [2, 5, 0, 0]]
