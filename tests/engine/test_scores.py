"""Scores of prompts and completions: those of transformers' forward, in every mode, whatever the chunks and cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import Engine, FinishReason, SamplingParams

SETTINGS: dict[str, Any] = {
    "max_batch": 4,
    "page_size": 8,
    "token_budget": 48,
    "kv_memory": "16MiB",
    "max_context": 256,
    "device": "cpu",
    "progress": False,
    "decode_buckets": (2, 4),
    "prefill_buckets": (16, 48),
}
MODES: list[dict[str, Any]] = [
    {"mode": "eager"},
    {"mode": "jit", "compile_backend": "eager", "run_ahead": 1},
    {"mode": "graph", "run_ahead": 1},
    {"mode": "hybrid", "compile_backend": "eager"},
]
A, B, C = families.prompts_of((70, 33, 9))
PAIRS = [(A, B), (A, C), (B[:1], A), (C, B), (A + B, C), (A[:40], [5]), (A, B), (C, A + B + A)]
"""Equal ones, ones that begin alike, longer and shorter than a call's tokens, one token before and one behind."""


def reference(model: Any, prompt: list[int], completion: list[int]) -> tuple[list[float], list[bool]]:
    """By one forward pass of transformers."""
    ids = torch.tensor([prompt + completion])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    targets = torch.tensor(completion)
    found = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return found.tolist(), (logits.argmax(-1) == targets).tolist()


