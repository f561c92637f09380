"""Triton's kernels of experts against the reference, in Triton's interpreter; run by test_experts_op.py.

float32 only, but for the kernels in MXFP4 for few tokens: the interpreter's `tl.dot` is wrong on bfloat16.
"""

from __future__ import annotations

import ptx
import torch
import torch.nn.functional as F
from experts_cases import CASES, CLAMPED, SILU, Case, arguments, choices, make

from hybridgen.kernels.linear.experts import activate, expert_values, reference
from hybridgen.kernels.linear.experts_few import COLUMNS, FewTile, few_products
from hybridgen.kernels.linear.experts_launch import Tile, experts_on_cuda, plan
from hybridgen.kernels.linear.layout import Block


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


FEW = [
    (Case(4, 2, 96, 64, CLAMPED, "mxfp4", Block(1, 32), biased=True), 3, FewTile(1, 1), FewTile(2, 2)),
    (Case(3, 2, 288, 96, CLAMPED, "mxfp4", Block(1, 32), biased=True), 3, FewTile(2, 2, 0, 2), FewTile(1, 2)),
    (Case(2, 2, 160, 64, SILU, "mxfp4", Block(1, 32)), 12, FewTile(4, 1, 0, 3), FewTile(1, 2, 0, 2)),
]


def check_few(number: int) -> None:
    """The kernels in MXFP4 for few tokens, from their PTX: sizes that fill no tile and no step, lists of pairs."""
    ptx.install()
    case, tokens, *tiles = FEW[number]
    made = make(case, dtype=torch.bfloat16)
    x, ids, _ = choices(case, tokens, number, dtype=torch.bfloat16)
    wanted = []
    for token in range(tokens):
        for expert in ids[token].tolist():
            up, down = (
                expert_values(one, expert, "mxfp4", size, Block(1, 32), False, torch.float64)
                for one, size in ((made.gate_up, case.hidden), (made.down, case.width))
            )
            bias = None if made.gate_up.bias is None else made.gate_up.bias[expert].double()
            wanted.append(F.linear(activate(F.linear(x[token].double(), up, bias), case.form), down))

    def found(rows: slice) -> torch.Tensor:
        planned = rows.stop - rows.start > 8
        order, blocks = plan(ids[rows], case.experts, COLUMNS) if planned else (ids, ids)
        return few_products(
            x[rows], ids[rows].contiguous(), order, blocks, made.gate_up, made.down, case.form, planned, tuple(tiles)
        )

    every = found(slice(0, tokens))
    error = float((every - torch.stack(wanted)).norm() / torch.stack(wanted).norm())
    assert error < 4e-4, (case, error)
    for token in (1, tokens - 1):
        alone = found(slice(token, token + 1))
        assert torch.equal(alone, every[token * case.chosen : (token + 1) * case.chosen])
