"""From arguments to requests: what fits, and sampling in every form."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig, Phi3Config

from hybridgen import ConfigError, EngineConfig, PromptError, SamplingError, SamplingParams
from hybridgen.arguments import sampling_list, sampling_per_prompt
from hybridgen.engine.output import RequestOutput
from hybridgen.engine.requests import Request, RequestState, collect, context_limit, make_requests
from hybridgen.loading import Checkpoint
from hybridgen.params import MAX_INT, choice_seed
from hybridgen.sampling import resolve


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return Checkpoint.open(None, EngineConfig(device="cpu"))


def make(checkpoint: Checkpoint, length: int, cache: int | None = None, **fields: Any) -> Request:
    return make_requests([[1] * length], None, fields, checkpoint, 200, cache)[0]


def test_a_default_gives_way_to_the_context(demo: Checkpoint) -> None:
    assert make(demo, 10).sampling.max_new_tokens == 128
    assert make(demo, 150).sampling.max_new_tokens == 50
    assert make(demo, 150, cache=160).sampling.max_new_tokens == 10
    assert make(demo, 150, min_new_tokens=50).sampling.min_new_tokens == 50


@pytest.mark.parametrize(("cache", "room", "knob"), [(None, 50, "max_context"), (160, 10, "kv_memory")])
def test_a_minimum_that_does_not_fit(demo: Checkpoint, cache: int | None, room: int, knob: str) -> None:
    with pytest.raises(PromptError) as caught:
        make(demo, 150, cache, min_new_tokens=room + 1)
    text = str(caught.value)
    assert text.startswith("prompt 0 has 150 tokens, so the ")
    assert f"room for {room} new ones, fewer than min_new_tokens={room + 1}" in text
    assert text.endswith(f"or raise {knob}")


def test_a_minimum_above_the_default(demo: Checkpoint) -> None:
    with pytest.raises(SamplingError, match="min_new_tokens=129 is above max_new_tokens=128"):
        make(demo, 10, min_new_tokens=129)


def test_a_number_that_does_not_fit_is_refused(demo: Checkpoint) -> None:
    with pytest.raises(PromptError, match="150 tokens and max_new_tokens=51: together 201, over the context of 200"):
        make(demo, 150, max_new_tokens=51)
    with pytest.raises(PromptError, match="more than the KV cache of 160"):
        make(demo, 150, 160, max_new_tokens=11)


def test_sampling_can_be_read_twice() -> None:
    one, two = SamplingParams(seed=1), SamplingParams(seed=2)
    assert sampling_list(None) is None
    assert sampling_list(one) is one
    for given in ([one, two], (one, two), iter([one, two]), (p for p in (one, two))):
        assert sampling_list(given) == [one, two]
    assert sampling_per_prompt(2, iter([one, two]), {}) == [one, two]
    assert sampling_per_prompt(2, one, {"seed": 3}) == [SamplingParams(seed=3)] * 2
    assert sampling_per_prompt(1, None, {}) == [SamplingParams()]


@pytest.mark.parametrize("sampling", ["greedy", b"greedy", 5, {"temperature": 1.0}, {}, SamplingParams, "x" * 1000])
def test_what_is_no_sampling(sampling: Any) -> None:
    with pytest.raises(SamplingError, match=r"sampling=.* is not a SamplingParams; give") as caught:
        sampling_per_prompt(1, sampling, {})
    assert len(str(caught.value)) < 210


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ([], "0 entries for 2"),
        ([SamplingParams()] * 3, "3 entries for 2"),
        ([SamplingParams(), "greedy"], "sampling holds 'greedy'"),
        ([SamplingParams(), None], "sampling holds None"),
    ],
)
def test_a_list_that_does_not_fit(sampling: Any, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        sampling_per_prompt(2, sampling, {})


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("limit", "scaling", "most"),
    [
        (128, None, 128),
        (128, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (512, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),  # multiplied already
        (128, {"type": "yarn", "factor": 4.0}, 512),
        (128, {"type": "linear", "factor": 2.5}, 320),
        (128, {"type": "dynamic", "factor": 2.0}, 256),
        (64, LLAMA3 | {"original_max_position_embeddings": 64}, 512),
        (4096, LLAMA3 | {"original_max_position_embeddings": 64}, 4096),  # Llama 3.1 goes beyond factor x original
        (64, LONGROPE | {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (256, LONGROPE | {"original_max_position_embeddings": 64}, 256),  # the factor follows from the limit
    ],
)
def test_contexts_of_scaled_rotary_models(demo: Checkpoint, limit: int, scaling: dict | None, most: int) -> None:
    config = LlamaConfig(
        max_position_embeddings=limit, rope_scaling=scaling, hidden_size=64, num_attention_heads=4, head_dim=16
    )
    checkpoint = replace(demo, hf_config=config, max_context=limit)
    assert context_limit(checkpoint, None) == limit
    assert context_limit(checkpoint, most) == most
    with pytest.raises(ConfigError, match=f"max_context={most + 1} is above the model's limit"):
        context_limit(checkpoint, most + 1)


def test_an_original_length_beside_the_rotary_parameters(demo: Checkpoint) -> None:
    config = Phi3Config(
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_scaling=LONGROPE | {"factor": 4.0},
        hidden_size=64,
        num_attention_heads=4,
    )
    checkpoint = replace(demo, hf_config=config, max_context=512)
    assert context_limit(checkpoint, 512) == 512
    with pytest.raises(ConfigError):
        context_limit(checkpoint, 513)


def test_choices_are_collected_by_prompt() -> None:
    requests = []
    for index, choice, token in ((0, 0, 70), (1, 0, 71), (1, 1, 72)):
        request = Request(array("i", [5]), resolve(SamplingParams(max_new_tokens=1), None, None, 100), index, choice)
        assert request.completion is None
        with pytest.raises(RuntimeError, match="before its end"):
            collect([request])
        request.output = RequestOutput(request.prompt_ids, request.sampling, None, index, choice)
        request.state = RequestState.RUNNING
        request.output.take([token], None, 0.0)
        requests.append(request)
    first, second = collect(requests)
    assert first.token_ids == (70,)
    assert [(choice.token_ids, choice.choices) for choice in first.choices] == [((70,), ())]
    assert second.token_ids == (71,)
    assert [choice.token_ids for choice in second.choices] == [(71,), (72,)]


def test_requests_of_a_call_have_the_sampling_that_each_has_alone(demo: Checkpoint) -> None:
    """Parameters are resolved once for prompts that have them in common, but for what the prompt's length decides."""
    shared, other = (
        SamplingParams(temperature=1.0, seed=4, n=2),
        SamplingParams(forced_bos_token_id=9, max_new_tokens=7),
    )
    given = [shared, other, shared, other, shared]
    prompts = [[5], [5], [5, 6, 7], [5, 6], [5] * 190]
    made = make_requests(prompts, given, {}, demo, 200, None)
    alone = [
        make_requests([prompt], params, {}, demo, 200, None) for prompt, params in zip(prompts, given, strict=True)
    ]
    for index, requests in enumerate(alone):
        assert [request.sampling for request in made if request.index == index] == [
            replace(request.sampling, seed=mine.sampling.seed)
            for request, mine in zip(requests, (r for r in made if r.index == index), strict=True)
        ]
    assert [request.sampling.seed for request in made if request.index in (0, 2, 4)] == [4, choice_seed(4, 1)] * 3
    drawn = make_requests([[5]] * 20, SamplingParams(temperature=1.0), {}, demo, 200, None)
    assert len({request.sampling.seed for request in drawn}) == 20


def test_seeds_of_choices_do_not_repeat_those_of_the_next_seed() -> None:
    seeds = [choice_seed(seed, choice) for seed in (*range(50), MAX_INT - 1, MAX_INT) for choice in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MAX_INT for seed in seeds)
    assert [choice_seed(seed, 0) for seed in (0, 7, MAX_INT)] == [0, 7, MAX_INT]


def test_a_truncated_prompt_keeps_its_end(demo: Checkpoint) -> None:
    prompt = list(range(1, 301))
    with pytest.raises(PromptError, match="over the context of 200"):
        make_requests([prompt], None, {}, demo, 200, None)
    [request] = make_requests([prompt], None, {"truncate_prompt": 150}, demo, 200, None)
    assert request.prompt_ids.tolist() == list(range(151, 301))
    assert (request.truncated, request.sampling.max_new_tokens) == (150, 50)
    [request] = make_requests([prompt[:9]], None, {"truncate_prompt": 9}, demo, 200, None)
    assert (request.truncated, len(request.prompt_ids)) == (0, 9)
    with pytest.raises(PromptError, match="prompt 0 has 190 tokens"):
        make_requests([prompt], None, {"truncate_prompt": 190, "max_new_tokens": 11}, demo, 200, None)