def check(score: hybridgen.Score, model: Any, prompt: list[int], completion: list[int]) -> None:
    logprobs, greedy = reference(model, prompt, completion)
    assert score.token_ids == tuple(completion)
    assert score.prompt_token_ids == tuple(prompt)
    assert score.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert list(score.is_greedy) == greedy
    assert score.sum == pytest.approx(sum(logprobs), abs=1e-3)
    assert score.perplexity == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-4)
    assert score.error is None


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("scores"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return families.build("llama", num_hidden_layers=2)


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        yield engine
        stats = engine.stats()
        assert (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)


@pytest.mark.parametrize(
    ("family", "mode"),
    [("llama", mode) for mode in MODES]
    + [(family, MODES[0]) for family in ("gemma2", "cohere", "gpt2", "llama4_text", "qwen3_moe", "mistral")]
    + [pytest.param("gemma2", MODES[3], marks=pytest.mark.slow)],
    ids=lambda value: value["mode"] if isinstance(value, dict) else value,
)
def test_they_are_those_of_a_forward_pass(family: str, mode: dict[str, Any], tmp_path: Path) -> None:
    """Soft caps, scaled logits, windows, chunks and experts; cold, and again with what the prefix cache has."""
    depth = families.depth(family)
    path, model = families.write(family, tmp_path, **depth), families.build(family, **depth)
    with Engine.load(path, **mode, **SETTINGS) as engine:
        for call in range(2):
            scores = engine.score([pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS])
            for place, (score, pair) in enumerate(zip(scores, PAIRS, strict=True)):
                check(score, model, *pair)
                assert {step.reason for step in score.steps} <= {"it scores prompts"} | reasons(engine)
                if pair in PAIRS[:place]:  # it is the same request
                    assert score.cached_tokens == len(pair[0] + pair[1]) - 1
                elif call:
                    assert score.cached_tokens == (len(pair[0]) - 1) // 8 * 8
        assert not engine.stats().fallbacks


def reasons(engine: Engine) -> set[str]:
    """Of all prefill calls: a call without a scored position runs as any other."""
    return {reason for phase, _, reason in engine.stats().steps if phase == "prefill"}


@pytest.mark.parametrize("budget", [1, 3, 7])
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_call_scores_no_more_than_it_may(
    budget: int, run_ahead: int, path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many positions there are, the head sees so many at once."""
    seen: list[int] = []
    from hybridgen.execution import runner, scoring

    real = scoring.ScoredTokens.take
    monkeypatch.setattr(runner, "score_budget", lambda vocab, dtype: budget)
    monkeypatch.setattr(
        scoring.ScoredTokens, "take", lambda self, logits: seen.append(logits.shape[0]) or real(self, logits)
    )
    with Engine.load(path, mode="eager", run_ahead=run_ahead, **SETTINGS) as engine:
        pairs = [pair for place, pair in enumerate(PAIRS) if pair not in PAIRS[:place]]
        for score, pair in zip(engine.score(*map(list, zip(*pairs, strict=True))), pairs, strict=True):
            check(score, model, *pair)
        out = engine.generate(A, prompt_logprobs=0, max_new_tokens=3, ignore_eos=True)
    assert max(seen) <= budget
    assert len(out.token_ids) == 3
    logprobs, _ = reference(model, A[:1], A[1:])
    assert [item.logprob for item in out.prompt_logprobs[1:]] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("budget", [1, 3, 17, None])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["mode"])
def test_prompts_that_differ_in_their_last_token_are_one_request(
    mode: dict[str, Any], budget: int | None, path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers behind a question, more of them than a request takes, and others between them."""
    if budget is not None:
        from hybridgen.execution import runner

        monkeypatch.setattr(runner, "score_budget", lambda vocab, dtype: budget)
    pairs = [(A, [token]) for token in range(5, 25)] + [(A, B), (A, [*B[:-1], 7]), (C, [5]), (A[:-1], [A[-1], 9])]
    pairs = pairs[::2] + pairs[1::2]
    with Engine.load(path, **mode, **SETTINGS | {"token_budget": 48}) as engine:
        scores = engine.score(*map(list, zip(*pairs, strict=True)))
        stats = engine.stats()
        for score, pair in zip(scores, pairs, strict=True):
            check(score, model, *pair)
        # Of 20 answers 16 are one request; the answer whose question has its first token is of another one.
        assert stats.requests["submitted"] == 2 + 1 + 1 + 1
        assert stats.tokens["scored"] == sum(len(completion) for _, completion in pairs) - len(B) + 1
        salted = engine.score([A, A], [[5], [6]], cache_salt="other")
        assert [score.cached_tokens for score in salted] == [0, len(A)]


def test_alternatives_of_a_request_that_fails_fail_with_it(
    engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridgen.execution import runner

    real = runner.ModelRunner.prefill

    def broken(self: Any, chunks: Any, *args: Any, **more: Any) -> Any:
        if any(chunk.others for chunk in chunks):
            raise RuntimeError("broken")
        return real(self, chunks, *args, **more)

    monkeypatch.setattr(runner.ModelRunner, "prefill", broken)
    scores = engine.score([A, A, C], [[5], [6], [7]])
    assert ["broken" in str(score.error) for score in scores[:2]] == [True, True]
    assert [score.token_ids for score in scores] == [(5,), (6,), (7,)]
    check(engine.score(C, [7]), model, C, [7])


def test_a_budget_never_lets_a_page_be_read_before_it_is_written(
    path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is cut short by the scores that a call may tell; the second shares its pages."""
    from test_prefix_cache import poison

    from hybridgen.execution import runner

    monkeypatch.setattr(runner, "score_budget", lambda vocab, dtype: 5)
    with Engine.load(path, mode="eager", **SETTINGS | {"token_budget": 200}) as engine:
        poison(engine, monkeypatch)
        pairs = [(A[:10], A[10:] + B), (A + B, C), (A + B[:20], C)]
        for score, pair in zip(engine.score(*map(list, zip(*pairs, strict=True))), pairs, strict=True):
            check(score, model, *pair)


def test_one_alone_one_prompt_for_all_and_all_of_a_prompt(engine: Engine, model: Any) -> None:
    check(engine.score(A, B), model, A, B)
    for score, completion in zip(engine.score(A, [B, C, [7]]), (B, C, [7]), strict=True):
        check(score, model, A, completion)
    check(engine.score(A), model, A[:1], A[1:])
    for score, prompt in zip(engine.score([A, B]), (A, B), strict=True):
        check(score, model, prompt[:1], prompt[1:])
    check(engine.score(torch.tensor(A), torch.tensor(B)), model, A, B)
    check(hybridgen.score(engine, A, B), model, A, B)


def test_prompts_are_scored_while_others_generate(engine: Engine, model: Any) -> None:
    alone = engine.generate(B, max_new_tokens=20, ignore_eos=True).token_ids
    params = [
        SamplingParams(max_new_tokens=20, ignore_eos=True),
        SamplingParams(max_new_tokens=0, prompt_logprobs=3),
        SamplingParams(max_new_tokens=4, prompt_logprobs=2, logprobs=1, ignore_eos=True),
        SamplingParams(max_new_tokens=1, prompt_logprobs=0),
    ]
    plain, scored, both, one = engine.generate([B, A, A, [3]], params)
    assert plain.token_ids == alone
    assert plain.prompt_logprobs is None
    assert scored.token_ids == ()
    assert scored.finish_reason is FinishReason.LENGTH
    assert scored.timing.ttft is None
    logits = model(input_ids=torch.tensor([A]), use_cache=False).logits[0].detach().log_softmax(-1)
    for out, k in ((scored, 3), (both, 2)):
        assert out.prompt_logprobs[0] is None
        assert len(out.prompt_logprobs) == len(A)
        for position, item in enumerate(out.prompt_logprobs[1:]):
            assert item.token_id == A[position + 1]
            assert item.logprob == pytest.approx(float(logits[position, item.token_id]), abs=1e-4)
            top = logits[position].topk(k)
            assert [token for token, _ in item.top] == top.indices.tolist()
            assert [value for _, value in item.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert both.token_ids == engine.generate(A, max_new_tokens=4, ignore_eos=True).token_ids
    assert len(both.logprobs) == 4
    assert one.prompt_logprobs == (None,)
    assert len(one.token_ids) == 1


def test_a_longrope_prompt_is_scored_by_its_whole_length(tmp_path: Path) -> None:
    family, changes = families.ROPE_VARIANTS["longrope"]
    path, model = families.write(family, tmp_path, **changes), families.build(family, **changes)
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        for length in (79, 80, 81, 120):
            [prompt] = families.prompts_of((length,), seed=length)
            check(engine.score(prompt), model, prompt[:1], prompt[1:])
        out = engine.generate(A + C[:5], prompt_logprobs=0, max_new_tokens=20, ignore_eos=True)
        assert len(out.prompt_logprobs) == 75
        assert len(out.token_ids) == 20


def test_cached_positions_are_not_computed(engine: Engine) -> None:
    engine.score(A, B)
    before = engine.stats().tokens["prompt"]
    scores = engine.score(A, [[1], [2], [3], [4]])
    assert [score.cached_tokens for score in scores] == [64, 70, 70, 70]
    assert engine.stats().tokens["prompt"] - before == 6
    assert engine.score(A, B, cache_salt="other").cached_tokens == 0
    assert engine.generate(A + B, max_new_tokens=1).cached_tokens == 96  # what was scored serves what generates
    assert engine.stats().tokens["scored"] == 33 + 4 + 33


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (A, [], "empty"),
        (A, "x", "token ids and its completion"),
        ([A, B], [C], r"1 completion\(s\) for 2 prompt\(s\)"),
        ([A, B], C, r"a completion\(s\) for 2"),
        (A, [[]], "has no tokens"),
        (A, [""], "empty completion"),
        (A, [[999]], "outside the vocabulary"),
        ([[999]], [C], "outside the vocabulary"),
        (A, [{"role": "user"}], "not a prompt|completion"),
        ([5], None, "has one token"),
        (A, [B * 6], "over the context of 256"),
        (A, torch.zeros(1, 3), "integer ids"),
        (A, 5, "not a prompt"),
        ([{"completion": A}], None, "give 'prompt' and 'completion'"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_runs(
    prompts: Any, completions: Any, message: str, engine: Engine
) -> None:
    with pytest.raises(hybridgen.PromptError, match=message):
        engine.score(prompts, completions)
    assert not engine.stats().steps


def test_wrong_fields_are_refused(engine: Engine) -> None:
    for fields, message in (
        ({"max_new_tokens": 0}, "generates nothing"),
        ({"prompt_logprobs": -1}, "out of range"),
        ({"prompt_logprobs": 65}, "out of range"),
        ({"prompt_logprobs": 1, "n": 2, "temperature": 1.0}, "would score the prompt n times"),
    ):
        with pytest.raises(hybridgen.SamplingError, match=message):
            engine.generate(A, **fields)
    with pytest.raises(hybridgen.PromptError, match="has a completion to score"):
        engine.generate([{"prompt": A, "completion": B}])
    with pytest.raises(hybridgen.ConfigError, match="modus"):
        hybridgen.score(engine, A, B, modus="eager")
    with pytest.raises(hybridgen.PromptError, match="no prompts"):
        hybridgen.score(engine)


def test_a_prompt_is_cut_before_its_completion_alone(engine: Engine, model: Any) -> None:
    fields = {"max_new_tokens": 0, "prompt_logprobs": 1}
    [out] = engine.generate([{"prompt": A, "completion": C}], truncate_prompt=len(C) + 20, **fields)
    check(hybridgen.Score.of(out), model, A[-20:], C)
    with pytest.raises(hybridgen.PromptError, match="70 tokens before its completion and truncate_prompt cuts 70"):
        engine.generate([{"prompt": A, "completion": C}], truncate_prompt=len(C), **fields)


def test_a_failed_call_fails_its_request_alone(engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridgen.execution import scoring

    real = scoring.token_logprobs

    def fails(logits: torch.Tensor, targets: torch.Tensor, k: int) -> Any:
        if 77 in targets.tolist():
            raise RuntimeError("out of luck")
        return real(logits, targets, k)

    monkeypatch.setattr(scoring, "token_logprobs", fails)
    good, bad = engine.score([B, C], [C, [77]])
    check(good, model, B, C)
    assert isinstance(bad.error, hybridgen.RequestError)
    assert (bad.logprobs, bad.token_ids) == ((), (77,))
    assert math.isnan(bad.sum)
    assert math.isnan(bad.perplexity)
    with pytest.raises(hybridgen.RequestError, match="out of luck"):
        engine.score(C, [77])


def test_nan_is_an_error_and_no_score(tmp_path: Path) -> None:
    broken = families.build("llama", num_hidden_layers=2)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with Engine.load(broken, mode="eager", **SETTINGS) as engine, pytest.raises(hybridgen.RequestError, match="NaN"):
        engine.score(A, B)


def test_texts_are_encoded_together() -> None:
    with Engine.load(None, mode="eager", dtype="float32", kv_memory="32MiB", max_batch=4) as engine:
        prompt, completion = "def f(a, b):\n    return", " a + b"
        whole = tuple(engine.tokenizer(prompt + completion)["input_ids"])
        score = engine.score(prompt, completion)
        assert score.prompt_token_ids + score.token_ids == whole
        assert score.prompt_token_ids == tuple(engine.tokenizer(prompt)["input_ids"])
        ids = engine.score(list(score.prompt_token_ids), list(score.token_ids))
        assert ids.logprobs == pytest.approx(score.logprobs, abs=1e-4)
        with pytest.raises(hybridgen.PromptError, match="joins the end of the prompt"):
            joined = next(
                (text[:cut], text[cut:])
                for text in ("def function(argument):\n    return argument",)
                for cut in range(1, len(text))
                if tuple(engine.tokenizer(text)["input_ids"])[: len(engine.tokenizer(text[:cut])["input_ids"])]
                != tuple(engine.tokenizer(text[:cut])["input_ids"])
            )
            engine.score(*joined)
