from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from hybridgen.errors import SamplingError
from hybridgen.params import SamplingParams
from hybridgen.sampling import DEFAULT_MAX_NEW_TOKENS, resolve

VOCAB = 100
SAMPLING_MODEL = GenerationConfig(
    do_sample=True,
    temperature=0.6,
    top_k=20,
    top_p=0.95,
    min_p=0.05,
    repetition_penalty=1.1,
    max_new_tokens=32,
)


def resolved(generation_config=None, eos=(2,), **fields):
    return resolve(SamplingParams(**fields), generation_config, eos, VOCAB)


def filters(r):
    return r.temperature, r.top_k, r.top_p, r.min_p, r.repetition_penalty


def test_without_a_model_it_is_greedy_and_off():
    r = resolved()
    assert filters(r) == (0, 0, 1, 0, 1)
    assert r.greedy
    assert not r.penalizes
    assert r.max_new_tokens == DEFAULT_MAX_NEW_TOKENS == 128


def test_a_sampling_model_fills_what_was_left_open():
    r = resolved(SAMPLING_MODEL)
    assert filters(r) == (0.6, 20, 0.95, 0.05, 1.1)
    assert r.max_new_tokens == 32
    assert r.penalizes
    given = resolved(SAMPLING_MODEL, temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, max_new_tokens=5)
    assert filters(given) == (0, 0, 1, 0, 1)
    assert given.max_new_tokens == 5


def test_a_greedy_model_lends_its_penalty_but_no_filter():
    model = SimpleNamespace(do_sample=False, temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.2)
    assert filters(resolved(model)) == (0, 0, 1, 0, 1.2)
    assert filters(resolved(model, temperature=0.8)) == (0.8, 0, 1, 0, 1.2)


def test_a_sampling_model_without_values_samples_plainly():
    # Hugging Face would apply top_k=50 here.
    assert filters(resolved(GenerationConfig(do_sample=True))) == (1, 0, 1, 0, 1)


def test_top_k_of_the_whole_vocabulary_is_off():
    assert resolved(temperature=1, top_k=VOCAB).top_k == 0
    assert resolved(temperature=1, top_k=VOCAB + 50).top_k == 0
    assert resolved(temperature=1, top_k=VOCAB - 1).top_k == VOCAB - 1


def test_stop_ids_are_the_models_and_the_callers():
    assert resolved(eos=(2, 3), stop_token_ids=[7, 2]).stop_token_ids == (2, 3, 7)
    assert resolved(eos=(2, 3), stop_token_ids=[7], ignore_eos=True).stop_token_ids == (7,)
    assert resolved(eos=(2, VOCAB, -1)).stop_token_ids == (2,)
    assert resolved(eos=None).stop_token_ids == ()


def test_seeds():
    assert resolved(seed=0).seed == 0
    drawn = {resolved().seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_the_rest_is_carried_over():
    r = resolved(
        temperature=1,
        n=3,
        stop="x",
        logit_bias={4: -1},
        logprobs=2,
        presence_penalty=0.5,
        skip_special_tokens=False,
    )
    assert (r.n, r.stop, r.logit_bias, r.logprobs, r.presence_penalty) == (3, ("x",), ((4, -1.0),), 2, 0.5)
    assert not r.skip_special_tokens
    assert hash(r) == hash(r)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (None, {"stop_token_ids": [1, VOCAB]}, ["stop_token_ids", "[100]"]),
        (None, {"logit_bias": {3: 1.0, 500: 1.0}}, ["logit_bias", "[500]"]),
        (None, {"n": 2}, ["n=2", "temperature"]),
        (None, {"min_new_tokens": 200}, ["min_new_tokens=200", "max_new_tokens=128"]),
        (SimpleNamespace(do_sample=True, top_p=0.0), {}, ["top_p=0.0", "generation_config"]),
        (SimpleNamespace(repetition_penalty=-1.0), {}, ["repetition_penalty=-1.0", "generation_config"]),
    ],
)
def test_errors_name_the_value(model, fields, words):
    with pytest.raises(SamplingError) as caught:
        resolved(model, **fields)
    for word in words:
        assert word in str(caught.value)


def test_only_allowed_tokens_are_left() -> None:
    found = resolved(None, allowed_token_ids=[3, 5, 3], logit_bias={5: 1.0, 7: 2.0}, suppress_tokens=[3, 9])
    assert found.allowed_token_ids == (3, 5)
    assert dict(found.logit_bias) == {5: 1.0, 3: -float("inf")}
    assert resolved(None).allowed_token_ids == ()
    for fields, words in (
        ({"allowed_token_ids": [3], "suppress_tokens": [3]}, "are all banned"),
        ({"allowed_token_ids": [3], "forced_eos_token_id": 4}, "is not in allowed_token_ids"),
        ({"allowed_token_ids": [10**9]}, "allowed_token_ids holds"),
    ):
        with pytest.raises(SamplingError, match=words):
            resolved(None, **fields)
    with pytest.raises(SamplingError, match=r"allowed_token_ids=\[\] leaves no token"):
        SamplingParams(allowed_token_ids=[])
