"""The product of a few rows: which weights its kernel on CUDA takes, and that kernel in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import Interpreter

from hybridgen.kernels.step.linear import few_rows, serves


def test_which_weights_are_served() -> None:
    weight = torch.empty(64, 512, dtype=torch.bfloat16)
    assert serves(weight, None)
    assert serves(weight, torch.empty(64, dtype=torch.bfloat16))
    assert not serves(weight, torch.empty(64))
    assert not serves(weight.float(), None)
    assert not serves(weight.t(), None)
    assert not serves(torch.empty(64, 516, dtype=torch.bfloat16), None)
    assert not serves(torch.empty(2**17, 512, dtype=torch.bfloat16, device="meta"), None)


def test_the_op_is_one_that_compilers_can_trace() -> None:
    torch.library.opcheck(torch.ops.hybridgen.few_rows.default, (torch.randn(3, 24), torch.randn(7, 24), None))
    assert few_rows(torch.ones(2, 24), torch.ones(7, 24), torch.ones(7)).tolist() == [[25.0] * 7] * 2


def test_the_kernel_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("few_rows_interpreter.py"), "check_products", 0)
