"""Models whose layers keep a state by slot: nothing that goes wrong, and no way of running, changes a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import Engine, FinishReason
from hybridgen.cache import SlotState
from hybridgen.errors import ConfigError, OutOfMemoryError
from hybridgen.models.mixers import SlotMixer, find_mixers

SETTINGS = {"max_batch": 3, "page_size": 16, "token_budget": 24, "kv_memory": "8MiB", "max_context": 96}
LENGTHS = (7, 1, 50, 33, 24)
PROMPTS = families.prompts_of(LENGTHS)
NEW = 10


@pytest.fixture(scope="module", params=["lfm2", "mamba"])
def family(request: pytest.FixtureRequest) -> str:
    """Convolutions beside attention, and a model of convolutions and recurrences alone, which has no pages."""
    return request.param


@pytest.fixture(scope="module")
def path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write(family, tmp_path_factory.mktemp(family))


def expected_of(family: str, **changes: Any) -> list[list[int]]:
    model = families.build(family, **changes)
    return [families.reference(model, prompt, NEW)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(family: str) -> list[list[int]]:
    return expected_of(family)


@pytest.fixture(scope="module", params=["eager", "graph"])
def engine(path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load(path, mode=request.param, **SETTINGS) as engine:
        yield engine


def tokens(engine: Engine, **options: Any) -> list[list[int]]:
    return [list(out.token_ids) for out in engine.generate(PROMPTS, max_new_tokens=NEW, **options)]


def tokens_of_one(engine: Engine, prompt: list[int]) -> list[int]:
    return list(engine.generate(prompt, max_new_tokens=NEW).token_ids)


def pool(engine: Engine) -> SlotState:
    return next(state for state in engine._runner.states if isinstance(state, SlotState))


def test_statistics_say_why_no_prefix_is_kept(engine: Engine, expected: list[list[int]]) -> None:
    assert tokens(engine) == expected
    assert "a state that is not in pages" in str(engine.stats())


@pytest.mark.parametrize("budget", [2, 3, 5, 17])
def test_chunks_carry_the_state(path: Path, expected: list[list[int]], budget: int) -> None:
    with Engine.load(path, mode="eager", **(SETTINGS | {"token_budget": budget})) as engine:
        assert tokens(engine) == expected


@pytest.mark.parametrize("budget", [3, 5, 17])
def test_no_token_comes_alone_where_time_steps_are_limited_in_runs(tmp_path: Path, budget: int) -> None:
    """transformers limits the time step of Mamba 2 in prompts, and not in decode."""
    changes = {"time_step_limit": [0.0, 0.02]}
    path = families.write("mamba2", tmp_path, **changes)
    with Engine.load(path, mode="eager", **(SETTINGS | {"token_budget": budget})) as engine:
        assert tokens(engine) == expected_of("mamba2", **changes)
        assert [tokens_of_one(engine, prompt) for prompt in PROMPTS] == expected_of("mamba2", **changes)


@pytest.mark.parametrize(("name", "mode"), [("mamba2", "eager"), ("bamba", "jit"), ("bamba", "hybrid")])
def test_a_prompt_of_one_token_alone_is_computed_as_a_prompt(name: str, mode: str, tmp_path: Path) -> None:
    """Whose time step is limited, beside attention layers that are compiled as well."""
    changes = {"time_step_limit": [0.0, 0.02]}
    model, prompt = families.build(name, **changes), PROMPTS[1]
    assert len(prompt) == 1
    wanted, logits = families.reference(model, prompt, NEW)
    path = families.write(name, tmp_path, **changes)
    with Engine.load(path, mode=mode, compile_backend="eager", **SETTINGS) as engine:
        out = engine.generate(prompt, max_new_tokens=NEW, logprobs=0)
        assert list(out.token_ids) == wanted
        likely = logits.log_softmax(-1).gather(-1, torch.tensor(wanted)[:, None])[:, 0]
        assert (torch.tensor([entry.logprob for entry in out.logprobs]) - likely).abs().max() < 1e-4
        stats = engine.stats()
        assert not stats.fallbacks
        assert stats.late_compiles == 0


def test_too_short_runs_are_refused(tmp_path: Path) -> None:
    path = families.write("mamba2", tmp_path)
    with pytest.raises(ConfigError, match=r"token_budget=2, .* give token_budget=3 or more"):
        Engine.load(path, mode="eager", **(SETTINGS | {"token_budget": 2}))


def break_once(call: int) -> Callable[..., Any]:
    """A forward hook that raises at its `call`-th call."""
    calls: list[int] = []

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("injected")

    return hook


@pytest.mark.parametrize("call", [1, 2, 4, 9, 12])
def test_a_step_that_failed_in_the_middle_runs_again(path: Path, expected: list[list[int]], call: int) -> None:
    """The first layers have written their states by then, in prefills as in decode steps."""
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        handle = engine._runner.bound.layers[-1].register_forward_hook(break_once(call))
        try:
            outs = engine.generate(PROMPTS, max_new_tokens=NEW)
        finally:
            handle.remove()
        # Of several requests in a call each is tried alone; one that was alone is the one to blame.
        assert sum(out.error is not None for out in outs) <= 1
        assert all(list(out.token_ids) == wanted for out, wanted in zip(outs, expected, strict=True) if not out.error)
        assert tokens(engine) == expected


def test_a_replay_that_fails_is_run_without_its_recording(path: Path, expected: list[list[int]]) -> None:
    with Engine.load(path, mode="graph", **SETTINGS) as engine:
        assert tokens(engine) == expected
        broken = []
        for recording in engine._runner.graphs.recordings:
            recorded = recording.recorded
            if not broken and recording.hits:
                broken.append(recorded)

                def replay() -> None:
                    raise RuntimeError("injected")

                object.__setattr__(recorded, "replay", replay)
        assert broken
        engine._runner.router._routes.clear()
        with pytest.warns(RuntimeWarning, match="replay raised"):
            assert tokens(engine) == expected


def test_first_replays_are_compared_and_count_once(path: Path, expected: list[list[int]]) -> None:
    with Engine.load(path, mode="graph", validate=True, **SETTINGS) as engine:
        assert tokens(engine) == expected
        assert tokens(engine) == expected
        assert not engine.stats().graphs.failures


def test_cancelled_requests_leave_nothing_behind(engine: Engine, expected: list[list[int]]) -> None:
    loop = engine._loop
    real, steps = loop.step, []

    def interrupted() -> None:
        steps.append(1)
        if len(steps) == 5:
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


def test_a_freed_slot_s_state_does_not_leak(engine: Engine, expected: list[list[int]]) -> None:
    state = pool(engine)
    padding = engine._runner.state.padding_slot
    for mixer in state.mixers:
        for tensor in mixer:
            if tensor is not None:
                tensor[:padding] = float("nan")
                tensor[padding + 1 : -1] = float("nan")
                tensor[-1] = float("nan")  # what padding writes
    state.turns[:padding] = torch.tensor([1, 0, 1])
    assert tokens(engine) == expected


@pytest.mark.parametrize("family", ["lfm2"], indirect=True, scope="module")
def test_few_pages_make_requests_wait(path: Path, expected: list[list[int]]) -> None:
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        most = pool(engine).bytes_per_slot * 4
        page = engine._runner.states[0].bytes_per_page
    with Engine.load(path, mode="eager", **(SETTINGS | {"kv_memory": most + 6 * page})) as engine:
        assert engine.stats().pages == 5
        assert tokens(engine) == expected


def test_memory_given_back_comes_back_empty(engine: Engine, expected: list[list[int]]) -> None:
    tokens(engine)
    engine.release_cache()
    engine.resume()
    assert tokens(engine) == expected


def test_scored_prompts_and_several_completions(family: str, engine: Engine, expected: list[list[int]]) -> None:
    model = families.build(family)
    out = engine.generate(PROMPTS[2], max_new_tokens=NEW, prompt_logprobs=0)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS[2]])).logits[0].log_softmax(-1)
    wanted = logits[:-1].gather(-1, torch.tensor(PROMPTS[2][1:])[:, None])[:, 0]
    found = torch.tensor([entry.logprob for entry in out.prompt_logprobs[1:]])
    assert (found - wanted).abs().max() < 1e-4
    assert list(out.token_ids) == expected[2]


def test_drafts_are_refused_before_weights_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridgen.loading.checkpoint.read_weights", lambda *_, **__: pytest.fail("weights were read"))
    for who in ({"speculation": "ngram"}, {"drafter": path}):
        with pytest.raises(ConfigError, match=r"with this model: .* state that cannot be taken back"):
            Engine.load(path, mode="eager", **who, **SETTINGS)


def test_what_cannot_be_is_refused(path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="for the states of 3 requests, and at least"):
        Engine.load(path, mode="eager", **(SETTINGS | {"kv_memory": "1KiB"}))


def test_a_live_module_stays_its_owner_s(family: str, expected: list[list[int]]) -> None:
    model = families.build(family)
    ids = torch.tensor([PROMPTS[2]])
    before = model(ids).logits
    with Engine.load(model, mode="eager", **SETTINGS) as engine:
        assert tokens(engine) == expected
        assert any(isinstance(module, SlotMixer) for module in engine._runner.bound.model.modules())
        assert not any(isinstance(module, SlotMixer) for module in model.modules())
        assert torch.equal(model(ids).logits, before)
        with torch.no_grad():
            next(find_mixers(model)).in_proj.weight.mul_(0.5)
        changed = [families.reference(model, prompt, NEW)[0] for prompt in PROMPTS]
        assert changed != expected
        assert tokens(engine) == changed
