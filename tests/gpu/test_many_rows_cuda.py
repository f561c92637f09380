"""Gate and up of thousands of rows on a GPU: the kernel against float32, and models that prefill by it."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch.nn import functional as F

import hybridgen
from hybridgen.kernels.linear import gated as op
from hybridgen.kernels.linear.gated import LEAST_ROWS, by_cublas, gated_rows

pytestmark = pytest.mark.gpu

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="a kernel for Hopper"
)


@needs_hopper
@pytest.mark.parametrize(("width", "inputs"), [(128, 64), (320, 72), (1000, 2048), (14336, 4096)])
@pytest.mark.parametrize("rows", [1, 130, 700, 2049])
def test_gate_and_up_against_float32(rows: int, width: int, inputs: int) -> None:
    """Sizes that no tile ends with, into poisoned memory with a guard behind; then the same bits again."""
    from hybridgen.kernels.linear import many_rows

    g = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, inputs, device="cuda", generator=g).bfloat16()
    weight = torch.randn(2 * width, inputs, device="cuda", generator=g).mul(inputs**-0.5).bfloat16()
    assert many_rows.serves(weight)
    room = torch.full((rows + 64, width), float("nan"), device="cuda", dtype=torch.bfloat16)
    many_rows.product(x, weight, room[:rows])
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    error = (room[:rows].double() - wanted).norm() / wanted.norm()
    assert error < 5e-3, float(error)
    assert room[rows:].isnan().all()
    again = torch.empty_like(room)
    for _ in range(100):
        again.fill_(float("nan"))
        many_rows.product(x, weight, again[:rows])
        assert torch.equal(again[:rows], room[:rows])


@needs_hopper
def test_a_row_has_the_same_bits_in_any_company() -> None:
    weight = torch.randn(2 * 512, 256, device="cuda").bfloat16()
    x = torch.randn(LEAST_ROWS + 300, 256, device="cuda").bfloat16()
    assert op.has_kernel(weight)
    assert torch.equal(gated_rows(x, weight)[:LEAST_ROWS], gated_rows(x[:LEAST_ROWS].clone(), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_rows_go_through_cublas(dtype: torch.dtype) -> None:
    weight = torch.randn(2 * 250, 256, device="cuda").mul(1 / 16).to(dtype)
    for rows in (1, 7, LEAST_ROWS - 1):
        x = torch.randn(rows, 256, device="cuda").to(dtype)
        gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
        wanted = F.silu(gate) * up
        found = gated_rows(x, weight)
        assert torch.equal(found, by_cublas(x, weight))
        assert (found.double() - wanted).norm() / wanted.norm() < 5e-3


@needs_hopper
def test_a_model_prefills_by_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tokens' probabilities of a call of thousands of tokens, as near to float32's as mode `eager` has them.

    Random weights make sharp logits: 16 bits alone move them by a third, so that both are compared with float32.
    """
    monkeypatch.setattr("hybridgen.models.gated._problem", lambda *_: None)
    families.build("llama", hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    prompts = [[(7 * i + 3 * j) % families.VOCAB for i in range(100)] for j in range(16)]
    found = {}
    settings: dict[str, Any] = {"max_batch": 16, "max_context": 128, "token_budget": 2048, "kv_memory": "64MiB"}
    for name, mode, dtype in (("exact", "eager", "float32"), ("eager", "eager", None), ("hybrid", "hybrid", None)):
        with hybridgen.Engine.load(tmp_path, mode=mode, dtype=dtype or "bfloat16", **settings) as engine:
            outs = engine.generate(prompts, max_new_tokens=1, temperature=0, logprobs=1)
            found[name] = torch.tensor([out.logprobs[0].logprob for out in outs])
    errors = {name: float((found[name] - found["exact"]).abs().mean()) for name in ("eager", "hybrid")}
    assert errors["hybrid"] < 3 * errors["eager"], errors
