"""What a request may hold, whoever made it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hybridgen import SamplingError, SamplingParams, ServerError
from hybridgen.serving.service.intake import STOP_CHAR_BYTES, Request, check_request, check_sampling
from hybridgen.serving.service.limits import Limits

LIMITS = Limits(stop_strings=4, stop_chars=20, sampling_ids=50)


def weight(*sampling: SamplingParams, prompt: Any = "x", size: int = 100) -> int:
    return check_request(Request([prompt] * len(sampling), list(sampling), False, False, size), LIMITS, 1000)


def test_a_request_weighs_as_much_as_its_frame() -> None:
    assert weight(SamplingParams(), size=2**20) >= 2**20
    assert weight(SamplingParams(stop=["abcd"])) == weight(SamplingParams()) + 4 * STOP_CHAR_BYTES
    assert weight(SamplingParams(), prompt=[1] * 500) >= 100 + 500 * 8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stop": ["a", "b", "c", "d", "e"]}, "over the limit of 4"),
        ({"stop": ["x" * 21]}, "over 20 characters"),
        ({"stop": "x" * 21}, "over 20 characters"),
        ({"stop": ["x" * 11, "y" * 10]}, "over 20 characters"),
        ({"stop_token_ids": list(range(51))}, "over 50 ids and biases"),
        ({"logit_bias": dict.fromkeys(range(51), -math.inf)}, "over 50 ids and biases"),
        ({"stop_token_ids": list(range(26)), "logit_bias": dict.fromkeys(range(26), 1.0)}, "over 50 ids"),
    ],
)
def test_sampling_over_a_limit(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ServerError, match=words) as caught:
        weight(SamplingParams(**fields))
    assert caught.value.code == "limit"


def test_what_is_over_a_limit_only_together() -> None:
    half = [SamplingParams(stop=["x" * 11]), SamplingParams(stop=["y" * 11])]
    for params in half:
        weight(params)
    with pytest.raises(ServerError, match="over 20 characters"):
        weight(*half)
    weight(*[SamplingParams(stop=["x" * 11], seed=seed) for seed in range(10)])  # the same one, ten times
    weight(*[half[0]] * 10)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": [["x"] * 60]},
        {"a_field_of_tomorrow": [[1] * 60]},
        {"a_field_of_tomorrow": {"5": {"6": [1] * 60}}},
        {"bad_words_ids": [[1, 2]] * 60},
        {"logit_bias": {str(token): [] for token in range(60)}},
    ],
)
def test_fields_are_measured_before_anything_is_made_of_them(fields: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match="over 50 ids and biases"):
        check_sampling([fields], LIMITS)


def test_a_name_that_no_field_can_have() -> None:
    with pytest.raises(SamplingError, match="unknown keyword 'xxxx"):
        check_sampling([{"x" * 4_000_000: 1}], LIMITS)
