"""How the tuner goes through its candidates, with stand-ins for kernels and clocks."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from hybridgen.fused import tuning
from hybridgen.fused.build import tuned_parts
from hybridgen.fused.persistent.shape import Tuning
from hybridgen.fused.rows.shape import Tuning as RowsTuning
from hybridgen.models.decoder import Unfit


class Kernel:
    """An executor that was made with a tuning, and is closed at most once."""

    columns = 8

    def __init__(self, tuning: Any) -> None:
        self.step = SimpleNamespace(tuning=tuning)
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Clock:
    """Seconds of a launch by tuning: the fewer, the nearer `in_flight` is to 3 and, second, pieces to 1024."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Kernel] = []
        monkeypatch.setattr(tuning, "_padding_rows", lambda *args: nullcontext())
        monkeypatch.setattr(tuning, "graph_seconds", lambda call: self.seconds(call.args[-1]))

    def seconds(self, kernel: Kernel) -> float:
        found = kernel.step.tuning
        return 1.0 + 0.1 * abs(found.in_flight - 3) + (0.05 if getattr(found, "piece", 1024) != 1024 else 0.0)

    def build(self, *, tuning: Any) -> Kernel:
        if tuning.in_flight == 4:
            raise Unfit("no room")
        self.made.append(Kernel(tuning))
        return self.made[-1]


def fused(**parts: Any) -> Any:
    tried: list[tuple[Any, int]] = []
    found = {"persistent": None, "rows": None, "chain": None, "build": None, "build_rows": None, **parts}
    return SimpleNamespace(**found, tried=tried, try_step=lambda *args: tried.append(args))


def test_the_better_of_each_field_is_kept_and_the_others_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    first, one = Kernel(RowsTuning(piece=2048, in_flight=1)), Kernel(Tuning(in_flight=2))
    model = fused(rows=first, persistent=one, build=clock.build, build_rows=clock.build)
    chosen = tuning.tune(model, 60)
    assert (model.rows.step.tuning.piece, model.rows.step.tuning.in_flight) == (1024, 3)
    assert model.persistent.step.tuning.in_flight == 3
    assert model.tried == [(model.persistent, 1), (model.rows, 8)]
    used = [model.rows, model.persistent]
    assert all(kernel.closed == (kernel not in used) for kernel in [first, one, *clock.made])
    assert tuned_parts(chosen) == (model.persistent.step.tuning, model.rows.step.tuning, None)


def test_what_is_best_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    best = Kernel(RowsTuning(piece=1024, in_flight=3))
    model = fused(rows=best, build_rows=clock.build)
    tuning.tune(model, 60)
    assert model.rows is best
    assert best.closed == 0
    assert all(kernel.closed == 1 for kernel in clock.made)


def test_without_time_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = fused(rows=Kernel(RowsTuning(in_flight=1)), build_rows=clock.build)
    tuning.tune(model, -1)
    assert clock.made == []


def test_a_tuning_of_another_version_is_left_out() -> None:
    assert tuned_parts({"columns": {"piece": 1024, "gone": 1}, "persistent": {"gone": 1}}) == (None, None, None)
    assert tuned_parts(None) == (None, None, None)
