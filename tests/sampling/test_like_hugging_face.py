"""Every option of a generation_config against the processors that transformers makes of it, on random logits."""

from __future__ import annotations

import random
from typing import Any

import families
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from hybridgen.errors import SamplingError
from hybridgen.params import SamplingParams
from hybridgen.sampling import ResolvedSampling, SamplerState, resolve, sample
from hybridgen.sampling.sampler import process, truncate

VOCAB = 60
EOS = (2, 5)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return families.build("llama")


def random_config(rng: random.Random, text: list[int]) -> dict[str, Any]:
    """Options of a generation_config, about half of them set, of which many touch this text."""

    def ids(count: int) -> list[int]:
        return rng.sample(range(6, VOCAB), count)

    def sequence() -> list[int]:
        length = rng.randint(1, 4)
        start = text[len(text) - length + 1 :] if rng.random() < 0.6 and length <= len(text) else ids(length - 1)
        return [*start, rng.randrange(VOCAB)]

    options: dict[str, Any] = {
        "sequence_bias": [[list(ids), rng.uniform(-5, 5)] for ids in {tuple(sequence()) for _ in range(6)}],
        "repetition_penalty": rng.choice([1.3, 0.7]),
        "no_repeat_ngram_size": rng.choice([1, 2, 2, 3, 5, 40]),
        "bad_words_ids": [sequence() for _ in range(4)] + [[EOS[0]]],
        "min_length": rng.choice([len(text), len(text) + 1, 30]),
        "min_new_tokens": rng.choice([1, 3, 9]),
        "forced_bos_token_id": 7,
        "forced_eos_token_id": rng.choice([2, 0, [5, 11, 12]]),
        "suppress_tokens": [*rng.sample(range(12, VOCAB), 3), 11, VOCAB + 9],
        "begin_suppress_tokens": ids(4),
        "do_sample": True,
        "temperature": rng.choice([0.4, 1.0, 1.7]),
        "top_k": rng.choice([0, 3, 40]),
        "top_p": rng.choice([0.5, 0.95]),
        "min_p": rng.choice([0.02, 0.2]),
        "typical_p": rng.choice([0.2, 0.6, 0.95]),
        "epsilon_cutoff": rng.choice([3e-3, 0.05, 0.9]),
        "eta_cutoff": rng.choice([3e-3, 0.3]),
    }
    chosen = {name: value for name, value in options.items() if rng.random() < 0.5}
    chosen.setdefault("top_k", 0)  # where transformers has 50
    return chosen


def theirs(
    model: PreTrainedModel,
    options: dict[str, Any],
    prompt: list[int],
    output: list[int],
    limit: int,
    logits: torch.Tensor,
) -> torch.Tensor:
    """What transformers' own list of processors makes of one row of logits; float32 [V]."""
    defaults = {"min_length": 0, "num_beams": 1}
    config = GenerationConfig(**(defaults | options | {"max_length": len(prompt) + limit}))
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + len(prompt)  # as `_prepare_generated_length` does
    config._eos_token_tensor = torch.tensor(EOS)
    processors = model._get_logits_processor(
        generation_config=config, input_ids_seq_length=len(prompt), device="cpu", model_kwargs={}
    )
    return processors(torch.tensor([[*prompt, *output]]), logits[None].clone())[0]


