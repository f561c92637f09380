"""Rows with a grammar in recorded modes: the forward in one recording, masks and sampler in another."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jsonschema
import pytest

from hybridgen import Completion, Engine, SamplingParams
from hybridgen.execution import step
from hybridgen.graphs import recorder, stand_in
from hybridgen.speculation.oracle import OracleDrafter

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPTS = ["def read(path):", "x =", "a", "import"]
LONG = {"regex": "[a-z ]{40,90}", "max_new_tokens": 8}
"""What does not end before the others."""
BATCH = [
    SamplingParams(temperature=0.9, seed=3, max_new_tokens=8, logprobs=1),
    SamplingParams(json_schema=SCHEMA, temperature=1.5, seed=4, max_new_tokens=40, repetition_penalty=1.2, logprobs=2),
    SamplingParams(temperature=1.0, seed=5, no_repeat_ngram_size=2, **LONG),
    SamplingParams(temperature=0, min_new_tokens=6, logprobs=2, logprobs_of="sampled", **LONG),
]
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_batch": 4, "max_context": 128}
RECORDED = SETTINGS | {"mode": "graph", "decode_buckets": [4], "prefill_buckets": [], "max_padding_ratio": 9.0}
APART = "sampler recorded apart"


def settled(engine: Engine) -> None:
    while engine.idle():
        pass


def run(engine: Engine, batch: list[SamplingParams] = BATCH) -> list[Completion]:
    """One call, and what it lacked is recorded behind it."""
    outs = engine.generate(PROMPTS[: len(batch)], batch)
    settled(engine)
    return outs


def same(outs: list[Completion], expected: list[Completion]) -> bool:
    """Whether tokens are equal, and log-probabilities but for rounding: a padded step has another size."""
    for out, other in zip(outs, expected, strict=True):
        assert out.token_ids == other.token_ids
        for mine, theirs in zip(out.logprobs or (), other.logprobs or (), strict=True):
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    return True


def recorded_apart(outs: list[Completion]) -> bool:
    return any(APART in step.reason for out in outs for step in out.steps)


@pytest.fixture(scope="module")
def expected() -> list[Completion]:
    """What mode `eager` gives; a row without a grammar gets what it gets alone."""
    with Engine.load(mode="eager", **SETTINGS) as engine:
        outs = run(engine)
        assert engine.generate(PROMPTS[0], BATCH[0]).token_ids == outs[0].token_ids
        jsonschema.validate(json.loads(outs[1].text), SCHEMA)
    return outs


@pytest.mark.parametrize("checks", [{}, {"validate": True, "check_addresses": True}], ids=["plain", "checked"])
def test_equal_tokens_before_and_behind_the_recording(expected: list[Completion], checks: dict[str, Any]) -> None:
    with Engine.load(**RECORDED, **checks) as engine:
        for turn in range(2):
            outs = run(engine)
            assert same(outs, expected)
            assert recorded_apart(outs) == (turn > 0)
        stats = engine.stats()
        rests = [graph for graph in stats.graphs.graphs if graph.executor == "sampler"]
        assert {graph.phase for graph in rests} == {"decode"}
        assert sum(graph.hits for graph in rests) > 10
        # The rest of a step is no step of its own.
        steps = sum(count for (phase, _, _), count in stats.steps.items() if phase == "decode")
        counts = stats.graphs.phases["decode"]
        assert counts.hits + counts.misses == steps
        assert not stats.fallbacks


def test_rows_that_come_and_go_meet_no_mask_of_others(expected: list[Completion]) -> None:
    """A mask stays where it lies until another one comes; the next batch has other rows there."""
    with Engine.load(**RECORDED) as engine:
        run(engine)
        plain = SamplingParams(temperature=0.9, seed=3, max_new_tokens=8, logprobs=1)
        alone = run(engine, [plain] * 4)
        assert alone[0].token_ids == expected[0].token_ids
        # Now the last two rows have a grammar, then the first one, then the last two again.
        for places in ((2, 3), (0,), (2, 3)):
            batch = [BATCH[2] if row in places else plain for row in range(4)]
            outs = run(engine, batch)
            assert [outs[row].token_ids for row in range(4) if row not in places] == [
                alone[row].token_ids for row in range(4) if row not in places
            ]
            for row in places:
                assert set(outs[row].text) <= set("abcdefghijklmnopqrstuvwxyz ")


def test_a_replay_that_raises_costs_the_recording_alone(expected: list[Completion]) -> None:
    with Engine.load(**RECORDED) as engine:
        run(engine)
        store = engine._runner.graphs
        rests = [recording for recording in store.recordings if recording.key.is_rest]
        assert rests

        def fail() -> None:
            raise RuntimeError("no more")

        for recording in rests:
            object.__setattr__(recording.recorded, "replay", fail)
        engine._runner.router._routes.clear()
        store.version += 1
        with pytest.warns(RuntimeWarning, match=r"the sampler's graph of . rows is not used any more: its replay"):
            outs = run(engine)
        assert same(outs, expected)
        assert not [recording for recording in store.recordings if recording.key in {each.key for each in rests}]


def test_functions_of_rows_are_called_outside(expected: list[Completion]) -> None:
    """They come before the grammar, and their step has its sampler outside of any recording."""
    calls = []

    def look(ids: Any, logits: Any) -> Any:
        calls.append(len(ids))
        return logits

    batch = [*BATCH[:3], dataclasses.replace(BATCH[3], logits_processors=[look])]
    with Engine.load(**RECORDED) as engine:
        for _ in range(2):
            outs = run(engine, batch)
            assert same(outs, expected)
        assert calls
        assert not any(APART in step.reason for step in outs[3].steps)


@pytest.mark.parametrize("mode", ["jit", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_the_other_modes(expected: list[Completion], mode: str) -> None:
    with Engine.load(mode=mode, compile_backend="eager", **SETTINGS) as engine:
        outs = run(engine)
        assert same(outs, expected)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_drafts_beside_them(
    expected: list[Completion], run_ahead: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with several tokens a row has a mask for each place, as if the drafts before it were the text: right ones
    up to the end of a text, wrong ones, and those that the grammar does not allow."""
    for module in (stand_in, recorder):  # or drafts may not be worth their time here
        monkeypatch.setattr(module, "median_seconds", lambda *_: 1.0)
    known = [out.prompt_token_ids + out.token_ids for out in expected]
    settings = (RECORDED if mode == "graph" else SETTINGS | {"mode": mode}) | {"run_ahead": run_ahead}
    drafter = OracleDrafter(known, [7] * 4)
    with Engine.load(speculation=drafter, **settings) as engine:
        for right in ([7] * 4, [7] * 4, [0, 2, 1, 7], [7, 0, 3, 0], [1, 7, 7, 5]):
            drafter.tell(right)
            outs = run(engine)
            assert same(outs, expected)
            for place, out in enumerate(outs):
                assert (out.accepted_tokens > 0) == (right[place] > 0 and out.drafted_tokens > 0)
        reasons = {step.reason for out in outs for step in out.steps if step.phase == "decode"}
        assert outs[1].accepted_tokens > 5
        if mode == "graph":
            assert any("drafts a row" in reason and APART in reason for reason in reasons), reasons
        assert not engine.stats().fallbacks


