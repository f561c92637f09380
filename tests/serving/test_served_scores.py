"""Scores from a server: those of an engine in this process."""

from __future__ import annotations

import asyncio

import pytest
from wire import Process

import hybridgen

PROMPT, ENDS = "def f(a, b):\n    return", [" a + b", " a", " None\n"]


def test_scores_are_those_of_the_engine(demo: Process, engine: hybridgen.Engine) -> None:
    ids = engine.tokenizer(PROMPT)["input_ids"]
    with demo.client() as client:
        one, many = client.score(PROMPT, ENDS[0]), client.score(PROMPT, ENDS)
        by_ids, whole = client.score([ids, ids], [[5], [6, 7]]), client.score(PROMPT)
        assert hybridgen.score(f"unix:{client.path}", PROMPT, ENDS[0]).logprobs == one.logprobs
    expected = engine.score(PROMPT, ENDS)
    for ours, theirs in zip([one, *many], [expected[0], *expected], strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert ours.is_greedy == theirs.is_greedy
        assert ours.prompt_token_ids == tuple(ids)
    assert [score.token_ids for score in by_ids] == [(5,), (6, 7)]
    assert whole.logprobs == pytest.approx(engine.score(PROMPT).logprobs, abs=1e-5)


def test_an_asynchronous_client_scores_too(demo: Process, engine: hybridgen.Engine) -> None:
    async def run(path: object) -> hybridgen.Score:
        async with hybridgen.AsyncClient(path) as client:
            return await client.score(PROMPT, ENDS[0], cache_salt="me")

    with demo.client() as client:
        score = asyncio.run(run(client.path))
    assert score.logprobs == pytest.approx(engine.score(PROMPT, ENDS[0]).logprobs, abs=1e-5)


def test_prompt_logprobs_come_over_the_wire(demo: Process, engine: hybridgen.Engine) -> None:
    fields = {"prompt_logprobs": 2, "max_new_tokens": 2, "temperature": 0}
    with demo.client() as client:
        ours, theirs = client.generate(PROMPT, **fields), engine.generate(PROMPT, **fields)
    assert ours.prompt_logprobs[0] is None
    assert [item.token_id for item in ours.prompt_logprobs[1:]] == list(ours.prompt_token_ids[1:])
    for mine, other in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token for token, _ in mine.top] == [token for token, _ in other.top]
    assert ours.token_ids == theirs.token_ids


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (PROMPT, [""], "empty completion"),
        ([1, 2], "x", "both as ids"),
        ([[1], [2]], [[3]], "1 completion"),
        ([{"completion": [1]}], None, "give 'prompt' and 'completion'"),
        ([{"prompt": [1], "completion": {"a": 1}}], None, "give text"),
        ([{"prompt": [1], "completion": [10**6]}], None, "outside the vocabulary"),
        ([1], None, "has one token"),
        ([[1] * 3], [[2] * 100_000], "over the context"),
    ],
)
def test_what_is_wrong_is_told(prompt: object, completion: object, message: str, demo: Process) -> None:
    with demo.client() as client, pytest.raises(hybridgen.PromptError, match=message):
        client.score(prompt, completion)
