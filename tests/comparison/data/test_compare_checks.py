"""Errors of logits."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from hybridgen.comparison.data.checks import CANDIDATES, logit_error
from hybridgen.core import TokenLogprob


def completion(ids: list[int], *tops: dict[int, float]) -> Any:
    logprobs = [TokenLogprob(token, 0.0, tuple(top.items())) for token, top in zip(ids, tops, strict=True)]
    return SimpleNamespace(token_ids=ids, logprobs=logprobs)


def test_the_logit_error_is_the_largest_up_to_the_first_difference() -> None:
    reference = completion([1, 2, 3], {1: -1.0, 2: -2.0}, {2: -1.0}, {3: -1.0})
    same = completion([1, 2, 3], {1: -1.0, 2: -2.25}, {2: -1.0}, {3: -1.125})
    assert logit_error([same], [reference]) == 0.25
    left = completion([1, 5, 3], {1: -1.0}, {2: -1.5}, {3: -9.0})  # after the second, its input is another
    assert logit_error([left], [reference]) == 0.5
    assert logit_error([reference], [reference]) == 0.0


def test_what_cannot_be_compared_is_no_agreement() -> None:
    reference = completion([1], {1: -1.0, 2: -2.0})
    assert logit_error([completion([1], {1: float("nan"), 2: -2.0})], [reference]) == math.inf
    # Neither token is reported: each has at most -5.
    assert logit_error([completion([1], {7: -0.5, 8: -5.0})], [reference]) == 4.0
    assert logit_error([completion([])], [completion([])]) is None


def test_only_the_most_likely_tokens_are_compared() -> None:
    top = {token: -float(token) for token in range(CANDIDATES + 5)}
    other = {token: value - (9.0 if token >= CANDIDATES else 0.0) for token, value in top.items()}
    assert logit_error([completion([0], other)], [completion([0], top)]) == 0.0
