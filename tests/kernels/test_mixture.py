"""The second half of a layer with a mixture: the op on a CPU, and its Triton kernels in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experts_cases import CLAMPED, SILU, Case, make
from interpreter import Interpreter

from hybridgen.kernels.linear.experts import experts
from hybridgen.kernels.linear.experts_form import Form, Normed, Routed, RouteForm
from hybridgen.kernels.linear.layout import Block
from hybridgen.kernels.linear.mixture import mixture
from hybridgen.kernels.linear.route import route


@pytest.mark.parametrize("form", [CLAMPED, SILU], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_op(form: Form, rows: int) -> None:
    case = Case(4, 2, 96, 64, form, "mxfp4", Block(1, 32), biased=form is CLAMPED)
    made = make(case)
    x, added, weight = torch.randn(rows, 96), torch.randn(rows, 96), torch.randn(96)
    router, bias = torch.randn(4, 96), torch.randn(4) if form is CLAMPED else None
    norm, routed = Normed(weight, 1e-6, 0.0), Routed(router, bias, 2, RouteForm(True))
    found = mixture(x, added, norm, routed, made.gate_up, made.down, form)
    states = x + added
    normed = torch.nn.functional.rms_norm(states, (96,), weight, 1e-6)
    _, scores, ids = route(normed, router, bias, 2, RouteForm(True))
    wanted = states + experts(normed, ids, scores, *made)
    assert torch.allclose(found, wanted, atol=1e-4)
    gate_up, down = made.gate_up, made.down
    torch.library.opcheck(
        torch.ops.hybridgen.mixture.default,
        (x, added, *norm, router, bias, 2, *routed.form, gate_up.data, gate_up.scales, gate_up.bias, down.data,
         down.scales, down.bias, form.interleaved, form.activation, form.alpha, form.limit),
    )  # fmt: skip


@pytest.mark.parametrize("check", ["check_norm_and_logits", "check_sum"])
def test_kernels_in_the_interpreter(check: str, triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("mixture_interpreter.py"), check, 0)
