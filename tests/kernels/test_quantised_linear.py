"""The product with quantised weights: the op on a CPU, and its Triton kernels in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import Interpreter
from quantised_cases import CASES, make

from hybridgen.kernels.linear.layout import Block, dequantise
from hybridgen.kernels.linear.quantised import quantised_linear


@pytest.mark.parametrize("case", CASES)
def test_the_op_multiplies_with_the_values(case: object) -> None:
    assert isinstance(case, type(CASES[0]))
    weight = make(case)
    values = dequantise(case.kind, weight.data, weight.scales, weight.zeros, case.inputs, case.block, torch.float32)
    x, bias = torch.randn(2, 3, case.inputs), torch.randn(case.outputs)
    for rows, added in ((x, None), (x, bias), (x[0], bias), (x[:0], bias)):
        out = quantised_linear(rows, case.kind, *weight, added, case.inputs, case.block)
        wanted = torch.nn.functional.linear(rows, values, added)
        # torch's product of few rows with 8-bit weights adds in another order.
        tolerance = 1e-5 if rows is not x and case.kind == "int8" else 0.0
        torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)


def test_the_op_is_one_that_compilers_can_trace() -> None:
    case = CASES[1]
    weight = make(case)
    arguments = (torch.randn(3, case.inputs), *weight, None, case.kind, case.inputs, *case.block)
    torch.library.opcheck(torch.ops.hybridgen.quantised_linear.default, arguments)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_kernels_in_the_interpreter(case: int, triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("quantised_interpreter.py"), "check_case", case)


def test_where_scales_are_applied() -> None:
    kernels = pytest.importorskip("hybridgen.kernels.linear.quantised_kernels")
    for group, columns, where, step in ((4096, 1, 0, 128), (128, 32, 1, 128), (96, 43, 1, 32), (32, 128, 2, 128)):
        found = kernels.layout_of("int4", False, 4096, Block(1, group), columns)
        assert (found.where, found.step) == (where, step)
    assert kernels.layout_of("fp8", False, 4096, Block(48, 48), 86) is None
    for rows in (1, 8, 64, 256):
        for outputs, inputs in ((4096, 14336), (28672, 4096), (64, 64)):
            for kind in ("int4", "fp8"):
                layout = kernels.layout_of(kind, False, inputs, Block(1, 128), -(-inputs // 128))
                tile = kernels.default_tile(layout, rows, outputs, inputs, 132)
                assert tile.rows >= min(rows, 128)
                assert tile.inputs == 128
                assert 1 <= tile.splits <= max(1, inputs // 128)
