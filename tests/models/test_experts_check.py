"""Kernels of experts are compared with the reference before an engine uses them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import hybridgen
from hybridgen.kernels.linear import experts as op
from hybridgen.models import experts, experts_check

SETTINGS: dict[str, Any] = {"mode": "graph", "max_batch": 2, "page_size": 16, "kv_memory": "4MiB", "max_context": 64}


def failing(x: Tensor, *others: Any) -> Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (None, None),
        (lambda x, *others: op.experts(x, *others) * 1.01, "off by 0.01"),
        (lambda x, *others: torch.full_like(x, torch.nan), "off by nan"),
        (failing, "its kernel failed: RuntimeError: no such instruction"),
    ],
)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_wrong_kernel_is_not_used(name: str, wrong: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[int, ...]] = []
    decoded: list[int] = []

    def trial(x: Tensor, ids: Tensor, *others: Any) -> Tensor:
        checked.append(tuple(ids.shape))
        return (wrong or op.experts)(x, ids, *others)

    def decode(x: Tensor, *others: Any) -> Tensor:
        decoded.append(x.shape[0])
        return op.experts(x, *others)

    monkeypatch.setattr(experts_check, "wants_check", lambda device: True)
    monkeypatch.setattr(experts_check, "experts", trial)
    monkeypatch.setattr(experts, "experts", decode)
    model = families.build(name)
    prompt = families.prompts_of((5,))[0]
    expected = families.reference(model, prompt, 4)[0]
    decoded.clear()
    context = pytest.warns(RuntimeWarning, match=reason) if reason else nullcontext()
    with context, hybridgen.Engine.load(model, **SETTINGS) as engine:
        ways = len(checked)
        assert list(engine.generate(prompt, max_new_tokens=4).token_ids) == expected
        found = {why: count for why, count in engine.stats().fallbacks.items() if "own code" in why}
    assert ways == (1 if wrong else 2)  # layers of a kind are checked once; one row and eight
    assert checked[0][1] == experts_check.chosen_of(model)
    if reason is None:
        assert not found
        assert decoded
        return
    assert len(found) == 1
    assert reason in next(iter(found))
    assert "experts decode by the model's own code" in next(iter(found))
