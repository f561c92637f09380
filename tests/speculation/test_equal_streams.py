"""Drafts change no token: whoever drafts, however many are right, in every mode and whatever is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
from draft_cases import (
    GREEDY,
    PROMPTS,
    RIGHT,
    Streams,
    check_counts,
    check_equal,
    each,
    loaded,
    sequences,
    steps_of,
)

from hybridgen import Engine, SamplingParams
from hybridgen.graphs import recorder, stand_in
from hybridgen.speculation.oracle import OracleDrafter


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "mistral", "gemma2", "qwen3_moe", "gpt_oss", "gpt2", "llama4_text", "dynamic"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "mixtral")),
    ],
)
def test_every_kind_of_family(family: str, tmp_path: Path) -> None:
    """Dense, windows, soft cap, experts, sinks, learned positions, chunks, keys that depend on the length; greedy and
    sampled, prompts in chunks beside it, page borders inside drafts."""
    name, changes = families.ROPE_VARIANTS.get(family, (family, {}))
    path = families.write(name, tmp_path, **families.depth(name) | changes)
    params = each(9, 45)
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[:9], params)
    with loaded(path, speculation=OracleDrafter(sequences(expected), RIGHT[:9])) as engine:
        found = engine.generate(PROMPTS[:9], params)
        stats = engine.stats().speculation
    check_equal(found, expected)
    check_counts(found)
    assert (stats.drafter, stats.accepted) == ("oracle", sum(c.accepted_tokens for c in found))
    assert stats.drafted == sum(c.drafted_tokens for c in found)
    assert stats.tokens_per_step > 1.5
    assert found[0].accepted_tokens > 30
    assert found[1].accepted_tokens == 0 < found[1].drafted_tokens


@pytest.mark.parametrize(
    ("mode", "run_ahead"),
    [
        ("eager", 0),
        ("eager", 1),
        ("graph", 0),
        ("graph", 1),
        pytest.param("jit", 0, marks=pytest.mark.slow),
        ("jit", 1),
        ("hybrid", 0),
        pytest.param("hybrid", 1, marks=pytest.mark.slow),
    ],
)
def test_every_mode_and_batch(mode: str, run_ahead: int, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 1 to 17 whose rows accept differently; the host reads a step late with run_ahead."""
    path, params, expected = streams
    for module in (stand_in, recorder):  # or drafts may not be worth their time here
        monkeypatch.setattr(module, "median_seconds", lambda *_: 1.0)
    oracle = OracleDrafter(sequences(expected), RIGHT)
    with loaded(path, mode, speculation=oracle, run_ahead=run_ahead) as engine:
        for count in (1, 2, 5, 17):
            if mode in ("graph", "hybrid"):  # steps with drafts that it wants are recorded behind it
                engine.generate(PROMPTS[:count], params[:count])
                while engine.record_missing():
                    pass
            found = engine.generate(PROMPTS[:count], params[:count])
            check_equal(found, expected[:count])
            check_counts(found)
            assert found[0].accepted_tokens > 20
        kinds = {(step.kind, step.reason) for step in found[0].steps if step.phase == "decode"}
        if mode in ("graph", "hybrid"):
            assert any(kind == "layers, stand-in" and "drafts a row" in reason for kind, reason in kinds), kinds
        assert engine.stats().late_compiles == 0


@pytest.mark.parametrize("right", range(8))
def test_forced_drafts(right: int, streams: Streams) -> None:
    """All right, none right, wrong at each place: tokens a step are what that allows."""
    path, _, _ = streams
    params = each(4, 33, [GREEDY, {"temperature": 1.0, "presence_penalty": 0.5}])
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[:4], params)
    with loaded(path, speculation=OracleDrafter(sequences(expected), [right] * 4)) as engine:
        found = engine.generate(PROMPTS[:4], params)
        stats = engine.stats().speculation
    check_equal(found, expected)
    check_counts(found)
    if right == 0:
        assert stats.accepted == 0 < stats.drafted
        assert stats.tokens_per_step == 1
    else:
        assert stats.tokens_per_step > 1 + min(right, 3) / 2
    if right == 7:  # 33 tokens: one of the prefill, and 4 steps of 8
        assert [steps_of(completion) for completion in found] == [4] * 4