def test_masks_that_take_long_speak_against_drafts(expected: list[Completion], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with seven drafts has eight times the masks; where they take longer than the forward, it does."""
    for module in (stand_in, recorder):
        monkeypatch.setattr(module, "median_seconds", lambda *_: 1.0)
    known = [out.prompt_token_ids + out.token_ids for out in expected]
    with Engine.load(speculation=OracleDrafter(known, [7] * 4), **RECORDED) as engine:
        for _ in range(2):
            run(engine)
        assert 0 < engine._runner.steps.mask_seconds < 0.1
        assert run(engine)[1].drafted_tokens > 0
        monkeypatch.setattr(step, "_NEWEST", 0.0)
        engine._runner.steps.mask_seconds = 5.0
        outs = run(engine)
        assert same(outs, expected)
        guided = [ran.reason for out in outs for ran in out.steps if APART in ran.reason]
        assert guided
        assert not any("drafts a row" in reason for reason in guided)


def test_no_drafts_beside_functions(expected: list[Completion]) -> None:
    """A row with a function, which is called with its text, beside rows with grammars; they go on once it has ended."""
    known = [out.prompt_token_ids + out.token_ids for out in expected]
    seen: list[int] = []

    def look(ids: Any, logits: Any) -> Any:
        seen.append(len(ids))
        return logits

    batch = [dataclasses.replace(BATCH[0], logits_processors=[look]), *BATCH[1:]]
    with Engine.load(mode="eager", speculation=OracleDrafter(known, [7] * 4), **SETTINGS) as engine:
        outs = run(engine, batch)
    assert same(outs, expected)
    assert [out.drafted_tokens for out in outs[:1]] == [0]
    assert outs[1].accepted_tokens > 0
    assert seen == list(range(seen[0], seen[0] + len(outs[0].token_ids)))


def test_with_sampling_never_recorded() -> None:
    with Engine.load(sample_in_graph=False, **RECORDED) as engine:
        for _ in range(2):
            assert not recorded_apart(run(engine, BATCH[:2]))
        assert not [graph for graph in engine.stats().graphs.graphs if graph.executor == "sampler"]
