"""Functions that requests bring: those of transformers give its tokens, in every mode, and disturb nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

import hybridgen
from hybridgen import Engine, FinishReason, SamplingParams
from hybridgen.serving.unix.messages import sampling_from_wire, sampling_to_wire

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
PROMPTS = families.prompts_of((40, 9, 60, 17))
NEW = 16


class Shift(LogitsProcessor):
    """Favours ids by the sum of those so far: it depends on every one of them."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        favoured = input_ids.sum(-1, keepdim=True) % scores.shape[-1]
        return scores.scatter_add(-1, favoured, torch.full_like(favoured, 30, dtype=scores.dtype))


def shift(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    logits[ids.sum() % len(logits)] += 30  # in place
    return logits


def by_transformers(model: Any, prompt: list[int], **fields: Any) -> list[int]:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | fields
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return families.build("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("own"), num_hidden_layers=2)


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        yield engine
        stats = engine.stats()
        assert (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["mode"])
def test_tokens_are_those_of_transformers(mode: dict[str, Any], path: Path, model: Any) -> None:
    """Rows with functions beside rows without, greedy and drawn; the latter get what they get alone."""
    lists = [
        [Shift()],
        LogitsProcessorList([NoRepeatNGramLogitsProcessor(2), RepetitionPenaltyLogitsProcessor(1.7)]),
        [shift],
        (),
    ]
    theirs = [
        by_transformers(model, prompt, logits_processor=LogitsProcessorList([Shift()] if own == [shift] else own))
        for prompt, own in zip(PROMPTS, lists, strict=True)
    ]
    drawn = SamplingParams(max_new_tokens=NEW, temperature=1.0, top_p=0.9, seed=7)
    with Engine.load(path, **mode, **SETTINGS) as engine:
        alone = engine.generate(PROMPTS[0], drawn).token_ids
        params = [SamplingParams(max_new_tokens=NEW, logits_processors=own) for own in lists]
        for _ in range(2):
            *outs, other = engine.generate([*PROMPTS, PROMPTS[0]], [*params, drawn])
            assert [list(out.token_ids) for out in outs] == theirs
            assert other.token_ids == alone
        if mode["mode"] in ("graph", "hybrid"):
            kinds = {step.kind for out in outs for step in out.steps if step.phase == "decode"}
            assert "layers, stand-in" in kinds
            assert any("sampler outside" in step.reason or "bucket" in step.reason for step in outs[0].steps)
        assert not engine.stats().fallbacks


def test_they_come_behind_other_processors_and_before_temperature(engine: Engine, model: Any) -> None:
    seen: list[torch.Tensor] = []

    def look(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert ids.dtype == torch.int64
        assert ids.tolist() == PROMPTS[1] + out_so_far
        seen.append(logits.clone())
        out_so_far.append(5)
        return torch.where(torch.arange(len(logits)) == 5, 0.0, -torch.inf)

    out_so_far: list[int] = []
    fields = {"suppress_tokens": [3], "temperature": 0.5, "seed": 1, "max_new_tokens": 3, "logprobs": 0}
    out = engine.generate(PROMPTS[1], logits_processors=[look], logprobs_of="sampled", **fields)
    assert out.token_ids == (5, 5, 5)
    assert [entry.logprob for entry in out.logprobs] == [0.0, 0.0, 0.0]
    raw = model(input_ids=torch.tensor([PROMPTS[1]]), use_cache=False).logits[0, -1].detach()
    assert seen[0][3] == -torch.inf
    assert torch.allclose(seen[0][4:], raw[4:], atol=1e-4)  # not tempered yet


def test_the_model_s_log_probabilities_are_from_before(engine: Engine) -> None:
    plain = engine.generate(PROMPTS[0], max_new_tokens=1, logprobs=1).logprobs[0]
    pushed = engine.generate(PROMPTS[0], max_new_tokens=1, logprobs=1, logits_processors=[shift]).logprobs[0]
    assert pushed.token_id != plain.token_id
    assert pushed.top[0] == pytest.approx(plain.top[0], abs=1e-5)


def test_choices_scores_and_chunks(engine: Engine, model: Any) -> None:
    prompt = PROMPTS[2] + PROMPTS[0]  # longer than a call's tokens
    theirs = by_transformers(model, prompt, logits_processor=LogitsProcessorList([Shift()]))
    out = engine.generate(prompt, logits_processors=[Shift()], max_new_tokens=NEW, prompt_logprobs=0)
    assert list(out.token_ids) == theirs
    assert len(out.prompt_logprobs) == len(prompt)
    out = engine.generate(prompt, logits_processors=[Shift()], n=3, temperature=1.0, seed=4, max_new_tokens=5)
    alone = [engine.generate(prompt, logits_processors=[Shift()], temperature=1.0, seed=c.seed, max_new_tokens=5)
             for c in out.choices]  # fmt: skip
    assert [c.token_ids for c in out.choices] == [c.token_ids for c in alone]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda ids, logits: 1 / 0, "ZeroDivisionError"),
        (lambda ids, logits: None, "it returned None; return the logits"),
        (lambda ids, logits: logits[:5], r"it returned float32 \[5\]; return floats \[257\]"),
        (lambda ids, logits: logits.long(), r"it returned int64 \[257\]"),
        (lambda ids, logits: logits if len(ids) < 42 else logits[:1], r"it returned float32 \[1\]"),
    ],
)
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_one_that_fails_fails_its_request_alone(function: Any, message: str, run_ahead: int, path: Path) -> None:
    with Engine.load(path, mode="graph", run_ahead=run_ahead, **SETTINGS) as engine:
        expected = engine.generate(PROMPTS[1], max_new_tokens=8).token_ids
        params = [SamplingParams(max_new_tokens=8, logits_processors=[function]), SamplingParams(max_new_tokens=8)]
        bad, good = engine.generate([PROMPTS[0], PROMPTS[1]], params)
        assert good.token_ids == expected
        assert isinstance(bad.error, hybridgen.RequestError)
        with pytest.raises(hybridgen.RequestError, match=message):
            raise bad.error
        assert engine.generate(PROMPTS[1], max_new_tokens=8).token_ids == expected


