"""Switches and promises of the requirements, at the engine: each is seen to change what it says, or to hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from hybridgen import Completion, Engine, SamplingParams
from hybridgen.core import GraphEvent
from hybridgen.execution.staging import StagedBlock
from hybridgen.graphs import Recorded, StandInRecorder
from hybridgen.graphs import setup as plan
from hybridgen.graphs.key import GraphKey
from hybridgen.kernels import MetadataCopy

SETTINGS: dict[str, Any] = {
    "mode": "graph", "max_batch": 8, "page_size": 16, "token_budget": 48, "kv_memory": "16MiB", "max_context": 128,
    "max_padding_ratio": 64, "decode_buckets": (2, 4), "prefill_buckets": (32,),
}  # fmt: skip
PROMPTS = families.prompts_of((5, 12, 9, 3, 7, 4))
NEW = 6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("switches"))


@pytest.fixture(scope="module")
def expected(path: Path) -> list[tuple[int, ...]]:
    with Engine.load(path, **SETTINGS | {"mode": "eager"}) as engine:
        return tokens_of(generate(engine, PROMPTS))


def generate(engine: Engine, prompts: list[list[int]], new: int = NEW) -> list[Completion]:
    return engine.generate(prompts, max_new_tokens=new, ignore_eos=True, temperature=0)


def tokens_of(outs: list[Completion]) -> list[tuple[int, ...]]:
    assert [str(out.error) for out in outs if out.error is not None] == []
    return [out.token_ids for out in outs]


class Recorder(StandInRecorder):
    """The stand-in, which takes what it records for a graph."""

    def __init__(
        self, replay: Callable[[Callable[[], None]], None], fails: tuple[int, ...] = (), size: int = 0
    ) -> None:
        """`replay` is given a step to run; sizes that are in `fails` cannot be recorded."""
        self._replay = replay
        self._fails = fails
        self._size = size

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        if key.size in self._fails:
            raise RuntimeError("injected")
        recorded = super().record(key, step, known)
        return replace(recorded, replay=lambda: self._replay(step), is_graph=True, bytes=self._size)


def use(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    monkeypatch.setattr(plan, "StandInRecorder", lambda: recorder)


def in_inference_mode(step: Callable[[], None]) -> None:
    """As a graph does: it needs nothing around it."""
    with torch.inference_mode():
        step()


def test_nothing_is_set_up_around_a_steady_replay(
    path: Path, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    around: list[bool] = []

    def replay(step: Callable[[], None]) -> None:
        around.append(torch.is_inference_mode_enabled())
        in_inference_mode(step)

    use(monkeypatch, Recorder(replay))
    with Engine.load(path, **SETTINGS, run_ahead=0) as engine:
        around.clear()
        outs = generate(engine, PROMPTS[:4], 12)
        assert [out.token_ids[:NEW] for out in outs] == expected[:4]
    # The first decode step of a batch stages what it sends, in inference mode; those after it only replay.
    decodes = around[-11:]
    assert decodes[0] is True
    assert decodes[1:] == [False] * 10


@pytest.mark.parametrize("double_buffer", [True, False])
def test_double_buffer_is_two_blocks_in_turn(
    path: Path, expected: list[tuple[int, ...]], double_buffer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: dict[int, list[int]] = {}
    opened = StagedBlock.open

    def note(block: StagedBlock) -> Any:
        arrays = opened(block)
        filled.setdefault(id(block), []).append(next(iter(arrays.values())).__array_interface__["data"][0])
        return arrays

    monkeypatch.setattr(StagedBlock, "open", note)
    with Engine.load(path, **SETTINGS, double_buffer=double_buffer) as engine:
        assert tokens_of(generate(engine, PROMPTS)) == expected
        assert tokens_of(generate(engine, PROMPTS)) == expected
    assert len(filled) == 2  # decode's block and prefill's
    for places in filled.values():
        assert len(places) > 2
        assert len(set(places)) == 1 + double_buffer
        assert all((before != after) is double_buffer for before, after in pairwise(places))


@pytest.mark.parametrize("metadata_copy", [True, False])
def test_metadata_copy_is_one_launch_or_none_of_ours(
    path: Path, expected: list[tuple[int, ...]], metadata_copy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    copy = MetadataCopy.__call__
    monkeypatch.setattr(MetadataCopy, "__call__", lambda self: calls.append(1) or copy(self))
    with Engine.load(path, **SETTINGS, metadata_copy=metadata_copy) as engine:
        calls.clear()
        outs = generate(engine, PROMPTS)
        steps = sum(engine.stats().steps.values())
    assert tokens_of(outs) == expected
    assert len(calls) == (steps if metadata_copy else 0)


def test_hits_misses_failures_and_memory_are_those_of_known_traffic(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Recorder(in_inference_mode, fails=(32,), size=1000))
    with pytest.warns(RuntimeWarning, match="capture of the prefill graph of 32 tokens"):
        engine = Engine.load(path, **SETTINGS, lazy_capture=False)
    with engine:
        before = engine.stats().graphs
        assert (before.hits, before.padded_hits, sum(before.misses.values())) == (0, 0, 0)
        generate(engine, PROMPTS[:1], 5)  # 4 decode steps padded to 2
        generate(engine, PROMPTS[:2], 4)  # 3 that fit
        generate(engine, PROMPTS[:3], 3)  # 2 padded to 4
        generate(engine, PROMPTS[:6], 3)  # 2 above the largest bucket
        stats = engine.stats()
        graphs = stats.graphs
    assert (graphs.hits, graphs.padded_hits) == (9, 6)
    decode = {(kind, reason): n for (phase, kind, reason), n in stats.steps.items() if phase == "decode"}
    assert sum(decode.values()) == 11
    assert graphs.misses["above the largest bucket, 4"] == 2
    assert graphs.hits + sum(graphs.misses.values()) == sum(stats.steps.values())
    assert len(graphs.failures) == 2  # with each sampler
    assert all("injected" in why for why in graphs.failures.values())
    assert graphs.bytes == 1000 * len(graphs.graphs) > 0
    assert sum(row.hits for row in graphs.graphs) == graphs.hits


def test_the_production_checklist(path: Path, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the ten points by the call that shows it on a running engine."""
    events: list[GraphEvent] = []
    use(monkeypatch, Recorder(in_inference_mode, size=1000))
    options = {"on_graph_event": events.append, "validate": True, "capture_after": 1, "max_graph_memory": "1MiB"}
    with Engine.load(path, **SETTINGS, **options) as engine:
        stats = engine.stats()
        sizes = {(row.phase, row.tokens) for row in stats.graphs.graphs}
        assert sizes == {("decode", 2), ("decode", 4), ("prefill", 32)}  # 1: common sizes
        assert 0 < stats.graphs.bytes <= engine.config.max_graph_memory  # 2: memory
        assert stats.startup["capture"] > 0  # 3: warm-up
        assert [event.kind for event in events] == ["captured"] * len(stats.graphs.graphs)  # 4: alerts
        outs = engine.generate(
            PROMPTS, [SamplingParams(max_new_tokens=NEW, ignore_eos=True, temperature=0)] * len(PROMPTS)
        )
        assert tokens_of(outs) == expected  # 5: numerics against eager
        reasons = {step.reason for step in outs[0].steps if step.phase == "decode"}
        assert reasons == {"above the largest bucket, 4"}  # 6: what fell back, and why
        generate(engine, PROMPTS[:3])
        graphs = engine.stats().graphs
        share = graphs.hits / (graphs.hits + sum(graphs.misses.values()))
        assert 0 < share < 1  # 7: hit rate
        assert not graphs.failures  # 8: every graph that was replayed gave the step's values
        assert outs[0].timing.ttft > 0  # 9: latency from end to end
        assert all(row.seconds > 0 and row.plain_seconds > 0 for row in graphs.graphs)  # 10: profile


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_run_ahead_is_how_many_steps_are_launched_before_one_is_read(
    path: Path, expected: list[tuple[int, ...]], run_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.load(path, **SETTINGS, run_ahead=run_ahead) as engine:
        runner, unread, most = engine._runner, 0, 0

        def counted(launch: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def run(what: Any) -> Any:
                nonlocal unread, most
                unread += 1
                most = max(most, unread)
                return launch(what)

            return run

        def was_read(*where: Any) -> Any:
            nonlocal unread
            unread -= 1
            return read(*where)

        read = runner.ring.read
        monkeypatch.setattr(runner, "prefill", counted(runner.prefill))
        monkeypatch.setattr(runner, "decode", counted(runner.decode))
        monkeypatch.setattr(runner.ring, "read", was_read)
        assert tokens_of(generate(engine, PROMPTS[:2])) == expected[:2]
    assert most == 1 + run_ahead
