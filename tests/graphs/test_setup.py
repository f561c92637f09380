"""From a config to what is recorded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from store_cases import GREEDY, SAMPLED, decode, prefill

from hybridgen import EngineConfig, Mode
from hybridgen.compilation.steps import CompiledSteps
from hybridgen.graphs import GraphSettings, StandInRecorder, cuda
from hybridgen.graphs import trees as tree_recorder
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.setup import GraphSetup, keys_at_start
from hybridgen.models.attention import Phase


def plan_of(mode: Mode = Mode.GRAPH, most: int = 100, **fields: Any) -> GraphSetup:
    return GraphSetup(
        config=EngineConfig(mode=mode, **fields),
        mode=mode,
        device=torch.device("cpu"),
        token_budget=most,
        max_tokens=most,
    )


def test_defaults() -> None:
    settings = plan_of(max_batch=9).settings()
    assert settings.decode == (1, 2, 4, 8, 9)
    assert settings.prefill == (16, 32, 48, 64, 80, 96)
    assert (settings.max_rows, settings.max_bytes, settings.max_padding_ratio) == (9, None, None)
    assert (settings.lazy, settings.capture_after, settings.sample_in_graph) == (True, 3, True)
    assert not settings.exact_when_lazy


def test_what_the_config_says() -> None:
    settings = plan_of(
        max_batch=9,
        decode_buckets=[8, 2, 8],
        prefill_buckets=[],
        max_graphs=5,
        max_graph_memory="2MiB",
        max_padding_ratio=0.5,
        lazy_capture=False,
        capture_after=7,
        sample_in_graph=False,
    ).settings()
    assert settings == GraphSettings(
        decode=(2, 8),
        prefill=(),
        max_rows=9,
        max_graphs=5,
        max_bytes=2 * 2**20,
        max_padding_ratio=0.5,
        lazy=False,
        capture_after=7,
        sample_in_graph=False,
        named=frozenset(Phase),
    )


def test_which_phases_have_buckets_of_the_users() -> None:
    assert plan_of().settings().named == frozenset()
    assert plan_of(decode_buckets=[1]).settings().named == {Phase.DECODE}
    assert plan_of(prefill_buckets=[16]).settings().named == {Phase.PREFILL}


@pytest.mark.parametrize("mode", [Mode.EAGER, Mode.JIT])
def test_modes_that_record_nothing(mode: Mode) -> None:
    plan = plan_of(mode, decode_buckets=[1, 2], prefill_buckets=[16])
    assert plan.settings().decode == plan.settings().prefill == ()
    assert plan.recorder(None) is None
    assert keys_at_start(plan.settings(), [GREEDY], any_sampler=True) == []


@pytest.mark.parametrize(
    ("mode", "fields"),
    [(Mode.GRAPH, {}), (Mode.HYBRID, {"compile_backend": "eager"})],
)
def test_a_cpu_has_the_stand_in(mode: Mode, fields: dict[str, Any]) -> None:
    recorder = plan_of(mode, **fields).recorder(None)
    assert isinstance(recorder(decode(4), False), StandInRecorder)
    assert recorder(decode(4), True) is recorder(prefill(16), False)


def test_hybrid_on_a_cpu_compiles_decode_steps_whole() -> None:
    plan = plan_of(Mode.HYBRID)
    recorder = plan.recorder(None, CompiledSteps(None, offline=False, fall_back=print))
    assert recorder(decode(4), True).owner == "compiled step"
    assert isinstance(recorder(prefill(16), True), StandInRecorder)
    assert plan.settings().decode
    assert plan.settings().prefill == ()
    assert plan_of(Mode.HYBRID, prefill_buckets=[16]).settings().prefill == (16,)
    assert not plan_of(Mode.JIT).compiles_steps


def keys(*, any_sampler: bool = False, plans: tuple = (GREEDY,), **fields: Any) -> list[GraphKey]:
    settings = GraphSettings(**{"decode": (1, 4), "prefill": (16, 32), "max_rows": 4} | fields)
    return keys_at_start(settings, plans, any_sampler=any_sampler)


def test_every_bucket_with_each_sampler() -> None:
    found = keys(plans=(GREEDY, SAMPLED))
    assert len(found) == len(set(found)) == 8
    for plan in (GREEDY, SAMPLED):
        assert {decode(1, plan), decode(4, plan), prefill(16, 1, plan), prefill(32, 1, plan)} <= set(found)


def test_and_up_to_the_logits_for_all_others() -> None:
    outside = {decode(1, None), decode(4, None), prefill(16, 4, None), prefill(32, 4, None)}
    assert set(keys(any_sampler=True)) == set(keys()) | outside
    assert set(keys(sample_in_graph=False)) == outside


@pytest.mark.parametrize("room", [1, 3, 5])
def test_no_more_than_may_be_kept(room: int) -> None:
    assert keys(any_sampler=True, max_graphs=room) == keys(any_sampler=True)[:room]


def test_without_buckets_nothing() -> None:
    assert keys(decode=(), prefill=(), any_sampler=True) == []
    assert keys(decode=(), prefill=(), any_sampler=True, exact_when_lazy=True) == []


def test_large_prefill_is_recorded_up_to_the_logits_alone() -> None:
    large = {prefill(1024, 64, None), prefill(8192, 64, None)}
    found = keys(any_sampler=True, plans=(GREEDY, SAMPLED), prefill=(16, 1024, 8192), max_rows=256)
    assert {key for key in found if key.tokens > 512} == large
    assert set(found[:2]) == large  # before what max_graphs cuts off
    assert set(keys(prefill=(16, 1024), max_rows=4)) - set(keys(prefill=(16,))) == {prefill(1024, 4, None)}


@pytest.mark.parametrize(
    ("device", "fields", "weights", "sizes"),
    [
        ("cuda", {}, 15_730_000, (1024, 2048, 4096, 8192)),
        ("cuda", {}, 218_000_000, (1024, 2048)),
        ("cuda", {}, 2_000_000_000, ()),
        ("cuda", {}, 0, ()),
        ("cuda", {"graphs": "trees"}, 15_730_000, ()),
        ("cuda", {"prefill_buckets": [16, 6000]}, 218_000_000, (6000,)),
        ("cpu", {"compile_backend": "eager"}, 15_730_000, ()),
    ],
)
def test_large_prefill_is_recorded_where_launches_can_keep_the_device_waiting(
    device: str, fields: dict[str, Any], weights: int, sizes: tuple[int, ...]
) -> None:
    plan = replace(plan_of(Mode.HYBRID, 8192, **fields), device=torch.device(device), layer_weights=weights)
    assert tuple(size for size in plan.settings().prefill if size > 512) == sizes


def test_exact_sizes_need_one_between_the_buckets() -> None:
    assert set(keys(exact_when_lazy=True)) - set(keys()) == {decode(3)}
    assert set(keys(exact_when_lazy=True, decode=(1, 2, 3))) == set(keys(decode=(1, 2, 3)))


def test_both_records_between_the_buckets_in_trees_and_by_hand_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(Mode.HYBRID, graphs="both", decode_buckets=[1, 8, 32], max_batch=32)
    plan = replace(plan, device=torch.device("cuda"))
    known: list[GraphKey] = []
    trees = SimpleNamespace(knows=known.__contains__)
    monkeypatch.setattr(cuda, "CudaGraphRecorder", lambda device: "by hand")
    monkeypatch.setattr(tree_recorder, "TreeRecorder", lambda steps, **_: trees)
    recorder = plan.recorder(None)
    between = GraphKey.decode(20, GREEDY)
    assert recorder(between, False) is trees
    assert recorder(between, True) == "by hand"  # nothing is compiled while idle
    known.append(between)
    assert recorder(between, True) is trees
    fused = GraphKey.decode(5, GREEDY, executor="chain")
    known.append(fused)
    for key in (fused, GraphKey.decode(8, GREEDY), GraphKey.prefill(20, 1, GREEDY)):
        assert recorder(key, False) == recorder(key, True) == "by hand"
