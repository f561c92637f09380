"""Experts of random weights in every kind, for tests of the op."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from quantised_cases import Case as Weight
from quantised_cases import make as make_weight
from torch import Tensor

from hybridgen.kernels.linear.experts_form import DENSE, Form, Projection
from hybridgen.kernels.linear.layout import Block

SILU, CLAMPED = Form("silu"), Form("clamped", interleaved=True, alpha=1.702, limit=0.7)


class Case(NamedTuple):
    """Experts and how many of them a token chooses."""

    experts: int
    chosen: int
    hidden: int
    width: int
    form: Form
    kind: str = DENSE
    block: Block | None = None
    biased: bool = False
    zeros: bool = False


CASES = [
    Case(5, 2, 48, 40, SILU),
    Case(8, 4, 40, 24, Form("gelu_tanh")),
    Case(4, 3, 33, 17, Form("gelu", interleaved=True), biased=True),
    Case(4, 2, 72, 40, CLAMPED._replace(transposed=True), biased=True),
    Case(3, 1, 24, 40, Form("relu", transposed=True)),
    Case(4, 2, 96, 64, CLAMPED, "mxfp4", Block(1, 32), biased=True),
    Case(4, 2, 128, 64, SILU, "fp8", Block(64, 64)),
    Case(4, 2, 72, 40, SILU, "fp8", Block(1, 0)),
    Case(3, 2, 128, 64, SILU, "int4", Block(1, 64)),
    Case(4, 2, 32, 64, SILU, "int4", Block(1, 16), zeros=True),
    Case(4, 2, 64, 32, SILU, "int8", Block(1, 32)),
]


class Made(NamedTuple):
    """The arguments of `experts` behind the router's weights."""

    gate_up: Projection
    down: Projection
    form: Form
    kind: str
    block: Block | None


def make(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Made:
    """The weights of a case; results are about as large as the inputs."""
    g = torch.Generator().manual_seed(case.hidden * 1000 + case.width)
    sizes = (2 * case.width, case.hidden), (case.hidden, case.width)

    def projection(outputs: int, inputs: int) -> Projection:
        bias = torch.randn(case.experts, outputs, generator=g) if case.biased else None
        if case.kind == DENSE:
            data = torch.randn(case.experts, outputs, inputs, generator=g) * inputs**-0.5
            scales = zeros = None
            data = (data.transpose(1, 2).contiguous() if case.form.transposed else data).to(dtype)
        else:
            assert case.block is not None
            block = Block(case.block.outputs, case.block.inputs or inputs)
            stored = torch.float32 if case.kind == "fp8" else torch.bfloat16
            each = [
                make_weight(Weight(case.kind, outputs, inputs, block, case.zeros, stored)) for _ in range(case.experts)
            ]
            # Rolled, so that no two experts are alike.
            data = torch.stack([torch.roll(one.data, i, 0) for i, one in enumerate(each)])
            scales = torch.stack([torch.roll(one.scales, i, 0) for i, one in enumerate(each)])
            zeros = torch.stack([one.zeros for one in each if one.zeros is not None]) if case.zeros else None
        return Projection(
            *(None if t is None else t.to(device) for t in (data, scales, zeros)), _cast(bias, device, dtype)
        )  # type: ignore[arg-type]

    return Made(projection(*sizes[0]), projection(*sizes[1]), case.form, case.kind, case.block)


def _cast(bias: Tensor | None, device: str, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(device, dtype)


def choices(case: Case, tokens: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """x, ids and weights of some tokens; experts of a token are distinct."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, case.hidden, generator=g)
    ids = torch.stack([torch.randperm(case.experts, generator=g)[: case.chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, case.chosen, generator=g)
    return x.to(device, dtype), ids.to(device), weights.to(device, dtype)


def arguments(made: Made) -> tuple[Any, ...]:
    """What the op gets behind the router's weights."""
    outputs, inputs = made.block or Block(0, 0)
    form = made.form
    return (
        *itertools.chain(made.gate_up, made.down),
        made.kind, outputs, inputs, form.transposed, form.interleaved, form.activation, form.alpha, form.limit,
    )  # fmt: skip