def test_ngrams_of_prompt_and_output(streams: Streams) -> None:
    """A prompt that says the same again and again; what is generated is looked at too."""
    path, _, _ = streams
    prompts = [(30, 31, 32, 33) * 8, (40, 41) * 9, PROMPTS[4]]
    bias = {"logit_bias": {30: 60.0, 31: 60.0}, "temperature": 1.0}  # the output is of two tokens
    params = each(3, 60, [bias, GREEDY, bias])
    with loaded(path) as engine:
        expected = engine.generate(prompts, params)
    with loaded(path, speculation="ngram") as engine:
        found = engine.generate(prompts, params)
        assert engine.stats().speculation.drafter == "ngram"
    check_equal(found, expected)
    check_counts(found)
    assert found[0].accepted_tokens > 3 < found[2].accepted_tokens


def test_where_nothing_is_drafted_the_plain_recording_runs(streams: Streams) -> None:
    """No token comes twice, so that n-grams find nothing: as many steps as without drafts, and the same ones."""
    path, _, _ = streams
    params = each(4, 30, [{"temperature": 0.0, "no_repeat_ngram_size": 1}])
    prompts = [tuple(range(first, first + 9)) for first in (20, 40, 60, 80)]
    ran = {}
    for drafts in (None, "ngram"):
        with loaded(path, "graph", speculation=drafts) as engine:
            found = engine.generate(prompts, params)
            ran[drafts] = [out.steps for out in found], [out.token_ids for out in found]
            assert not any(out.drafted_tokens for out in found)
            assert [out.tokens_per_step for out in found] == [1] * 4
            kinds = {step.kind for out in found for step in out.steps if step.phase == "decode"}
            assert kinds == {"layers, stand-in"}
            assert not any("drafts a row" in step.reason for out in found for step in out.steps)
    assert ran[None] == ran["ngram"]


@pytest.mark.parametrize("place", range(1, 12))
def test_an_end_inside_an_accepted_run(place: int, streams: Streams) -> None:
    """A stop id or the limit at any place of a run: nothing behind it is shown, counted or kept."""
    path, _, _ = streams
    with loaded(path) as engine:
        long = engine.generate(PROMPTS[1], max_new_tokens=30, temperature=0, ignore_eos=True)
        stop = [long.token_ids[place]]
        expected = [
            engine.generate(PROMPTS[1], max_new_tokens=30, temperature=0, stop_token_ids=stop),
            engine.generate(PROMPTS[1], max_new_tokens=place, temperature=0),
            engine.generate(PROMPTS[1], max_new_tokens=10, temperature=0, min_new_tokens=9, stop_token_ids=stop),
        ]
    with loaded(path, speculation=OracleDrafter(sequences([long]), [7]), run_ahead=1) as engine:
        found = [
            engine.generate(PROMPTS[1], max_new_tokens=30, temperature=0, stop_token_ids=stop),
            engine.generate(PROMPTS[1], max_new_tokens=place, temperature=0),
            engine.generate(PROMPTS[1], max_new_tokens=10, temperature=0, min_new_tokens=9, stop_token_ids=stop),
        ]
        assert engine.stats().tokens["generated"] == sum(len(completion.token_ids) for completion in found)
    check_equal(found, expected)


def test_a_stream_has_one_event_for_each_token(streams: Streams) -> None:
    path, params, expected = streams
    with loaded(path, speculation=OracleDrafter(sequences(expected[:3]), [7, 2, 3])) as engine:
        events: dict[int, list[int]] = {0: [], 1: [], 2: []}
        ends = {}
        for event in engine.stream(PROMPTS[:3], params[:3]):
            events[event.index].append(event.token_id)
            if event.completion is not None:
                ends[event.index] = event.completion
    assert [tuple(events[i]) for i in range(3)] == [completion.token_ids for completion in expected[:3]]
    check_equal([ends[i] for i in range(3)], expected[:3])


def test_several_choices_and_a_prefix_that_is_cached(streams: Streams) -> None:
    path, _, _ = streams
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3, "n": 3}
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[1], **options)
    with loaded(path, speculation=OracleDrafter(sequences([expected]), [7])) as engine:
        found = engine.generate(PROMPTS[1], **options)
        longer = (*PROMPTS[1], *found.token_ids)  # its full pages were written by steps of several tokens
        again = engine.generate(longer, max_new_tokens=20, temperature=0)
    check_equal(list(found.choices), list(expected.choices))
    assert again.cached_tokens == (len(longer) - 1) // 16 * 16
    with loaded(path, prefix_cache=False) as engine:
        check_equal([again], [engine.generate(longer, max_new_tokens=20, temperature=0)])