def test_all_banned_is_an_error_as_ever(engine: Engine) -> None:
    with pytest.raises(hybridgen.RequestError, match="no token that may be chosen"):
        engine.generate(PROMPTS[0], logits_processors=[lambda ids, logits: torch.full_like(logits, -torch.inf)])


def test_stopping_criteria_end_a_request(engine: Engine, model: Any) -> None:
    plain = engine.generate(PROMPTS[0], max_new_tokens=NEW).token_ids
    out = engine.generate(
        PROMPTS[0], max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(45)])
    )
    assert out.token_ids == plain[:5]
    assert out.finish_reason is FinishReason.STOP
    assert out.stop_match is None
    end = plain[6]
    first = plain.index(end) + 1
    criteria = [EosTokenCriteria(end), lambda ids, scores: False]
    assert engine.generate(PROMPTS[0], max_new_tokens=NEW, stopping_criteria=criteria).token_ids == plain[:first]
    seen: list[Any] = []
    events = engine.stream(
        PROMPTS[0], max_new_tokens=NEW, stopping_criteria=[lambda ids, s: seen.append(ids) or len(seen) == 3]
    )
    assert [event.token_id for event in events] == list(plain[:3])
    assert [ids.tolist() for ids in seen] == [[PROMPTS[0] + list(plain[:n])] for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("criterion", "message"),
    [(lambda ids, scores: 3, "returned 3; return True or False"), (lambda ids, s: 1 / 0, "ZeroDiv")],
)
def test_a_criterion_that_fails_fails_its_request(criterion: Any, message: str, engine: Engine) -> None:
    bad, good = engine.generate(
        PROMPTS[:2],
        [SamplingParams(max_new_tokens=4, stopping_criteria=[criterion]), SamplingParams(max_new_tokens=4)],
    )
    assert len(good.token_ids) == 4
    with pytest.raises(hybridgen.RequestError, match=message):
        raise bad.error


def test_what_is_no_function_is_refused() -> None:
    for fields, message in (
        ({"logits_processors": [5]}, "logits_processors holds 5"),
        ({"stopping_criteria": ["x"]}, "stopping_criteria holds 'x'"),
        ({"logits_processors": shift}, "is not a list"),
        ({"logits_processors": None}, "is not a list"),
    ):
        with pytest.raises(hybridgen.SamplingError, match=message):
            SamplingParams(**fields)
    with pytest.raises(hybridgen.SamplingError, match="cannot be sent to a server"):
        sampling_to_wire(SamplingParams(logits_processors=[shift]))
    with pytest.raises(hybridgen.SamplingError, match="logits_processors holds 'x'"):
        sampling_from_wire({"logits_processors": ["x"]})
