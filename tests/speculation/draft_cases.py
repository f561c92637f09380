"""Engines, requests and checks for tests of drafts: what is generated is what is generated without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest

from hybridgen import Completion, Engine, SamplingParams

SETTINGS: dict[str, Any] = {
    "max_batch": 17,
    "page_size": 16,
    "token_budget": 48,
    "kv_memory": "16MiB",
    "max_context": 192,
    "compile_backend": "eager",  # what its graphs are made of is for test_families.py
}
PADS: dict[str, Any] = {"max_padding_ratio": 64, "decode_buckets": (1, 4, 17), "prefill_buckets": (16, 48)}
PROMPTS = [
    (20 + i, *prompt) for i, prompt in enumerate(families.prompts_of((5, 40, 1, 17, 33, 12, 64, 2, 15) + (9,) * 8))
]
"""Each begins with a token of its own, by which the oracle knows it."""
RIGHT = [7, 0, 1, 3, 2, 7, 5, 0, 4, 7, 6, 1, 7, 3, 0, 2, 7]
"""How many of the oracle's drafts are right, by prompt."""
GREEDY: dict[str, Any] = {"temperature": 0.0}
KINDS: list[dict[str, Any]] = [
    GREEDY,
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "logprobs": 3},
    {"temperature": 1.1, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7},
    {"temperature": 1.0, "repetition_penalty": 0.8, "frequency_penalty": 2.0, "logit_bias": {5: 4.0, 9: float("-inf")}},
    {"temperature": 0.0, "no_repeat_ngram_size": 1},
    {"temperature": 1.0, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [11, 12]], "logprobs": 0},
    {"temperature": 1.5, "min_new_tokens": 9, "stop_token_ids": list(range(0, 200, 2))},
]


@contextmanager
def loaded(path: Any, mode: str = "eager", **fields: Any) -> Iterator[Engine]:
    """An engine; at the end nothing is in use and nothing went another way."""
    with Engine.load(path, mode=mode, **SETTINGS | (PADS if mode in ("graph", "hybrid") else {}) | fields) as engine:
        yield engine
        if not engine.closed:
            stats = engine.stats()
            assert (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)
            assert not stats.fallbacks


def each(count: int, new_tokens: int, kinds: list[dict[str, Any]] = KINDS) -> list[SamplingParams]:
    """Parameters of requests, of every kind in turn."""
    kinds = [kinds[i % len(kinds)] for i in range(count)]
    return [SamplingParams(max_new_tokens=new_tokens, seed=i, ignore_eos=True, **kind) for i, kind in enumerate(kinds)]


def check_equal(ours: list[Completion], theirs: list[Completion]) -> None:
    """Tokens, how they ended, and log-probabilities."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.error is None
        assert mine.token_ids == other.token_ids
        assert (mine.finish_reason, mine.stop_match, mine.text) == (other.finish_reason, other.stop_match, other.text)
        for a, b in zip(mine.logprobs or (), other.logprobs or (), strict=True):
            assert a.token_id == b.token_id
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]


def sequences(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.prompt_token_ids + completion.token_ids for completion in completions]


def steps_of(completion: Completion) -> int:
    return sum(step.count for step in completion.steps if step.phase == "decode")


def check_counts(completions: list[Completion]) -> None:
    """A draft that was right is a step fewer."""
    for completion in completions:
        assert 0 <= completion.accepted_tokens <= completion.drafted_tokens
        assert 1 + steps_of(completion) + completion.accepted_tokens == len(completion.token_ids)
        assert completion.tokens_per_step == (len(completion.token_ids) - 1) / steps_of(completion)


Streams = tuple[Path, list[SamplingParams], list[Completion]]
"""A checkpoint, requests of every kind, and what they give without drafts."""
