"""Found while testing the modes; each test says what ought to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
from store_cases import Harness, decode

from hybridgen import Engine, SamplingParams
from hybridgen.execution import ring
from hybridgen.graphs import Recorded, StandInRecorder
from hybridgen.graphs import setup as plan
from hybridgen.graphs.key import GraphKey
from hybridgen.models.attention import Phase

SETTINGS: dict[str, Any] = {
    "mode": "graph",
    "max_batch": 4,
    "page_size": 16,
    "token_budget": 48,
    "kv_memory": "8MiB",
    "max_context": 128,
    "max_padding_ratio": 64,
}
PROMPTS = families.prompts_of((5, 12, 3))


def test_a_table_that_a_request_brings_has_not_moved(llama_path: Path) -> None:
    """`bias` is allocated after the capture, and no graph reads it that was captured before."""
    with Engine.load(llama_path, check_addresses=True, **SETTINGS) as engine:
        engine.generate(PROMPTS[0], max_new_tokens=3, logit_bias={5: 1.0})
        out = engine.generate(PROMPTS[0], max_new_tokens=3)
        stats = engine.stats()
    assert not stats.graphs.failures
    assert not stats.fallbacks
    assert {step.kind for step in out.steps} == {"layers, stand-in"}


@pytest.mark.parametrize("where", ["publish", "advance"])
def test_a_step_that_runs_again_counts_its_token_once(
    llama_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler's counts are written before the step's end can fail, and again by the step that makes up for it."""
    params = SamplingParams(max_new_tokens=30, frequency_penalty=0.6, logprobs=0)
    with Engine.load(llama_path, **SETTINGS | {"mode": "eager"}) as engine:
        expected = [out.token_ids for out in engine.generate(PROMPTS, params)]
        real, calls = getattr(ring, where), []

        def failing(*args: Any) -> None:
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("injected")
            real(*args)

        monkeypatch.setattr(ring, where, failing)
        outs = engine.generate(PROMPTS, params)
        counts = engine._runner.sampler.output_counts.sum(-1)[:3].tolist()
    assert [out.error for out in outs] == [None] * 3
    assert counts == [30] * 3
    assert [out.token_ids for out in outs] == expected


def test_a_graph_that_alone_is_over_its_bytes_is_not_recorded_again_and_again() -> None:
    """Else each call ends with a capture (some seconds) whose graph is dropped at once."""
    harness = Harness(max_bytes=50, costs={"size": lambda key: 100})
    for _ in range(6):
        harness.use(decode(4))
        harness.settle()
    assert harness.held == []
    assert [kind for kind, _ in harness.take()].count("record") == 1
    assert list(harness.counters.fallbacks.values()) == [1]  # or nobody hears of it


def test_a_graph_that_alone_is_over_its_bytes_pushes_out_no_other() -> None:
    harness = Harness(max_bytes=300, costs={"size": lambda key: 1000 if key.tokens == 8 else 100})
    harness.store.capture([decode(1), decode(2)])
    harness.use(decode(8))
    harness.settle()
    assert harness.held == [1, 2]


class Recorder(StandInRecorder):
    """The stand-in with another replay."""

    def __init__(self, replay: Callable[[GraphKey, Callable[[], None]], None]) -> None:
        self._replay = replay

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        return replace(super().record(key, step, known), replay=lambda: self._replay(key, step))


@pytest.mark.parametrize("what", ["logprobs", "top_ids", "top_logprobs"])
def test_validation_compares_all_that_a_step_leaves(
    llama_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose tokens and logits are right, and that publishes wrong log-probabilities."""
    engines: list[Engine] = []

    def replay(key: GraphKey, step: Callable[[], None]) -> None:
        step()
        if engines and key.phase is Phase.DECODE:
            getattr(engines[0]._runner.ring, what).add_(1)

    monkeypatch.setattr(plan, "StandInRecorder", lambda: Recorder(replay))
    params = SamplingParams(max_new_tokens=8, logprobs=2)
    with Engine.load(llama_path, **SETTINGS | {"mode": "eager"}) as engine:
        expected = engine.generate(PROMPTS[0], params).logprobs
    with Engine.load(llama_path, validate=True, capture_after=1, **SETTINGS) as engine:
        engine.generate(PROMPTS[0], params)
        while engine._runner.graphs.pending:
            engine.idle()
        engines.append(engine)
        with pytest.warns(RuntimeWarning, match="other values"):
            found = engine.generate(PROMPTS[0], params).logprobs
    for mine, other in zip(found, expected, strict=True):
        assert [token for token, _ in mine.top] == [token for token, _ in other.top]
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_graph_whose_replays_raise_is_dropped(llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its steps fail again and again, and single requests with them, without a word in the statistics."""
    engines: list[Engine] = []

    def replay(key: GraphKey, step: Callable[[], None]) -> None:
        if engines and key.phase is Phase.DECODE:
            raise RuntimeError("this graph cannot be replayed")
        step()

    monkeypatch.setattr(plan, "StandInRecorder", lambda: Recorder(replay))
    with Engine.load(llama_path, **SETTINGS | {"mode": "eager"}) as engine:
        expected = [out.token_ids for out in engine.generate(PROMPTS, max_new_tokens=6)]
    with Engine.load(llama_path, **SETTINGS) as engine:
        engines.append(engine)
        with pytest.warns(RuntimeWarning, match="cannot be replayed"):
            outs = engine.generate(PROMPTS, max_new_tokens=6)
        stats = engine.stats()
    assert [out.error for out in outs] == [None] * 3
    assert [out.token_ids for out in outs] == expected
    assert stats.fallbacks
    assert stats.free_pages == stats.pages
