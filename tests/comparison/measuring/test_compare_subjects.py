"""Steps counted by the graphs that ran them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from hybridgen.comparison.measuring import subjects
from hybridgen.comparison.measuring.subjects import GraphUse
from hybridgen.graphs import compiled_step
from hybridgen.graphs.router import FAILED
from hybridgen.telemetry.statistics import PhaseCounts


def snapshot(
    steps: dict[tuple[str, str, str], int],
    rows: list[tuple[str, bool, int]],
    phases: dict[str, PhaseCounts],
    failures: int = 0,
) -> Any:
    graphs = [
        SimpleNamespace(phase=phase, tokens=4, rows=4, sampling="greedy", owner="cuda graph", lazy=lazy, hits=hits)
        for phase, lazy, hits in rows
    ]
    held = SimpleNamespace(graphs=graphs, phases=phases, capture_failures=failures)
    return SimpleNamespace(steps=steps, graphs=held)


def test_steps_are_sorted_by_the_graph_that_ran_them() -> None:
    before = snapshot(
        {("decode", "cuda graph", "bucket 4"): 10},
        [("decode", False, 10), ("prefill", True, 1)],
        {"decode": PhaseCounts(hits=10, misses=7)},
        failures=1,
    )
    after = snapshot(
        {
            ("decode", "cuda graph", "bucket 4"): 25,
            ("prefill", "cuda graph", "padded to bucket 16"): 3,
            ("prefill", "compiled", "above the largest bucket, 512"): 1,
            ("prefill", "compiled", f"bucket 512 {FAILED}"): 1,
        },
        [("decode", False, 25), ("prefill", True, 4)],
        {
            "decode": PhaseCounts(hits=25, misses=7),
            "prefill": PhaseCounts(hits=3, padded_hits=3, misses=2),
        },
        failures=3,
    )
    use = GraphUse()
    use.add(before, after)
    assert (use.pre_captured, use.lazy, use.padded, use.none) == (15, 3, 3, 2)
    assert use.reasons == Counter(
        {
            "decode, cuda graph: bucket 4": 15,
            "prefill, cuda graph: padded to bucket 16": 3,
            "prefill, compiled: above the largest bucket, 512": 1,
            f"prefill, compiled: bucket 512 {FAILED}": 1,
        }
    )
    assert (use.failed, use.capture_failures) == (1, 2)
    values = use.as_dict()
    assert values["hit_rate"] == 18 / 20
    assert {phase: counts["hit_rate"] for phase, counts in values["phases"].items()} == {"decode": 1.0, "prefill": 0.6}
    use.add_failures(after, before)  # a warm-up call: no steps, its failures alone
    assert (use.capture_failures, use.hit_rate) == (0, 18 / 20)


class _Behind:
    """An engine whose other process is done after some looks."""

    def __init__(self, looks: int) -> None:
        self.looks, self.captured = looks, 0

    def idle(self) -> bool:
        if not self.looks and not self.captured:
            self.captured += 1
            return True
        return False

    def stats(self) -> Any:
        self.looks = max(0, self.looks - 1)
        left = {"decode of 1": "a process compiles it"} if self.looks or not self.captured else {}
        return SimpleNamespace(graphs=SimpleNamespace(behind=left))


def test_what_is_compiled_behind_is_there_before_calls_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects.time, "sleep", lambda seconds: None)
    engine = _Behind(3)
    subjects.EngineSubject.settle(SimpleNamespace(engine=engine))  # type: ignore[arg-type]
    assert engine.captured == 1
    monkeypatch.setattr(subjects, "_BEHIND_SECONDS", -1)
    subjects.EngineSubject.settle(SimpleNamespace(engine=_Behind(10**6)))  # type: ignore[arg-type]


def test_every_way_to_replay_counts_as_one() -> None:
    assert compiled_step.OWNER in subjects.GRAPHS
