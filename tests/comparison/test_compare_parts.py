"""How busy a device is, graphs by kind, logit errors, provenance."""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridgen.comparison import provenance as facts
from hybridgen.comparison.checks import CANDIDATES, logit_error
from hybridgen.comparison.subjects import GraphUse
from hybridgen.comparison.utilisation import busy
from hybridgen.core import TokenLogprob
from hybridgen.graphs.router import FAILED
from hybridgen.telemetry.statistics import PhaseCounts


@pytest.mark.parametrize(
    ("spans", "covered"),
    [([], 0), ([(0, 2), (3, 4)], 3), ([(0, 5), (1, 2)], 5), ([(3, 6), (0, 4)], 6), ([(1, 1)], 0)],
)
def test_overlapping_work_counts_once(spans: list[tuple[float, float]], covered: float) -> None:
    assert busy(spans) == covered


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


def completion(ids: list[int], *tops: dict[int, float]) -> Any:
    logprobs = [TokenLogprob(token, 0.0, tuple(top.items())) for token, top in zip(ids, tops, strict=True)]
    return SimpleNamespace(token_ids=ids, logprobs=logprobs)


def test_the_logit_error_is_the_largest_up_to_the_first_difference() -> None:
    reference = completion([1, 2, 3], {1: -1.0, 2: -2.0}, {2: -1.0}, {3: -1.0})
    same = completion([1, 2, 3], {1: -1.0, 2: -2.25}, {2: -1.0}, {3: -1.125})
    assert logit_error([same], [reference]) == 0.25
    left = completion([1, 5, 3], {1: -1.0}, {2: -1.5}, {3: -9.0})  # after the second, its input is another
    assert logit_error([left], [reference]) == 0.5
    assert logit_error([reference], [reference]) == 0.0


def test_what_cannot_be_compared_is_no_agreement() -> None:
    reference = completion([1], {1: -1.0, 2: -2.0})
    assert logit_error([completion([1], {1: float("nan"), 2: -2.0})], [reference]) == math.inf
    # Neither token is reported: each has at most -5.
    assert logit_error([completion([1], {7: -0.5, 8: -5.0})], [reference]) == 4.0
    assert logit_error([completion([])], [completion([])]) is None


def test_only_the_most_likely_tokens_are_compared() -> None:
    top = {token: -float(token) for token in range(CANDIDATES + 5)}
    other = {token: value - (9.0 if token >= CANDIDATES else 0.0) for token, value in top.items()}
    assert logit_error([completion([0], other)], [completion([0], top)]) == 0.0


def test_the_commit_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDGEN_COMMIT", "abc123")
    assert facts.commit() == "abc123"


def test_what_nvidia_smi_says_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "580.159.04, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 41, 120.5 W, 700.00 W"
    monkeypatch.setattr(facts, "_output", lambda *command: line)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="u"))
    state = facts.gpu_state(torch.device("cuda", 0))
    assert (state["driver"], state["clocks.sm"], state["power.limit"]) == ("580.159.04", "1980 MHz", "700.00 W")


def test_without_nvidia_smi_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **options: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    assert set(facts.gpu_state(torch.device("cuda", 0)).values()) == {None}


def test_nan_does_not_reach_a_file() -> None:
    from compare_cases import comparison

    found = comparison(measured_seconds=math.nan)
    assert found.as_dict()["measured_seconds"] is None
