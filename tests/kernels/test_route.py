"""Which experts a token goes to: the op on a CPU, and its Triton kernels in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import Interpreter

from hybridgen.kernels.linear.experts_form import RouteForm
from hybridgen.kernels.linear.route import route


@pytest.mark.parametrize("form", [RouteForm(True), RouteForm(False), RouteForm(False, True, True)], ids=str)
def test_the_op(form: RouteForm) -> None:
    x, weight = torch.randn(5, 24), torch.randn(7, 24)
    bias = torch.randn(7) if form.chosen_only else None
    logits, scores, ids = route(x, weight, bias, 3, form)
    every = logits.softmax(-1).gather(1, ids)
    wanted = every if form == RouteForm(False) else every / every.sum(-1, keepdim=True)
    assert torch.allclose(scores, wanted)
    assert torch.equal(logits.gather(1, ids), logits.topk(3).values)
    torch.library.opcheck(torch.ops.hybridgen.route.default, (x, weight, bias, 3, *form))


@pytest.mark.parametrize("check", ["check_forms", "check_what_is_no_number"])
def test_kernels_in_the_interpreter(check: str, triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(__file__).with_name("route_interpreter.py"), check, 0)
