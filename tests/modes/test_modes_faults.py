"""Captures and replays that fail, give wrong values, or whose tensors moved: nobody loses a token."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mode_cases import (
    KINDS,
    PADS,
    PROMPTS,
    SETTINGS,
    Faulty,
    check_logprobs,
    loaded,
    mixed,
    settle,
    tokens_of,
    use,
    warned,
)

from hybridgen import Completion, Engine, FinishReason, SamplingParams
from hybridgen.core import GraphEvent
from hybridgen.execution import ring
from hybridgen.graphs import Recorded
from hybridgen.graphs.key import GraphKey
from hybridgen.kernels.step import metadata
from hybridgen.models.attention import Phase

BROKEN = [(Phase.DECODE, size) for size in (1, 2, 4, 8, 17)] + [(Phase.PREFILL, size) for size in (4, 8, 16, 32)]


@pytest.mark.parametrize(("phase", "size"), BROKEN)
def test_out_of_memory_in_the_capture_of_a_bucket(
    path: Path, expected: list[Completion], phase: Phase, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(key: GraphKey) -> None:
        if (key.phase, key.tokens) == (phase, size):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    recorder = use(monkeypatch, Faulty(record=record))
    name = f"the {phase} graph of {size} "
    with (
        warned(f"the capture of {name}") as caught,
        loaded(path, capture_after=1) as engine,
    ):
        failed = len(engine.stats().graphs.failures)
        assert failed >= 1
        for _ in range(2):
            assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
            assert tokens_of(engine.generate(PROMPTS[2:3], mixed(8)[2:3])) == tokens_of(expected[2:3])
        settle(engine)
        stats = engine.stats()
    for why in stats.graphs.failures.values():
        assert why == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert all(reason.startswith(f"the capture of {name}") for reason in stats.fallbacks)
    assert sum(stats.fallbacks.values()) == len(stats.graphs.failures)  # each tried once
    assert len(caught) == len(stats.fallbacks)  # one of each reason
    assert {(key.phase, key.tokens) for key in recorder.recorded} == set(BROKEN) - {(phase, size)}


def test_a_recorder_that_always_raises(path: Path, expected: list[Completion], monkeypatch: pytest.MonkeyPatch) -> None:
    def record(key: GraphKey) -> None:
        raise RuntimeError("no graphs today")

    use(monkeypatch, Faulty(record=record))
    with warned("no graphs today"), loaded(path, capture_after=1) as engine:
        for _ in range(2):
            assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
        stats = engine.stats()
    assert stats.graphs.graphs == ()
    assert stats.graphs.hits == 0
    assert {kind for _, kind, _ in stats.steps} == {"layers, eager"}
    assert "bucket 8 failed, see GraphStats.failures" in stats.graphs.misses
    assert set(stats.fallbacks.values()) <= set(range(1, 9))


def wrong(engine_of: list[Engine]) -> Callable[[GraphKey, Callable[[], None]], None]:
    """A replay whose logits are off."""

    def replay(key: GraphKey, step: Callable[[], None]) -> None:
        bound = engine_of[0]._runner.bound if engine_of else None
        if bound is None or key.phase is not Phase.DECODE:
            step()
            return
        forward = bound.forward
        try:
            bound.forward = lambda *args: forward(*args).roll(1, -1)
            step()
        finally:
            del bound.forward

    return replay


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("validate", [False, True])
def test_a_graph_that_gives_other_values(
    path: Path, expected: list[Completion], validate: bool, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validated, it is dropped before its values are anybody's; without that they are wrong, so the fault is real."""
    engines: list[Engine] = []
    events: list[GraphEvent] = []
    recorder = use(monkeypatch, Faulty(replay=wrong(engines)))
    fields = {"validate": validate, "sample_in_graph": not outside, "on_graph_event": events.append}
    with loaded(path, **fields) as engine:
        engines.append(engine)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outs = engine.generate(PROMPTS, mixed(8))
        stats = engine.stats()
    if not validate:
        assert tokens_of(outs) != tokens_of(expected)
        assert not stats.graphs.failures
        return
    assert tokens_of(outs) == tokens_of(expected)
    check_logprobs(outs, expected)
    failed = [event for event in events if event.kind == "failed"]
    assert {event.phase for event in failed} == {"decode"}
    assert {event.message for event in failed} == {"its first replay gave other values than the step without it"}
    assert len(failed) == len(stats.graphs.failures) == len(recorder.released[: len(failed)]) > 0
    assert stats.steps["decode", "layers, eager", "its graph was found wrong"] == len(failed)
    reasons = [reason for reason in stats.fallbacks if "is not used any more" in reason]
    assert sum(stats.fallbacks[reason] for reason in reasons) == len(failed)
    assert len([w for w in caught if "is not used any more" in str(w.message)]) == len(reasons)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_right_graph_passes_its_validation(path: Path, expected: list[Completion], run_ahead: int) -> None:
    with loaded(path, validate=True, run_ahead=run_ahead) as engine:
        before = len(engine.stats().graphs.graphs)
        for _ in range(2):
            assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
        stats = engine.stats()
        assert not stats.graphs.failures
        assert not stats.fallbacks
        assert len(stats.graphs.graphs) >= before


@pytest.fixture(scope="module")
def greedy(path: Path) -> tuple[SamplingParams, list[Completion]]:
    params = SamplingParams(max_new_tokens=6)
    with loaded(path, "eager") as engine:
        return params, engine.generate(PROMPTS, params)


