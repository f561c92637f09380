"""Triton's products with quantised weights against the reference, in Triton's interpreter; run by
test_quantised_linear.py.

float32 only: the interpreter's `tl.dot` is wrong on bfloat16.
"""

from __future__ import annotations

import torch
from quantised_cases import CASES, make

from hybridgen.kernels.linear.layout import dequantise
from hybridgen.kernels.linear.quantised_kernels import Tile, dequantised, layout_of, product


def check_case(number: int) -> None:
    """Values and products of one of `CASES`: with a bias and without, whole and in splits, rows above a tile's."""
    case = CASES[number]
    weight = make(case)
    inputs, block = case.inputs, case.block
    layout = layout_of(case.kind, weight.zeros is not None, inputs, block, weight.scales.shape[1])
    assert layout is not None
    values = dequantise(case.kind, weight.data, weight.scales, weight.zeros, inputs, block, torch.float32)
    found = dequantised(weight.data, weight.scales, weight.zeros, layout, inputs, torch.float32)
    assert torch.equal(found, values)
    generator = torch.Generator().manual_seed(number)
    bias = torch.randn(case.outputs, generator=generator)
    for rows, splits, added in ((1, 1, None), (5, 1, bias), (18, 3, bias), (3, 2, None)):
        x = torch.randn(rows, inputs, generator=generator)
        wanted = torch.nn.functional.linear(x.double(), values.double(), None if added is None else added.double())
        tile = Tile(16, 16, layout.step, splits, 4, 2)
        out = product(x, weight.data, weight.scales, weight.zeros, added, layout, inputs, tile)
        error = float((out - wanted).abs().max() / wanted.abs().max())
        assert error < 2e-6, (case, rows, splits, error)
