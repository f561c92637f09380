"""Gate and up as one op: what it computes, and that compilers can trace it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import Interpreter
from torch.nn import functional as F

from hybridgen.kernels.linear.gated import gated_rows, has_kernel


def test_the_op_is_one_that_compilers_can_trace() -> None:
    rows, weight = torch.randn(3, 24), torch.randn(14, 24)
    torch.library.opcheck(torch.ops.hybridgen.gated_rows.default, (rows, weight))
    expected = F.silu(rows @ weight[:7].T) * (rows @ weight[7:].T)
    torch.testing.assert_close(gated_rows(rows, weight), expected)
    assert not has_kernel(weight)


def test_the_triton_kernel_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("gated_rows_interpreter.py"), "check_gate", 0)