@pytest.mark.parametrize("sample_in_graph", [True, False])
@pytest.mark.parametrize("which", ["sampling reals", "counter", "keys of layer 0", "model.norm.weight"])
def test_a_tensor_that_moved(
    path: Path, greedy: tuple[SamplingParams, list[Completion]], which: str, sample_in_graph: bool
) -> None:
    params, expected = greedy
    with loaded(path, check_addresses=True, sample_in_graph=sample_in_graph) as engine:
        assert tokens_of(engine.generate(PROMPTS, params)) == tokens_of(expected)
        runner = engine._runner
        if which == "sampling reals":
            runner.sampler.reals = runner.sampler.reals.clone()
        elif which == "counter":
            runner.ring.counter = runner.ring.counter.clone()
        elif which == "keys of layer 0":
            state = runner.states[0]
            state._pages = state.pages._replace(keys=state.pages.keys.clone())
        else:
            weight = runner.bound.model.get_parameter(which)
            weight.data = weight.data.clone()
        with pytest.warns(RuntimeWarning, match=f"not used any more: moved since the capture: {which}"):
            outs = engine.generate(PROMPTS, params)
        assert tokens_of(outs) == tokens_of(expected)
        stats = engine.stats()
    assert set(stats.graphs.failures.values()) == {f"moved since the capture: {which}"}
    assert sum(stats.fallbacks.values()) == len(stats.graphs.failures)
    assert {step.reason for out in outs for step in out.steps} >= {"a tensor of its graph moved"}


def test_a_listener_that_raises(path: Path, expected: list[Completion]) -> None:
    def listen(event: GraphEvent) -> None:
        raise ValueError("mine")

    with (
        warned("on_graph_event raised ValueError: mine") as caught,
        loaded(path, on_graph_event=listen, max_graphs=3, capture_after=1) as engine,
    ):
        assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
        stats = engine.stats()
    assert len(caught) == 1
    captured = 3 + stats.graphs.lazy_captures
    assert stats.fallbacks == {"on_graph_event raised ValueError: mine": captured + stats.graphs.evictions}


class Fails:
    """A function that raises at its nth call instead of doing its work."""

    def __init__(self, function: Callable[..., Any], nth: int, error: BaseException) -> None:
        self._function = function
        self._nth = nth
        self._error = error
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls != self._nth:
            return self._function(*args)
        raise self._error


@pytest.fixture(scope="module")
def undisturbed(path: Path) -> tuple[list[SamplingParams], list[Completion]]:
    """Requests of most kinds (5 to 7: graphs/test_defects.py), and what mode eager generates."""
    params = [SamplingParams(max_new_tokens=8, seed=i, **KINDS[i % 5]) for i in range(8)]
    with loaded(path, "eager") as engine:
        return params, engine.generate(PROMPTS, params)


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("nth", [1, 2, pytest.param(5, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize("where", ["replay", "copy", "advance"])
@pytest.mark.parametrize("error", [RuntimeError("injected"), torch.OutOfMemoryError("injected")], ids=["any", "memory"])
def test_a_step_that_fails_once_in_the_middle(
    path: Path,
    undisturbed: tuple[list[SamplingParams], list[Completion]],
    where: str,
    nth: int,
    run_ahead: int,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step runs again for one request after the other, so that nobody loses a token."""
    params, expected = undisturbed
    with loaded(path, run_ahead=run_ahead) as engine:
        runner = engine._runner
        if where == "replay":
            failing = Fails(lambda step: step(), nth, error)
            original = runner._launch

            def launch(route: Any, *args: Any) -> Any:
                return original(replace(route, run=lambda: failing(route.run)), *args)

            monkeypatch.setattr(runner, "_launch", launch)
        elif where == "copy":
            failing = Fails(metadata.reference, nth, error)
            monkeypatch.setattr(metadata, "reference", failing)
        else:
            failing = Fails(ring.advance, nth, error)
            monkeypatch.setattr(ring, "advance", failing)
        outs = engine.generate(PROMPTS, params)
        assert failing.calls > nth
        # A call for several requests is isolated; one for a single request fails it.
        lost = [out for out in outs if out.error is not None]
        assert len(lost) <= 1
        for out, good in zip(outs, expected, strict=True):
            if out.error is None:
                assert out.token_ids == good.token_ids
            else:
                assert out.token_ids == good.token_ids[: len(out.token_ids)]
                assert "injected" in str(out.error)
        check_logprobs(
            [o for o in outs if not o.error], [e for o, e in zip(outs, expected, strict=True) if not o.error]
        )
        again = engine.generate(PROMPTS, params)
        assert tokens_of(again) == tokens_of(expected)


@pytest.mark.parametrize("sample_in_graph", [True, False])
def test_what_only_another_thread_can_replay_runs_without(
    path: Path, expected: list[Completion], sample_in_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(Faulty):
        def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
            return replace(super().record(key, step, known), thread=-1)

    use(monkeypatch, Elsewhere(replay=lambda key, step: pytest.fail("replayed")))
    with (
        warned("replay on the thread that recorded them") as caught,
        loaded(path, sample_in_graph=sample_in_graph, lazy_capture=False) as engine,
    ):
        assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
        stats = engine.stats()
    assert len(caught) == 1
    assert stats.graphs.hits == 0
    (fallbacks,) = stats.fallbacks.values()
    assert stats.graphs.misses["its cudagraph tree belongs to another thread"] == fallbacks > 0
    assert sum(stats.graphs.misses.values()) == sum(stats.steps.values())


def test_a_lost_device_in_a_replay_ends_the_engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def replay(key: GraphKey, step: Callable[[], None]) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        step()

    use(monkeypatch, Faulty(replay=replay))
    with Engine.load(path, mode="graph", **SETTINGS | PADS) as engine:
        outs = engine.generate(PROMPTS, max_new_tokens=8)
        assert {out.finish_reason for out in outs} == {FinishReason.ERROR}
        assert all("illegal memory access" in str(out.error) for out in outs)
        assert engine.closed
