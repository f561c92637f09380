"""Values on the wire: whatever is sent comes back equal."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hybridgen
from hybridgen import (
    Completion,
    FinishReason,
    SamplingError,
    SamplingParams,
    ServerBusyError,
    ServerError,
    StepSummary,
    Timing,
    TokenEvent,
    TokenLogprob,
)
from hybridgen.params import GRAMMARS
from hybridgen.serving.unix import messages
from hybridgen.serving.unix.frames import FrameReader, decode, encode

reals = st.floats(allow_nan=False, allow_infinity=False, width=32)
sequences = st.lists(st.integers(0, 1000), min_size=1, max_size=3)
params = st.builds(
    SamplingParams,
    max_new_tokens=st.none() | st.integers(10, 2**40),
    min_new_tokens=st.integers(0, 10),
    temperature=st.none() | st.floats(0.1, 5),
    top_k=st.none() | st.integers(0, 100),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.none() | st.floats(0.5, 2),
    presence_penalty=reals,
    frequency_penalty=reals,
    logit_bias=st.dictionaries(st.integers(0, 2**31), reals | st.just(-math.inf), max_size=5),
    seed=st.none() | st.integers(0, 2**63 - 1),
    n=st.integers(1, 5),
    stop=st.lists(st.text(min_size=1), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 1000), max_size=3),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 64),
    logprobs_of=st.sampled_from(["model", "sampled"]),
    skip_special_tokens=st.booleans(),
    typical_p=st.none() | st.floats(0.01, 1),
    epsilon_cutoff=st.none() | st.floats(0, 0.9),
    eta_cutoff=st.none() | st.floats(0, 0.9),
    begin_suppress_tokens=st.none() | st.lists(st.integers(0, 1000), max_size=3),
    forced_bos_token_id=st.none() | st.integers(0, 1000) | st.just([]),
    sequence_bias=st.none() | st.lists(st.tuples(sequences, reals | st.just(-math.inf)), max_size=3),
    bad_words_ids=st.none() | st.lists(sequences, max_size=3),
    suppress_tokens=st.none() | st.lists(st.integers(0, 1000), max_size=3),
    forced_eos_token_id=st.none() | st.integers(0, 1000) | st.just([]),
    no_repeat_ngram_size=st.none() | st.integers(0, 9),
    cache_salt=st.none() | st.text(),
    truncate_prompt=st.none() | st.integers(1, 2**40),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 1000), min_size=1, max_size=3),
)


def over_the_wire(value: dict[str, Any]) -> dict[str, Any]:
    return decode(encode(value)[4:])


@settings(deadline=None)
@given(params)
def test_sampling_params(given_params: SamplingParams) -> None:
    wire = over_the_wire(messages.sampling_to_wire(given_params))
    assert messages.sampling_from_wire(wire) == given_params


def test_every_sampling_field_was_in_the_strategy() -> None:
    """But for functions, which are refused, `prompt_logprobs`, which no `n` above 1 goes with, and grammars, of which a
    request has one."""
    default = SamplingParams()
    names = {field.name for field in fields(SamplingParams) if not field.metadata.get("functions")} - {
        "prompt_logprobs",
        *GRAMMARS,
    }
    for bound in (
        SamplingParams(json_schema={"type": "array", "items": {"enum": [1, "é"]}}),
        SamplingParams(regex="a+"),
        SamplingParams(grammar='start: "a"'),
        SamplingParams(choice=["a", "b"]),
    ):
        assert messages.sampling_from_wire(over_the_wire(messages.sampling_to_wire(bound))) == bound
    scored = SamplingParams(prompt_logprobs=2, max_new_tokens=0)
    assert messages.sampling_from_wire(over_the_wire(messages.sampling_to_wire(scored))) == scored
    full = SamplingParams(
        max_new_tokens=7, min_new_tokens=1, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=0.1, frequency_penalty=0.2, logit_bias={3: -math.inf}, seed=1, n=2, stop="x",
        stop_token_ids=[4], ignore_eos=True, logprobs=2, logprobs_of="sampled", skip_special_tokens=False,
        typical_p=0.9, epsilon_cutoff=0.1, eta_cutoff=0.2, sequence_bias={(1, 2): -math.inf, (3,): 0.5},
        bad_words_ids=[[5, 6]], suppress_tokens=[7], begin_suppress_tokens=[8], no_repeat_ngram_size=3,
        forced_bos_token_id=9, forced_eos_token_id=[0, 10], cache_salt="a", truncate_prompt=5, allowed_token_ids=[9],
    )  # fmt: skip
    assert all(getattr(full, name) != getattr(default, name) for name in names)
    assert messages.sampling_to_wire(full).keys() == names
    assert messages.sampling_from_wire(over_the_wire(messages.sampling_to_wire(full))) == full


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        ([], "not an object"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"logit_bias": {"x": 1}}, "keys are token ids"),
        ({"logit_bias": {"01": 1}}, "keys are token ids"),
        ({"logit_bias": {"1": "inf"}}, "finite number"),
        ({"logit_bias": {"1": []}}, "give a number"),
        ({"logit_bias": [1]}, "not a mapping"),
        ({"sequence_bias": [[[1], "inf"]]}, "finite number"),
        ({"sequence_bias": [[[1], []]]}, "give a number"),
        ({"sequence_bias": [[[], 1]]}, "non-empty lists"),
        ({"sequence_bias": [1]}, "pairs of token ids"),
        ({"sequence_bias": {"a": 1}}, "non-empty lists"),
        ({"bad_words_ids": {"a": 1}}, "not a list"),
        ({"stop": {"a": 1}}, "not a list"),
        ({"stop": [1]}, "non-empty strings"),
        ({"stop_token_ids": "12"}, "is not a list"),
        ({"n": 1.5}, "not an integer"),
        ({"n": 10**30}, "out of range"),
        ({"temperature": "nan"}, "not a finite number"),
        ({"ignore_eos": 1}, "True or False"),
    ],
)
def test_bad_sampling_is_a_sampling_error(wire: Any, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        messages.sampling_from_wire(wire)


floats = st.floats(allow_nan=False)
seconds = st.floats(0, 1e9)
pairs = st.lists(st.tuples(st.integers(0, 99), floats), max_size=3).map(tuple)
logprobs = st.builds(TokenLogprob, st.integers(0, 99), floats, pairs)
completions = st.builds(
    Completion,
    text=st.text(),
    token_ids=st.lists(st.integers(0, 2**31), max_size=4).map(tuple),
    prompt_token_ids=st.lists(st.integers(0, 2**31), max_size=4).map(tuple),
    finish_reason=st.sampled_from(FinishReason),
    seed=st.integers(0, 2**63 - 1),
    timing=st.builds(
        Timing,
        queue=st.none() | seconds,
        ttft=st.none() | seconds,
        total=seconds,
        token_times=st.lists(seconds, max_size=3).map(tuple),
    ),
    steps=st.lists(st.builds(StepSummary, st.text(), st.text(), st.text(), st.integers(0, 99)), max_size=2).map(tuple),
    logprobs=st.none() | st.lists(logprobs, max_size=2).map(tuple),
    stop_match=st.none() | st.text() | st.integers(0, 99),
    cached_tokens=st.integers(0, 999),
    drafted_tokens=st.integers(0, 999),
    accepted_tokens=st.integers(0, 999),
    truncated_tokens=st.integers(0, 999),
)


@settings(deadline=None)
@given(completions)
def test_completions(completion: Completion) -> None:
    wire = over_the_wire(messages.completion_to_wire(completion))
    assert messages.completion_from_wire(wire) == completion


@settings(deadline=None)
@given(completions)
def test_brief_completions_lack_what_is_most_of_them(completion: Completion) -> None:
    back = messages.completion_from_wire(over_the_wire(messages.completion_to_wire(completion, brief=True)))
    timing = replace(completion.timing, token_times=())
    assert back == replace(completion, prompt_token_ids=(), timing=timing)


def test_nan_and_infinity_survive() -> None:
    timing = Timing(queue=None, ttft=0.5, total=1.0)
    values = (TokenLogprob(3, -math.inf, ((4, math.nan),)),)
    completion = Completion(
        text="",
        token_ids=(),
        prompt_token_ids=(1,),
        finish_reason=FinishReason.STOP,
        seed=0,
        timing=timing,
        logprobs=values,
    )
    back = messages.completion_from_wire(over_the_wire(messages.completion_to_wire(completion)))
    assert back.timing == timing
    assert back.logprobs is not None
    assert back.logprobs[0].logprob == -math.inf
    assert math.isnan(back.logprobs[0].top[0][1])


@settings(deadline=None)
@given(st.text(), st.none() | st.integers(0, 99), st.none() | logprobs, st.none() | st.just((1, 2)))
def test_token_frames(
    text: str, token: int | None, logprob: TokenLogprob | None, prompt: tuple[int, ...] | None
) -> None:
    event = TokenEvent(token_id=token, text=text, index=2, choice=1, logprob=logprob)
    (message,) = FrameReader(2**20).feed(messages.token_frame(7, event, prompt))
    assert message["id"] == 7
    assert message.get("prompt_token_ids") == (None if prompt is None else list(prompt))
    assert messages.event_from_wire(message) == event


@pytest.mark.parametrize("kind", sorted(messages.CODES))
def test_errors_keep_their_class(kind: str) -> None:
    error = messages.CODES[kind]("what was wrong")
    back = messages.error_from_wire(over_the_wire(messages.error_to_wire(error)))
    assert type(back) is type(error)
    assert str(back) == "what was wrong"


def test_other_errors() -> None:
    busy = messages.error_from_wire(messages.error_to_wire(ServerBusyError("full", 0.25)))
    assert isinstance(busy, ServerBusyError)
    assert busy.retry_after == 0.25
    server = messages.error_from_wire(messages.error_to_wire(ServerError("late", "stuck")))
    assert type(server) is ServerError
    assert server.code == "stuck"
    bug = messages.error_to_wire(KeyError("a secret at /home/me/x.py"))
    assert bug["code"] == "internal"
    assert "secret" not in json.dumps(bug)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("no file at /home/me/model/config.json; look", "no file at <path>; look"),
        ("'/a/b' and (~/x/y) and /tmp/x-1_2.so:17", "'<path>' and (<path>) and <path>:17"),
        ("a/b, 1/2, and/or, n/a, 3 tok/s", "a/b, 1/2, and/or, n/a, 3 tok/s"),
        ("org/model has 3/4 of it", "org/model has 3/4 of it"),
    ],
)
def test_paths_are_left_out(text: str, clean: str) -> None:
    assert messages.without_paths(text) == clean
    assert messages.error_to_wire(hybridgen.EngineError(text))["message"] == clean
