"""Graphs are recorded while nothing runs, and what goes wrong meanwhile costs no result."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import families
import pytest
from mode_cases import (
    PROMPTS,
    SETTINGS,
    Faulty,
    loaded,
    mixed,
    tokens_of,
    use,
)

import hybridgen
from hybridgen import Completion, Engine
from hybridgen.core import GraphEvent
from hybridgen.graphs.key import GraphKey


def test_recorded_only_while_nothing_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []

    def record(key: GraphKey) -> None:
        loop = engines[0]._loop
        assert not loop.scheduler.busy
        assert not loop._in_flight

    recorder = use(monkeypatch, Faulty(record=record))
    with loaded(path, capture_at_start=False, capture_after=3, run_ahead=1) as engine:
        engines.append(engine)
        assert engine._runner.graphs.recordings == ()
        long, short = engine.stream(PROMPTS[0], max_new_tokens=30), engine.stream(PROMPTS[3], max_new_tokens=6)
        next(long)
        list(short)  # ends while the other runs
        assert engine._runner.graphs.pending
        assert engine.idle() is False
        assert recorder.recorded == []
        list(long)  # ends while nothing runs: one graph
        assert len(recorder.recorded) == 1
        assert engine.idle() is False
        assert len(recorder.recorded) == 2
        stats = engine.stats().graphs
    assert (stats.lazy_captures, len(stats.graphs)) == (2, 2)
    assert {key.tokens for key in recorder.recorded} == {1, 2}


@pytest.mark.parametrize("after", [2, 4])
def test_recorded_after_so_many_steps(path: Path, after: int) -> None:
    with loaded(path, capture_at_start=False, capture_after=after, prefill_buckets=()) as engine:
        engine.generate(PROMPTS[0], max_new_tokens=after)  # a prefill, and one decode step fewer
        assert engine.stats().graphs.graphs == ()
        engine.generate(PROMPTS[0], max_new_tokens=2)
        assert [(row.tokens, row.lazy) for row in engine.stats().graphs.graphs] == [(1, True)]
        out = engine.generate(PROMPTS[0], max_new_tokens=4)
        assert engine.stats().graphs.hits == 3
        assert {step.reason for step in out.steps if step.phase == "decode"} == {"bucket 1"}


def test_lazy_capture_off(path: Path) -> None:
    with loaded(path, max_graphs=1, lazy_capture=False, capture_after=1) as engine:
        first = {recording.key for recording in engine._runner.graphs.recordings}
        engine.generate(PROMPTS[:4], max_new_tokens=9)
        assert engine.idle() is False
        assert {recording.key for recording in engine._runner.graphs.recordings} == first
    with (
        pytest.raises(hybridgen.ConfigError, match="records nothing"),
        loaded(path, capture_at_start=False, lazy_capture=False),
    ):
        pass


def test_a_listener_cannot_start_a_step_in_a_capture(path: Path, expected: list[Completion]) -> None:
    engines: list[Engine] = []
    raised: list[Exception] = []

    def listen(event: GraphEvent) -> None:
        if engines:
            try:
                engines[0].generate(PROMPTS[0], max_new_tokens=2)
            except hybridgen.EngineError as error:
                raised.append(error)

    with loaded(path, capture_at_start=False, capture_after=1, on_graph_event=listen) as engine:
        engines.append(engine)
        for _ in range(3):
            outs = engine.generate(PROMPTS, mixed(8))
            assert tokens_of(outs) == tokens_of(expected)
    assert raised
    assert "from inside a step" in str(raised[0])


def test_an_interrupt_while_idle_costs_no_result(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[:2], max_new_tokens=6)

        def interrupted() -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(engine._runner, "capture_pending", interrupted)
        with pytest.raises(hybridgen.Interrupted) as caught:
            engine.generate(PROMPTS[:2], max_new_tokens=6)
        assert tokens_of(caught.value.completions) == tokens_of(expected)
        monkeypatch.undo()
        assert tokens_of(engine.generate(PROMPTS[:2], max_new_tokens=6)) == tokens_of(expected)


@pytest.mark.parametrize("where", ["between", "capture"])
def test_what_is_interrupted_does_not_shift_later_tokens(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """An interrupt between a step's launch and its note on the host, or in the warm-up of a capture."""
    with loaded(path, capture_at_start=False, capture_after=1) as engine:
        expected = engine.generate(PROMPTS[0], max_new_tokens=6).token_ids
        with monkeypatch.context() as patch:
            if where == "between":
                patch.setattr(engine._runner.ring, "launched", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            else:
                patch.setattr(engine._runner.graphs, "timings", None)  # fails after the step ran for nobody
            with pytest.raises((hybridgen.Interrupted, AttributeError)):
                engine.generate(PROMPTS[0], max_new_tokens=6)
                engine.idle()
                raise AttributeError
        assert engine.generate(PROMPTS[0], max_new_tokens=6).token_ids == expected


def test_log_probabilities_of_more_tokens_than_there_are(tmp_path: Path) -> None:
    tiny = families.write("llama", tmp_path, vocab_size=40)
    with loaded(tiny) as engine:
        out = engine.generate([5, 6, 7], max_new_tokens=3, logprobs=64)
    assert all(sorted(token for token, _ in entry.top) == list(range(40)) for entry in out.logprobs)


def test_an_engine_that_is_closed_frees_its_weights(path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        engine = Engine.load(path, mode="graph", **SETTINGS)
        engine.generate(PROMPTS[0], max_new_tokens=3)
        weights = weakref.ref(engine._runner.bound.model.lm_head.weight)
        engine.close()
        del engine
        assert weights() is None
    finally:
        gc.enable()


def test_an_error_while_idle_costs_no_result(
    path: Path, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(path, capture_after=1) as engine:
        monkeypatch.setattr(engine._runner, "capture_pending", lambda: 1 / 0)
        with pytest.warns(RuntimeWarning, match="recording while idle failed: ZeroDivisionError"):
            outs = engine.generate(PROMPTS, mixed(8))
        assert tokens_of(outs) == tokens_of(expected)
