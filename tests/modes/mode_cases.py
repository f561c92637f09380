"""Modes graph and hybrid on a CPU: the tokens of mode eager, whatever is padded, evicted, captured or broken.

A stand-in takes the place of graphs: a replay calls the recorded step. Buckets, padding, static buffers, the store and
its decisions are those of CUDA.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest

from hybridgen import Completion, Engine, SamplingParams
from hybridgen.graphs import Recorded, StandInRecorder
from hybridgen.graphs import setup as plan
from hybridgen.graphs.key import GraphKey

SETTINGS: dict[str, Any] = {
    "max_batch": 17,
    "page_size": 16,
    "token_budget": 48,
    "kv_memory": "16MiB",
    "max_context": 256,
    "compile_backend": "eager",  # what its graphs are made of is for test_families.py
}
# Padded whatever the stand-in's times say.
PADS: dict[str, Any] = {"max_padding_ratio": 64, "decode_buckets": (1, 2, 4, 8, 17), "prefill_buckets": (4, 8, 16, 32)}
PROMPTS = families.prompts_of((5, 40, 1, 17, 33, 12, 64, 2))
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"logprobs": 0},
    {"temperature": 0.8, "top_k": 20, "logprobs": 3},
    {"temperature": 1.1, "top_p": 0.8, "min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7},
    {"temperature": 1.0, "repetition_penalty": 0.8, "logit_bias": {5: 4.0, 9: float("-inf")}},
    {"min_new_tokens": 3, "stop_token_ids": [3, 4, 5, 6, 7, 8], "temperature": 1.5},
]


def mixed(count: int, new_tokens: int = 12) -> list[SamplingParams]:
    """Requests of every kind."""
    return [
        SamplingParams(max_new_tokens=new_tokens, seed=i, ignore_eos=True, **KINDS[i % len(KINDS)])
        for i in range(count)
    ]


@contextmanager
def loaded(path: Path, mode: str = "graph", **fields: Any) -> Iterator[Engine]:
    """An engine; at the end nothing is in use."""
    with Engine.load(path, mode=mode, **SETTINGS | (PADS if mode in ("graph", "hybrid") else {}) | fields) as engine:
        yield engine
        if not engine.closed:
            stats = engine.stats()
            assert (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)
            assert len(engine._loop.scheduler._free_slots) == engine.config.max_batch


def tokens_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    assert [str(c.error) for c in completions if c.error is not None] == []
    return [completion.token_ids for completion in completions]


def check_logprobs(ours: list[Completion], theirs: list[Completion]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.logprobs or (), other.logprobs or (), strict=True):
            assert a.token_id == b.token_id
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
            assert [value for _, value in a.top] == pytest.approx([value for _, value in b.top], abs=1e-4)


@contextmanager
def warned(match: str) -> Iterator[list[warnings.WarningMessage]]:
    """The runtime warnings that come meanwhile: at least one, and all of this kind."""
    found: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [warning for warning in caught if warning.category is RuntimeWarning]
    assert found
    assert [str(warning.message) for warning in found if not re.search(match, str(warning.message))] == []


def settle(engine: Engine) -> None:
    """Record everything that is wanted."""
    while engine._runner.graphs.pending:
        engine.idle()


class Faulty(StandInRecorder):
    """The stand-in, with replays and recordings of the test's own."""

    def __init__(
        self,
        *,
        record: Callable[[GraphKey], None] = lambda key: None,
        replay: Callable[[GraphKey, Callable[[], None]], None] = lambda key, step: step(),
        seconds: Callable[[GraphKey], float] = lambda key: 0.0,
        size: int = 0,
    ) -> None:
        """`record` is called before a step is recorded, `replay` instead of it being replayed."""
        self._before = record
        self._replay = replay
        self._seconds = seconds
        self._size = size
        self.recorded: list[GraphKey] = []
        self.released: list[GraphKey] = []

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        self._before(key)
        recorded = super().record(key, step, known)
        self.recorded.append(key)

        def replay() -> None:
            assert key not in self.released or self.recorded.count(key) > self.released.count(key)
            self._replay(key, step)

        return replace(
            recorded,
            replay=replay,
            release=lambda: self.released.append(key),
            seconds=self._seconds(key),
            plain_seconds=1.0,
            bytes=self._size,
        )


def use(monkeypatch: pytest.MonkeyPatch, recorder: Faulty) -> Faulty:
    monkeypatch.setattr(plan, "StandInRecorder", lambda: recorder)
    return recorder