def test_cancelled_beside_others(streams: Streams) -> None:
    """A stream that its reader leaves; the others, and whoever gets its slot, have their own tokens."""
    path, params, expected = streams
    with loaded(path, speculation=OracleDrafter(sequences(expected), RIGHT), run_ahead=1) as engine:
        left = engine.stream(PROMPTS[:4], params[:4])
        for _ in range(20):
            next(left)
        left.close()
        check_equal(engine.generate(PROMPTS, params), expected)


def test_more_requests_than_slots(streams: Streams) -> None:
    """Requests that wait take slots in which others drafted."""
    path, params, expected = streams
    with loaded(path, speculation=OracleDrafter(sequences(expected), RIGHT), max_batch=3) as engine:
        check_equal(engine.generate(PROMPTS, params), expected)


def test_pages_that_are_used_in_turn(tmp_path: Path) -> None:
    """A window of 7 and few pages of 8: drafts that are wrong write to none that is still seen."""
    path = families.write("mistral", tmp_path, sliding_window=7)
    settings: dict[str, Any] = {"page_size": 8, "token_budget": 2, "max_batch": 3, "prefix_cache": False}
    params = each(3, 60, [GREEDY, {"temperature": 1.0}])
    with loaded(path, **settings) as engine:
        expected = engine.generate(PROMPTS[:3], params)
    page = 8 * 2 * 4 * 2 * 16 * 4  # keys and values, 4 layers, 2 heads of 16, float32
    settings |= {"kv_memory": 15 * page, "speculation": OracleDrafter(sequences(expected), [0, 2, 5])}
    with loaded(path, **settings) as engine:
        assert engine.stats().pages == 14  # the first takes 9 of them, and the others, of 13 and 8, a few in turn
        assert engine._loop.scheduler.pages.ring_pages == 2  # the window and the drafts: 7 + 8 - 1 positions
        check_equal(engine.generate(PROMPTS[:3], params), expected)


def test_stop_strings_and_text_inside_an_accepted_run() -> None:
    """The demo model repeats its prompt; a stop string ends it in the middle of a run, streamed and not."""
    prompt = "def add(a, b):\n    return a + b\n\n\n" * 6
    settings: dict[str, Any] = {"mode": "eager", "device": "cpu", "dtype": "float32", "max_batch": 2}
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True}
    stops = [None, ["+ b"], ["a + b\n\n\ndef add(a, b)"]]
    with Engine.load(None, **settings) as engine:
        expected = [engine.generate(prompt, **options, stop=stop) for stop in stops]
    with Engine.load(None, **settings, speculation="ngram") as engine:
        found = [engine.generate(prompt, **options, stop=stop) for stop in stops]
        check_equal(found, expected)
        for stop, other in zip(stops, expected, strict=True):
            events = list(engine.stream(prompt, **options, stop=stop))
            assert "".join(event.text for event in events) == other.text
            assert tuple(event.token_id for event in events if event.token_id is not None) == other.token_ids
    assert expected[1].stop_match == "+ b"
    assert found[0].accepted_tokens > 30
    assert found[2].accepted_tokens > 3


def test_functions_of_a_row_see_its_own_text(streams: Streams) -> None:
    """Steps with such a row check no drafts; those of the others go on once it has ended."""
    path, params, _ = streams
    seen: list[int] = []

    def no_repeats(ids: Any, logits: Any) -> Any:
        seen.append(len(ids))
        logits[ids] = -float("inf")
        return logits

    mixed = [
        params[0],
        SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True, logits_processors=[no_repeats]),
    ]
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[:2], mixed)
    lengths, seen[:] = seen[:], []
    with loaded(path, speculation=OracleDrafter(sequences(expected), [7, 7])) as engine:
        found = engine.generate(PROMPTS[:2], mixed)
    check_equal(found, expected)
    assert seen == lengths
    assert found[1].drafted_tokens == 0 < found[0].accepted_tokens
