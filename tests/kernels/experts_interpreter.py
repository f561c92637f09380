"""Triton's kernels of experts against the reference, in Triton's interpreter; run by test_experts_op.py.

float32 only: the interpreter's `tl.dot` is wrong on bfloat16.
"""

from __future__ import annotations

import torch
from experts_cases import CASES, arguments, choices, make

from hybridgen.kernels.linear.experts import reference
from hybridgen.kernels.linear.experts_launch import Tile, experts_on_cuda, plan


def check_case(number: int) -> None:
    """Results of one of `CASES`, of few and of many tokens, alone and in company; with a cut of down's inputs."""
    case = CASES[number]
    made = make(case)
    tiles = Tile(32, 16, 32, 1, 4, 2), Tile(16, 16, 32, 3, 4, 2)
    for tokens in (3, 18, 70) if number in (0, 3, 6) else (3, 18):
        x, ids, weights = choices(case, tokens, tokens)
        wanted = reference(x.double(), ids, weights.double(), *arguments(made))
        out = experts_on_cuda(x, ids, weights, *arguments(made), tiles=tiles)
        error = float((out - wanted).abs().max() / wanted.abs().max())
        assert error < 3e-6, (case, tokens, error)
        if tokens == 18:
            alone = experts_on_cuda(x[13:14], ids[13:14], weights[13:14], *arguments(made), tiles=tiles)
            assert torch.equal(alone[0], out[13])


def check_many_of_one_expert(number: int) -> None:
    """More pairs of one expert than a program takes, whose choices are not distinct either."""
    case = CASES[number]
    made = make(case)
    x, ids, weights = choices(case, 40, 0)
    ids[:] = 1
    ids[7] = 0
    wanted = reference(x.double(), ids, weights.double(), *arguments(made))
    out = experts_on_cuda(x, ids, weights, *arguments(made))
    assert float((out - wanted).abs().max() / wanted.abs().max()) < 3e-6


def check_plan(number: int) -> None:
    """Every pair is in one block of its expert."""
    g = torch.Generator().manual_seed(number)
    for tokens, chosen, experts, height in ((1, 2, 8, 16), (65, 4, 32, 16), (200, 1, 3, 64), (100, 8, 128, 4)):
        ids = torch.randint(0, experts, (tokens, chosen), generator=g)
        order, blocks = plan(ids, experts, height)
        seen = []
        for expert, first, stop in blocks.tolist():
            assert expert < 0 or 0 < stop - first <= height
            pairs = order[first:stop].tolist() if expert >= 0 else []
            assert all(int(ids.flatten()[pair]) == expert for pair in pairs)
            seen += pairs
        assert sorted(seen) == list(range(tokens * chosen))
