"""Weights of random codes in every kind and block, for tests of the products with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.kernels.linear import layout
from hybridgen.kernels.linear.layout import Block


class Case(NamedTuple):
    """A weight."""

    kind: str
    outputs: int
    inputs: int
    block: Block
    zeros: bool = False
    scales: torch.dtype = torch.bfloat16


CASES = [
    Case("int4", 40, 256, Block(1, 128)),
    Case("int4", 24, 200, Block(1, 64), True, torch.float16),
    Case("int4", 33, 250, Block(1, 32), True),
    Case("int4", 24, 77, Block(1, 77)),
    Case("int4", 24, 384, Block(1, 384), True),
    Case("int8", 40, 256, Block(1, 128)),
    Case("int8", 17, 200, Block(1, 32), True),
    Case("int8", 24, 130, Block(1, 130), False, torch.float32),
    Case("fp8", 40, 256, Block(1, 256), False, torch.float32),
    Case("fp8", 40, 300, Block(32, 128), False, torch.float32),
    Case("fp8", 24, 130, Block(24, 130)),
    Case("mxfp4", 40, 256, Block(1, 32), False, torch.uint8),
    Case("mxfp4", 17, 96, Block(1, 32), False, torch.uint8),
]


class Made(NamedTuple):
    """Its tensors."""

    data: Tensor
    scales: Tensor
    zeros: Tensor | None


def make(case: Case, device: str = "cpu") -> Made:
    """The weight of a case; values are about as large as a model's."""
    kind, outputs, inputs = case.kind, case.outputs, case.inputs
    g = torch.Generator().manual_seed(outputs * 1000 + inputs)
    width, grid = -(-inputs // layout.codes_per_item(kind)), case.block.grid(outputs, inputs)
    scales = (torch.rand(grid, generator=g) + 0.5) * {"int4": 0.01, "int8": 0.0005, "fp8": 0.05, "mxfp4": 1}[kind]
    zeros = None
    if kind == "int4":
        data = torch.randint(-(2**31), 2**31, (outputs, width), generator=g).int()
        if case.zeros:
            zeros = torch.randint(4, 13, grid, generator=g, dtype=torch.uint8)
    elif kind == "int8":
        data = torch.randint(-128, 128, (outputs, width), generator=g, dtype=torch.int8)
        if case.zeros:
            zeros = torch.randint(-20, 20, grid, generator=g, dtype=torch.int16)
    elif kind == "fp8":
        data = torch.randn(outputs, width, generator=g).to(torch.float8_e4m3fn)
    else:
        data = torch.randint(0, 256, (outputs, width), generator=g, dtype=torch.uint8)
    stored = (
        torch.randint(118, 124, grid, generator=g, dtype=torch.uint8) if kind == "mxfp4" else scales.to(case.scales)
    )
    assert layout.problem(kind, data, stored, zeros, inputs, case.block) is None
    return Made(data.to(device), stored.to(device), None if zeros is None else zeros.to(device))
