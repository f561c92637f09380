"""What a trial of the kernels for a mixture finds, with faults injected; on a CPU by the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridgen.kernels.linear.experts_form import Normed, Routed, RouteForm
from hybridgen.kernels.linear.layout import Block
from hybridgen.kernels.linear.mixture import by_ops
from hybridgen.models import mixtures_check
from hybridgen.models.measured import Measured
from hybridgen.models.mixtures_check import Given, tried_on

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from experts_cases import CLAMPED, Case, make

CPU = torch.device("cpu")
Op = Callable[[Given], "Tensor | None"]


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Callable[[Op, float], mixtures_check.Verdict]:
    """A trial of an op that takes so many times as long as router and experts."""

    def run(op: Op, longer: float, measured: Measured | None = None) -> mixtures_check.Verdict:
        once = partial((measured or Measured()).slower, "this one")
        monkeypatch.setattr(mixtures_check, "has_kernels", lambda device: True)
        monkeypatch.setattr(mixtures_check, "by_kernels", op)
        times = iter((longer, 1.0))
        monkeypatch.setattr(mixtures_check, "seconds", lambda call: (call(), 1e-5 * next(times))[1])
        made = make(Case(8, 2, 96, 64, CLAMPED, "mxfp4", Block(1, 32), biased=True), dtype=torch.bfloat16)
        g = torch.Generator().manual_seed(0)
        norm = Normed(torch.rand(96, generator=g).bfloat16() + 0.5, 1e-6, 0.0)
        weight = torch.randn(8, 96, generator=g).bfloat16()
        return tried_on(CPU, norm, Routed(weight, weight[:, 0].clone(), 2, RouteForm(True)), *made[:3], once)

    return run


def right(given: Given) -> Tensor:
    return by_ops(*given)


def nan_in_one_place(given: Given) -> Tensor:
    out = by_ops(*given)
    out[0, 17] = torch.nan
    return out


def failing(given: Given) -> Tensor:
    raise RuntimeError("no such kernel")


def test_what_is_right_and_faster_is_used(trial: Callable[[Op, float], mixtures_check.Verdict]) -> None:
    verdict = trial(right, 0.9)
    assert verdict == (None, None)
    assert verdict.is_used


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (lambda given: by_ops(*given) * 1.05, "off by 0.05"),
        (lambda given: by_ops(*given._replace(added=given.x)), "off by"),
        (nan_in_one_place, "off by nan"),
        (failing, "failed: RuntimeError"),
    ],
    ids=["factor", "other states", "nan", "raises"],
)
def test_what_is_wrong_is_not(op: Op, words: str, trial: Callable[[Op, float], mixtures_check.Verdict]) -> None:
    verdict = trial(op, 0.5)
    assert verdict.wrong is not None
    assert words in verdict.wrong
    assert not verdict.is_used


def test_nor_what_gives_other_bits_again(trial: Callable[[Op, float], mixtures_check.Verdict]) -> None:
    calls = count()
    verdict = trial(lambda given: by_ops(*given) * (1 + 0.01 * (next(calls) == 12)), 0.5)
    assert verdict.wrong == "their kernels give other bits again"


def test_nor_what_is_slower_or_not_there(trial: Callable[[Op, float], mixtures_check.Verdict]) -> None:
    verdict = trial(right, 1.1)
    assert (verdict.wrong, verdict.is_used) == (None, False)
    assert verdict.slower == "one op takes 11.0 us, and its router and experts 10.0"
    assert trial(lambda given: None, 0.5).slower == "their kernels cannot be had"


def test_times_of_an_earlier_start_count_and_what_is_wrong_now(trial: Callable[..., mixtures_check.Verdict]) -> None:
    measured = Measured()
    assert trial(right, 0.9, measured).is_used
    assert trial(right, 1.1, Measured(measured.known)).is_used
    assert trial(right, 0.9, Measured({"this one": "slower"})) == (None, "slower")
    assert trial(lambda given: by_ops(*given) * 1.05, 0.9, measured).wrong is not None


def test_there_are_none_on_a_cpu() -> None:
    norm = Normed(torch.ones(4), 0.0, 0.0)
    part = make(Case(2, 1, 32, 32, CLAMPED, "mxfp4", Block(1, 32))).gate_up
    routed = Routed(torch.ones(2, 4), None, 1, RouteForm(True))
    assert not tried_on(CPU, norm, routed, part, part, CLAMPED, lambda measure: measure()).is_used
