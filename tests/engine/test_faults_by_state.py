"""Cancels, failed steps and replays, evictions and memory given back, for each kind of state that layers keep.

Tokens afterwards are a fresh engine's, which are Hugging Face's. `test_slot_states` has more of states by slot, and
`test_prefix_cache` of pages.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
from test_prefix_cache import poison
from test_slot_states import break_once

import hybridgen
from hybridgen import Engine, FinishReason
from hybridgen.cache import PagedLatent, SharedKV, SlotState
from hybridgen.models.attention import Phase

SETTINGS = {"max_batch": 3, "page_size": 16, "token_budget": 24, "kv_memory": "8MiB", "max_context": 96}
KINDS: dict[str, tuple[type, ...]] = {
    "deepseek_v3": (PagedLatent,),
    "gemma3n_text": (SharedKV,),
    "qwen3_5_text": (SlotState,),
    "granitemoehybrid": (SlotState,),
    "kimi_linear": (SlotState, PagedLatent),
}
"""Latents, shared keys and values, gated delta nets, Mamba 2, and states beside latents."""
PROMPTS = families.prompts_of((7, 1, 50, 33, 24))
NEW = 10


@functools.cache
def expected_of(family: str) -> list[list[int]]:
    model = families.build(family)
    return [families.reference(model, prompt, NEW)[0] for prompt in PROMPTS]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name == "granitemoehybrid" else ()) for name in KINDS],
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def expected(family: str) -> list[list[int]]:
    return expected_of(family)


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine.load(path, mode="graph", **SETTINGS) as engine:
        yield engine


def tokens(engine: Engine, **options: Any) -> list[list[int]]:
    return [list(out.token_ids) for out in engine.generate(PROMPTS, max_new_tokens=NEW, **options)]


def test_the_states_are_there(family: str, engine: Engine, expected: list[list[int]]) -> None:
    for kind in KINDS[family]:
        assert any(isinstance(state, kind) for state in engine._runner.states)
    assert tokens(engine) == expected


def test_cancelled_requests_leave_nothing_behind(engine: Engine, expected: list[list[int]]) -> None:
    for at in (2, 5, 9):  # among the chunks of prompts, and among decode steps
        loop = engine._loop
        real, steps = loop.step, []

        def interrupted(real: Any = real, steps: list[int] = steps, at: int = at) -> None:
            steps.append(1)
            if len(steps) == at:
                raise KeyboardInterrupt
            real()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "step", interrupted)
            with pytest.raises(hybridgen.Interrupted) as caught:
                tokens(engine)
        assert any(out.finish_reason is FinishReason.CANCELLED for out in caught.value.completions)
        assert tokens(engine) == expected
    stream = engine.stream(PROMPTS[2], max_new_tokens=NEW)
    next(iter(stream))
    stream.close()
    assert tokens(engine) == expected


def test_memory_given_back_comes_back_empty(engine: Engine, expected: list[list[int]]) -> None:
    engine.release_cache()
    engine.resume()
    assert tokens(engine) == expected


def test_a_replay_that_fails_is_run_without_its_recording(path: Path, expected: list[list[int]]) -> None:
    with Engine.load(path, mode="graph", **SETTINGS) as engine:
        assert tokens(engine) == expected
        recordings = engine._runner.graphs.recordings
        recording = next(each for each in recordings if each.hits and each.key.phase is Phase.DECODE)

        def replay() -> None:
            raise RuntimeError("injected")

        object.__setattr__(recording.recorded, "replay", replay)
        engine._runner.router._routes.clear()
        with pytest.warns(RuntimeWarning, match="replay raised"):
            assert tokens(engine) == expected
        assert tokens(engine) == expected


@pytest.mark.parametrize("call", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_a_step_that_failed_in_the_middle_runs_again(path: Path, expected: list[list[int]], call: int) -> None:
    """Layers before the last have written what they keep by then."""
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        handle = engine._runner.bound.layers[-1].register_forward_hook(break_once(call))
        try:
            outs = engine.generate(PROMPTS, max_new_tokens=NEW)
        finally:
            handle.remove()
        assert sum(out.error is not None for out in outs) <= 1
        assert all(list(out.token_ids) == wanted for out, wanted in zip(outs, expected, strict=True) if not out.error)
        assert tokens(engine) == expected


def test_evicted_pages_and_slots_in_turn(
    path: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages for two requests: prompts make room for each other, wait, come again, and get what others left."""
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        states = engine._runner.states
        slots = sum(state.bytes_per_slot for state in states) * 4
        page = sum(state.bytes_per_page for state in states)
    with Engine.load(path, mode="eager", **(SETTINGS | {"kv_memory": slots + 7 * page})) as engine:
        assert engine.stats().pages == 6
        if not any(isinstance(state, SlotState) for state in engine._runner.states):
            poison(engine, monkeypatch)
        for _ in range(3):
            assert tokens(engine) == expected
        stats = engine.stats()
        assert (stats.prefix.evicted > 0) == (stats.prefix.state == "on")
        assert stats.free_pages == stats.pages
