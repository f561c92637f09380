"""Modules of experts: probed, and decoding by the op where they compute what it does."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

import hybridgen
from hybridgen.kernels.linear import experts as op
from hybridgen.models import experts
from hybridgen.models.experts import find_experts, probe


class Experts(nn.Module):
    """Experts of a user's own, of whom `changes` say what is unusual."""

    def __init__(self, changes: str = "") -> None:
        super().__init__()
        self.num_experts, self.changes, self.hidden_size, self.width = 3, changes, 12, 20
        self.gate_up_proj = nn.Parameter(torch.randn(3, 40, 12))
        self.down_proj = nn.Parameter(torch.randn(3, 12, 20))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                if self.changes == "up first":
                    gate, up = up, gate
                gate = gate.sigmoid() * (1.001 if self.changes == "a factor" else 1) * gate
                result = self.down_proj[expert] @ (gate * up)
                out[token] += result.square() if self.changes == "a square" else result * weight
        return out


def test_what_is_recognised() -> None:
    assert probe(Experts()) == op.Form("silu")
    for changes in ("up first", "a factor", "a square"):
        assert probe(Experts(changes)) is None, changes
    other = Experts()
    other.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert probe(other) is None
    replaced = Experts()
    replaced.forward = lambda *args: None  # type: ignore[method-assign]
    assert probe(replaced) is None


def test_a_module_is_as_before_afterwards() -> None:
    model = families.build("gpt_oss")
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    sites = list(find_experts(model))
    assert [site.form.activation for site in sites] == ["clamped"] * 4
    for site in sites:
        experts.use_op(site)
        assert isinstance(site.module, experts.ExpertsModule)
        experts.use_own_code(site)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before


SETTINGS: dict[str, Any] = {"max_batch": 4, "page_size": 16, "kv_memory": "4MiB", "max_context": 128}


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_decode_goes_through_the_op(mode: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But in mode eager; a live module's own experts stay what they are."""
    rows: list[int] = []

    def counted(x: Tensor, *others: Any) -> Tensor:
        rows.append(x.shape[0])
        return op.experts(x, *others)

    model = families.build(name)
    kinds = [type(module) for module in model.modules()]
    prompts = families.prompts_of((5, 9))
    expected = [families.reference(model, prompt, 6)[0] for prompt in prompts]
    with hybridgen.Engine.load(model, mode=mode, **SETTINGS) as engine:
        monkeypatch.setattr(experts, "experts", counted)
        outs = engine.generate(prompts, max_new_tokens=6)
        assert [list(out.token_ids) for out in outs] == expected
        assert list(engine.generate(prompts[0], max_new_tokens=6).token_ids) == expected[0]
        assert not engine.stats().fallbacks
    assert set(rows) == (set() if mode == "eager" else {1, 2})
    assert [type(module) for module in model.modules()] == kinds
