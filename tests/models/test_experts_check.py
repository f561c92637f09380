"""Kernels of experts are compared with the reference before an engine uses them."""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import hybridgen
from hybridgen.kernels import hopper
from hybridgen.kernels.linear import experts as op
from hybridgen.kernels.linear.experts_form import sizes_of
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


def _packed(hidden: int) -> Any:
    made = make(Case(4, 2, hidden, 64, CLAMPED, "mxfp4", Block(1, 32), biased=True))
    return SimpleNamespace(form=made.form, weights_stored=(made.gate_up, made.down, "mxfp4", Block(1, 32)))


@pytest.mark.parametrize(
    ("times", "fault", "used"),
    [
        ((1.0, 2.0), None, {96, 64}),
        ((2.0, 1.0), None, {64}),  # it is slower for one of the sizes
        ((1.0, 2.0), "changes", set()),
        ((1.0, 2.0), "fails", set()),
    ],
)
def test_one_token_goes_by_the_faster_kernel(
    times: tuple[float, float], fault: str | None, used: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it gives the same bits again; that it is slower is no fallback, as either is right, and holds for a size."""
    calls = itertools.count()

    def called(*given: Any) -> Tensor:
        if fault == "fails" and next(calls) == 7:
            raise RuntimeError("no such instruction")
        return op.experts(*given) + 1e-1 * (fault == "changes" and next(calls) == 7)

    took = iter((*times, 1.0, 2.0))
    monkeypatch.setattr(hopper, "is_hopper", lambda ordinal: True)
    monkeypatch.setattr(hopper, "_refused", set())
    monkeypatch.setattr(hopper, "_slower", set())
    monkeypatch.setattr(experts_check, "serves", lambda kernel, device: (kernel, 0) not in hopper._refused)
    monkeypatch.setattr(experts_check, "refuse", lambda kernel, _: hopper.refuse(kernel, torch.device("cuda", 0)))
    monkeypatch.setattr(experts_check, "experts", called)
    monkeypatch.setattr(experts_check, "graph_seconds", lambda call, calls: (call(), next(took))[1])
    notes: list[str] = []
    check = ExpertsCheck(2, torch.bfloat16, notes.append)
    for hidden in (96, 96, 64):  # once for each kind
        assert check.problem_of_packed(_packed(hidden)) is None
    sizes = {hidden: sizes_of(*_packed(hidden).weights_stored[:2]) for hidden in (96, 64)}
    cpu = torch.device("cpu")
    serves = not hopper._refused
    assert {n for n in sizes if serves and hopper.prefers("experts_one", cpu, sizes[n])} == used
    assert len(notes) == (fault is not None)


def test_other_dtypes_do_not_try_the_kernel_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for bfloat16: two times of the same kernel would decide for all later engines of the process."""
    monkeypatch.setattr(experts_check, "serves", lambda kernel, device: True)
    monkeypatch.setattr(experts_check, "graph_seconds", None)
    assert ExpertsCheck(2, torch.float32).problem_of_packed(_packed(96)) is None
