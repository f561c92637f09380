"""SamplingParams and Timing."""

import math
from typing import Any

import pytest

from hybridgen import SamplingError, SamplingParams, Timing
from hybridgen.errors import shown


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": math.nan},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"presence_penalty": math.nan},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"min_new_tokens": -1},
        {"min_new_tokens": 5, "max_new_tokens": 4},
        {"seed": -1},
        {"seed": 2**63},
        {"n": 0},
        {"n": 2, "temperature": 0},
        {"stop": [""]},
        {"stop": [3]},
        {"stop": 3},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["a"]},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": [1]},
        {"logprobs": -1},
        {"logprobs": 1000},
        {"logprobs_of": "both"},
        {"ignore_eos": 1},
        {"typical_p": 0.0},
        {"typical_p": 1.1},
        {"epsilon_cutoff": 1.0},
        {"eta_cutoff": -0.1},
        {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": 2.5},
        {"bad_words_ids": [3]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": "ab"},
        {"bad_words_ids": [["a"]]},
        {"sequence_bias": 3},
        {"sequence_bias": [[1, 2]]},
        {"sequence_bias": [[[1], math.nan]]},
        {"sequence_bias": [[[1], math.inf]]},
        {"sequence_bias": {(1, -2): 1.0}},
        {"sequence_bias": {(): 1.0}},
        {"suppress_tokens": 5},
        {"suppress_tokens": [True]},
        {"begin_suppress_tokens": "5"},
        {"forced_bos_token_id": -1},
        {"forced_eos_token_id": True},
        {"forced_eos_token_id": [1.5]},
        {"temperature": 10**400},
        {"presence_penalty": -(10**400)},
        {"presence_penalty": None},
        {"frequency_penalty": None},
        {"logit_bias": {1: 10**400}},
        {"logit_bias": {1: -(10**400)}},
        {"logit_bias": {1: "a"}},
        {"logit_bias": {1: None}},
        {"logit_bias": {10**5000: 1}},
        {"logit_bias": "a" * 1000},
        {"max_new_tokens": 10**5000},
        {"min_new_tokens": 10**5000},
        {"seed": 10**5000},
        {"stop": 10**5000},
        {"stop_token_ids": [10**5000]},
        {"top_p": 10**5000},
        {"top_k": "x" * 1000},
        {"skip_special_tokens": "x" * 1000},
    ],
)
def test_bad_values_are_refused_and_named(fields: dict[str, Any]) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**fields)
    assert next(iter(fields)) in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        (r"'a\nb'", "a\nb"),
        ("'" + "x" * 56 + "...", "x" * 1000),
        ("<an integer of 16610 bits>", 10**5000),
        ("-<an integer of 1329 bits>", -(10**400)),
        ("<a value of type list>", [10**5000]),
    ],
    ids=range(6),  # pytest cannot write the largest as text
)
def test_values_in_messages_are_short(text: str, value: Any) -> None:
    assert shown(value) == text


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)


def test_a_bias_of_minus_infinity_bans() -> None:
    assert SamplingParams(logit_bias={1: -math.inf}).logit_bias == {1: -math.inf}


def test_tpot_is_of_the_gaps_after_the_first_token() -> None:
    times = (*(0.5 + 0.01 * i for i in range(100)), 2.5)
    timing = Timing(queue=0.0, ttft=0.5, total=2.5, token_times=times)
    assert timing.tpot_p50 == pytest.approx(0.01)
    assert timing.tpot_p95 == pytest.approx(0.01)
    assert timing.tpot_p99 == pytest.approx(0.01)
    assert timing.tpot(1.0) == pytest.approx(2.5 - times[-2])


def test_tpot_of_one_token_is_not_a_number() -> None:
    assert Timing(queue=0.0, ttft=0.1, total=0.1, token_times=(0.1,)).tpot_p50 is None
