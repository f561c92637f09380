"""Kernels of experts are compared with the reference before an engine uses them."""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import hybridgen
from hybridgen.kernels.linear import experts as op
from hybridgen.kernels.linear.layout import Block
from hybridgen.models import experts, experts_check
from hybridgen.models.experts_check import ExpertsCheck

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from experts_cases import CLAMPED, Case, make

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


@pytest.mark.parametrize(
    ("times", "changes", "used"), [((1.0, 2.0), False, True), ((2.0, 1.0), False, False), ((1.0, 2.0), True, False)]
)
def test_one_token_goes_by_the_faster_kernel(
    times: tuple[float, float], changes: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it gives the same bits again; that it is slower is no fallback, as either is right."""
    made = make(Case(4, 2, 96, 64, CLAMPED, "mxfp4", Block(1, 32), biased=True))
    refused: set[str] = set()
    calls, took = itertools.count(), iter(times)

    def called(*given: Any) -> Tensor:
        return op.experts(*given) + 1e-3 * (changes and next(calls) == 7)

    monkeypatch.setattr(experts_check, "experts", called)
    monkeypatch.setattr(experts_check, "serves", lambda kernel, device: kernel not in refused)
    monkeypatch.setattr(experts_check, "refuse", lambda kernel, device: refused.add(kernel))
    monkeypatch.setattr(experts_check, "allow", lambda kernel, device: refused.discard(kernel))
    monkeypatch.setattr(experts_check, "graph_seconds", lambda call, calls: (call(), next(took))[1])
    notes: list[str] = []
    check = ExpertsCheck(2, torch.float32, notes.append)
    for _ in range(2):  # once for each kind
        check._choose_one_token(made.gate_up, made.down, made.form, Block(1, 32))
    assert refused == (set() if used else {"experts_one"})
    assert len(notes) == changes