def random_batch(
    model: PreTrainedModel, seed: int, rows: int
) -> tuple[list[ResolvedSampling], SamplerState, tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """Requests of different options in one batch, their state, a step's inputs, and what transformers makes of it."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, VOCAB, generator=generator) * rng.choice([1, 3])
    state = SamplerState(rows, VOCAB, "cpu", max_context=64)
    requests, expected, lengths, generated = [], [], [], []
    for row in range(rows):
        prompt = rng.choices(range(6, 12), k=rng.choice([1, 1, 2, 9, 20]))  # few ids, so that n-grams repeat
        output = rng.choices(range(6, 12), k=rng.choice([0, 0, 1, 5]))
        limit = len(output) + rng.choice([1, 1, 4])
        options = random_config(rng, [*prompt, *output])
        request = resolve(SamplingParams(max_new_tokens=limit), GenerationConfig(**options), EOS, VOCAB, len(prompt))
        state.assign(row, request, prompt, output)
        expected.append(theirs(model, options, prompt, output, limit, logits[row]))
        requests.append(request)
        lengths.append(len(prompt) + len(output))
        generated.append(len(output))
    inputs = torch.arange(rows), torch.tensor(lengths), torch.tensor(generated)
    return requests, state, inputs, logits, torch.stack(expected)


@pytest.mark.parametrize("seed", range(60))
def test_log_probabilities_are_those_of_transformers(model: PreTrainedModel, seed: int) -> None:
    rows = 10
    requests, state, inputs, logits, expected = random_batch(model, seed, rows)
    slots, lengths, generated = inputs
    plan = state.needs(range(rows))
    before = logits.clone()
    scores = process(logits, state, slots, lengths, generated, plan)
    assert torch.equal(logits, before)
    scaled = truncate(scores, state, slots, plan)
    for row, request in enumerate(requests):
        ours = scores[row] if request.greedy else scaled[row]
        assert torch.equal(ours.isfinite(), expected[row].isfinite()), request
        # Ours are shifted where they are tempered, which changes no probability.
        torch.testing.assert_close(ours.log_softmax(-1), expected[row].log_softmax(-1), rtol=1e-4, atol=1e-4)
        if request.greedy:
            torch.testing.assert_close(ours, expected[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(60, 80))
def test_a_row_is_the_same_alone_and_in_a_batch(model: PreTrainedModel, seed: int) -> None:
    rows = 6
    _, state, (slots, lengths, generated), logits, expected = random_batch(model, seed, rows)
    together = sample(logits, state, slots, lengths, generated, state.needs(range(rows))).tokens
    for row in range(rows):
        one = slice(row, row + 1)
        alone = sample(logits[one], state, slots[one], lengths[one], generated[one], state.needs([row])).tokens
        assert alone.item() == together[row].item()
        if together[row] >= 0:
            assert expected[row, together[row]] > -torch.inf


def test_the_model_and_the_caller_say_it_alike() -> None:
    """What a generation_config says and what `SamplingParams` says give the same request."""
    options: dict[str, Any] = {
        "sequence_bias": [[[3, 4], 1.5], [[9], -2.0]],
        "bad_words_ids": [[4, 5], [6], [2]],
        "suppress_tokens": [11],
        "begin_suppress_tokens": [8],
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 0,
        "min_new_tokens": 2,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.02,
        "temperature": 0.7,
    }
    params = SamplingParams(max_new_tokens=9, seed=1, **options)
    said = resolve(params, None, EOS, VOCAB, 1)
    model_says = GenerationConfig(do_sample=True, **options)
    assert resolve(SamplingParams(max_new_tokens=9, seed=1), model_says, EOS, VOCAB, 1) == said
    assert said.sequence_bias == (((3, 4), 1.5), ((4, 5), -torch.inf))
    assert dict(said.logit_bias) == {9: -2.0, 6: -torch.inf, 11: -torch.inf}  # 2 ends texts, so it stays
    assert (said.forced_first, said.forced_last, said.begin) == ((7,), (0,), 1)
    none = {"sequence_bias": [], "bad_words_ids": [], "suppress_tokens": [], "begin_suppress_tokens": []}
    off = SamplingParams(
        max_new_tokens=9, seed=1, no_repeat_ngram_size=0, forced_bos_token_id=[], forced_eos_token_id=[],
        min_new_tokens=0, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0, temperature=0.7, **none,
    )  # fmt: skip
    assert resolve(off, model_says, EOS, VOCAB, 1) == resolve(off, None, EOS, VOCAB, 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bad_words_ids": [[1, VOCAB]]}, ["bad_words_ids", "[60]"]),
        ({"sequence_bias": {(VOCAB, 1): 1.0}}, ["sequence_bias", "[60]"]),
        ({"suppress_tokens": [VOCAB]}, ["suppress_tokens", "[60]"]),
        ({"forced_eos_token_id": 3, "suppress_tokens": [3]}, ["forced_eos_token_id", "suppress_tokens"]),
        ({"bad_words_ids": [[1, 2]] * 5000}, ["10000 tokens", "8192"]),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SamplingError) as caught:
        resolve(SamplingParams(**fields), None, EOS, VOCAB)
    for word in words:
        assert word in str(caught.value)
