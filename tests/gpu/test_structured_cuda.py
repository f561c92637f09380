"""Rows with a grammar on a GPU: the forward in one graph, masks and sampler in another."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import torch

from hybridgen import Completion, Engine, SamplingParams

pytest.importorskip("llguidance")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPTS = ["def read(path):", "x =", "a", "import", "for", "class A", "0", "if"]
LONG = {"regex": "[a-z ]{40,90}", "max_new_tokens": 24}
BATCH = [
    SamplingParams(temperature=0.9, seed=3, max_new_tokens=24, logprobs=1),
    SamplingParams(json_schema=SCHEMA, temperature=1.5, seed=4, max_new_tokens=60, repetition_penalty=1.2, logprobs=2),
    SamplingParams(temperature=1.0, seed=5, no_repeat_ngram_size=2, **LONG),
    SamplingParams(temperature=0, min_new_tokens=6, logprobs=2, logprobs_of="sampled", **LONG),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=6, **LONG),
    SamplingParams(temperature=0, max_new_tokens=24),
    SamplingParams(temperature=1.0, min_p=0.01, seed=7, **LONG),
    SamplingParams(json_schema=SCHEMA, temperature=1.0, seed=8, max_new_tokens=60),
]
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_batch": 8, "max_context": 256, "kv_memory": "64MiB"}


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def run(engine: Engine) -> list[Completion]:
    outs = engine.generate(PROMPTS, BATCH)
    while engine.idle():
        pass
    return outs


def apart(outs: list[Completion]) -> int:
    """Steps whose masks and sampler were replayed."""
    return sum(step.count for out in outs for step in out.steps if "sampler recorded apart" in step.reason)


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    """By mode `eager`."""
    with Engine.load(mode="eager", device="cuda", **SETTINGS) as engine:
        outs = run(engine)
    for out in (outs[1], outs[7]):
        if out.finish_reason == "stop":
            jsonschema.validate(json.loads(out.text), SCHEMA)
    return [out.token_ids for out in outs]


@pytest.mark.parametrize(
    ("mode", "graphs"), [("graph", "manual"), ("hybrid", "manual"), ("hybrid", "both"), ("hybrid", "trees")]
)
def test_equal_tokens_before_and_behind_the_recording(expected: list[tuple[int, ...]], mode: str, graphs: str) -> None:
    with Engine.load(mode=mode, graphs=graphs, device="cuda", max_padding_ratio=9.0, **SETTINGS) as engine:
        for turn in range(3):
            outs = run(engine)
            assert [out.token_ids for out in outs] == expected
            if turn == 2 and graphs != "trees":
                assert apart(outs)
        stats = engine.stats()
        assert not stats.graphs.failures
        if graphs != "trees":
            rests = [graph for graph in stats.graphs.graphs if graph.executor == "sampler"]
            assert {graph.owner for graph in rests} == {"cuda graph"}


def test_checked_recordings(expected: list[tuple[int, ...]]) -> None:
    """The first replay of each is compared with the step, and every address at each replay."""
    options = {"validate": True, "check_addresses": True, "max_padding_ratio": 9.0}
    with Engine.load(mode="graph", device="cuda", **options, **SETTINGS) as engine:
        for _ in range(3):
            outs = run(engine)
            assert [out.token_ids for out in outs] == expected
        assert apart(outs)
        assert not engine.stats().fallbacks


def test_rows_without_a_grammar_keep_their_results_in_bf16() -> None:
    """The mix, recorded in full and in two, gives plain rows the same tokens and log-probabilities."""
    settings = SETTINGS | {"dtype": "bfloat16", "decode_buckets": [8], "max_padding_ratio": 9.0}
    plain = [SamplingParams(temperature=0.9, seed=row, max_new_tokens=32, logprobs=1) for row in range(8)]
    mixed = [SamplingParams(temperature=1.0, seed=5, **LONG) if row % 2 else plain[row] for row in range(8)]
    with Engine.load(mode="graph", device="cuda", **settings) as engine:
        for turn in range(3):
            alone = engine.generate(PROMPTS, plain)
            both = engine.generate(PROMPTS, mixed)
            while engine.idle():
                pass
            for row in range(0, 8, 2):
                assert both[row].token_ids == alone[row].token_ids
                assert both[row].logprobs == alone[row].logprobs
            if turn == 2:
                assert apart(both)


def test_a_drafter_beside_them(expected: list[tuple[int, ...]]) -> None:
    with Engine.load(mode="graph", device="cuda", speculation="ngram", max_padding_ratio=9.0, **SETTINGS) as engine:
        for _ in range(3):
            outs = run(engine)
            assert [out.token_ids for out in outs] == expected
        assert apart(outs)
