"""Products of FP8 weights with rows rounded to FP8, on the CPU and in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_cases import by_hand, error
from interpreter import Interpreter

from hybridgen.kernels.linear.layout import Block, dequantise
from hybridgen.kernels.linear.quantised import MANY_ROWS, quantised_linear
from hybridgen.kernels.linear.rounded_rows import round_rows, takes

FP8 = torch.float8_e4m3fn


def _weight(outputs: int, inputs: int, scales: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(outputs, inputs).to(FP8), (torch.rand(scales) + 0.5).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "block"), [((32, 1), 1), ((1, 1), 32), ((2, 1), 16)])
def test_many_rows_are_multiplied_as_they_are_rounded(rows: tuple[int, int], block: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    data, scales = _weight(32, 48, rows)
    bias = torch.randn(32).to(dtype)
    x = (torch.randn(3, MANY_ROWS // 2, 48) * torch.logspace(-6, 4, MANY_ROWS // 2)[:, None]).to(dtype)
    args = data, scales, None, bias, 48, Block(block, 48)
    values = dequantise("fp8", data, scales, None, 48, Block(block, 48), torch.float32).double()
    largest = x.float().abs().amax(-1, keepdim=True) / 448
    wanted = (by_hand(x.float() / largest).double() * largest.double()) @ values.T + bias.double()
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    assert error(quantised_linear(x, "fp8", *args, rounds_rows=True), wanted) < limit
    plain = x.double() @ values.T + bias.double()
    assert error(quantised_linear(x, "fp8", *args), plain) < limit
    few = x[0, :7]
    assert torch.equal(quantised_linear(few, "fp8", *args, rounds_rows=True), quantised_linear(few, "fp8", *args))


def test_rows_of_zeros_and_of_no_numbers() -> None:
    x = torch.zeros(3, 16)
    x[1, 4], x[2, 5] = torch.nan, 1e-30
    codes, scales = round_rows(x)
    assert codes[0].float().eq(0).all()
    assert codes[1].float().isnan().all() or scales[1].isnan()
    assert scales.shape == (3, 1)
    assert (codes[2].float() * scales[2]).isfinite().all()


def test_which_weights_take_them() -> None:
    assert takes(*_weight(32, 48, (32, 1))) is None
    assert takes(*_weight(32, 256, (1, 2))) == "their scales are of blocks of inputs"
    assert takes(*_weight(24, 48, (24, 1))) == "their sizes are no multiples of 16"
    assert takes(torch.zeros(32, 48, dtype=torch.int8), torch.ones(32, 1)) == "they are not FP8"


def test_the_op_traces() -> None:
    data, scales = _weight(32, 48, (32, 1))
    x = torch.randn(MANY_ROWS + 1, 48)
    args = x, data, scales, None, None, "fp8", 48, 1, 48, True
    torch.library.opcheck(torch.ops.hybridgen.quantised_linear.default, args, test_utils="test_faketensor")


def test_rounding_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("interpreter_checks.py"), "check_rounded_rows")
