import math
import random
from dataclasses import replace

import pytest
import torch
from sampler_cases import EOS, INF, VOCAB, choose, hugging_face, params, random_batch, random_request, state_of

from hybridgen.sampling import SamplerState, gumbel_noise, sample


def chi2_limit(cells, z=4.0):
    """The chi-square quantile at z standard deviations of a normal (Wilson and Hilferty 1931)."""
    k = cells - 1
    return k * (1 - 2 / (9 * k) + z * math.sqrt(2 / (9 * k))) ** 3


def chi2(counts, probabilities):
    """The statistic and its limit; cells with an expected count below 5 are joined."""
    expected = probabilities * counts.sum()
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]]) if small.any() else counts
    expected = torch.cat([expected[~small], expected[small].sum()[None]]) if small.any() else expected
    possible = expected > 0
    assert counts[~possible].sum() == 0, "a token of probability 0 was drawn"
    statistic = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum().item()
    return statistic, chi2_limit(int(possible.sum()))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.2, "typical_p": 0.8},
        {"temperature": 0.9, "top_p": 0.95, "epsilon_cutoff": 0.02, "eta_cutoff": 0.03},
    ],
)
def test_draws_follow_the_distribution(fields):
    vocab, draws = 50, 20_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    request = params(vocab, seed=7, **fields)
    state = state_of(request, vocab=vocab)
    slots, positions = torch.zeros(draws, dtype=torch.int64), torch.arange(draws)
    tokens = sample(logits.expand(draws, vocab), state, slots, positions, positions, state.needs([0])).tokens
    counts = torch.bincount(tokens, minlength=vocab).double()
    exact = hugging_face(request, [0], [], logits[None].clone())[0].double().softmax(-1)
    statistic, limit = chi2(counts, exact)
    assert statistic < limit
    # The test has the power to tell: a slightly different temperature does not pass.
    wrong = torch.where(exact > 0, exact**1.1, 0)
    statistic, limit = chi2(counts, wrong / wrong.sum())
    assert statistic > limit


@pytest.mark.parametrize("seed", range(6))
def test_a_row_is_the_same_alone_and_in_any_batch(seed):
    rows = 8
    requests, prompts, outputs, logits = random_batch(100 + seed, rows)
    state = state_of(*requests, prompts=prompts, outputs=outputs)
    positions, generated = [5, 9, 5, 100, 0, 7, 7, 2**33], [len(output) for output in outputs]
    together = choose(logits, state, range(rows), positions, generated).tokens
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    shuffled = choose(logits[order], state, order, [positions[i] for i in order], [generated[i] for i in order]).tokens
    assert torch.equal(shuffled, together[order])
    for row in range(rows):
        alone = choose(logits[row : row + 1], state, [row], [positions[row]], [generated[row]]).tokens
        assert alone.item() == together[row].item()


def test_equal_requests_in_different_slots_draw_equally():
    logits = torch.randn(1, VOCAB).expand(8, VOCAB)
    state = state_of(*[params(temperature=1, seed=3)] * 8)
    assert choose(logits, state, range(8)).tokens.unique().numel() == 1
    assert choose(logits, state, range(8), positions=list(range(8))).tokens.unique().numel() > 1
    state = state_of(*[params(temperature=1, seed=seed) for seed in range(8)])
    assert choose(logits, state, range(8)).tokens.unique().numel() > 1


def test_the_draw_is_the_argmax_with_the_noise():
    logits = torch.randn(1, VOCAB)
    state = state_of(params(temperature=0.5, seed=2**63 - 1))
    expected = (logits / 0.5 + gumbel_noise(torch.tensor([2**63 - 1]), torch.tensor([10]), VOCAB)).argmax(-1)
    assert torch.equal(choose(logits, state, [0]).tokens, expected)


def test_greedy_takes_the_lowest_id_of_ties():
    logits = torch.zeros(2, VOCAB)
    logits[:, [30, 60]] = 4.0
    state = state_of(params(), params(temperature=1e-4, top_k=1, seed=0))
    tokens = choose(logits, state, [0, 1]).tokens.tolist()
    assert tokens[0] == 30
    assert tokens[1] in (30, 60)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2},
        {"min_new_tokens": 3},
        {"logit_bias": {5: -INF}},
    ],
)
def test_rows_without_a_choice_give_minus_one_and_harm_nobody(fields):
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(5, VOCAB, generator=generator)
    request = params(seed=1, logprobs=2, **fields)
    state = state_of(*[request] * 5, prompts=[[1, 2, 3]] * 5)
    expected = choose(good, state, range(5))
    bad = good.clone()
    bad[1, EOS] = math.nan  # where a minimum length would hide it
    bad[2] = -INF
    bad[3] = math.nan
    output = choose(bad, state, range(5))
    assert output.tokens.tolist()[1:4] == [-1, -1, -1]
    assert output.logprobs[1:4].isnan().all()
    for row in (0, 4):
        assert output.tokens[row] == expected.tokens[row] != -1
        assert output.logprobs[row] == expected.logprobs[row]
        assert torch.equal(output.top_ids[row], expected.top_ids[row])


def test_everything_banned_gives_minus_one():
    bans = dict.fromkeys(range(VOCAB), -INF)
    for fields in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}):
        state = state_of(params(logit_bias=bans, **fields))
        assert choose(torch.randn(1, VOCAB), state, [0]).tokens.item() == -1


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e-4},
        {"temperature": 1e-300},
        {"temperature": 100.0},
        {"temperature": 1e300},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1e-4, "top_k": 3, "top_p": 0.5, "min_p": 0.5},
        {
            "temperature": 1.0,
            "repetition_penalty": 1e-300,
            "presence_penalty": 1e300,
            "logit_bias": {3: 1e300},
        },
    ],
)
def test_extreme_parameters(fields):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, VOCAB, generator=generator) * 5
    logits[1] = -3e38
    logits[1, 40] = 1.0
    logits[2, :100] = -INF
    logits[3] = 1e4
    state = state_of(*[params(seed=9, **fields)] * 4, prompts=[[1, 2]] * 4, outputs=[[5]] * 4)
    tokens = choose(logits, state, range(4)).tokens
    assert (tokens >= 0).all()
    if fields["temperature"] == 1e-4 or fields.get("top_p", 1) < 1e-5 or fields.get("top_k") == 1:
        assert torch.equal(tokens[:2], logits[:2].argmax(-1))
    assert tokens[1] == 40 or fields["temperature"] >= 100 or "logit_bias" in fields
    assert tokens[2] >= 100 or "logit_bias" in fields


def test_half_precision_logits_are_computed_on_in_float32():
    logits = torch.randn(3, VOCAB).bfloat16()
    requests = [params(temperature=1, top_p=0.9, seed=i, logprobs=1) for i in range(3)]
    state = state_of(*requests)
    half, full = choose(logits, state, range(3)), choose(logits.float(), state, range(3))
    assert torch.equal(half.tokens, full.tokens)
    assert half.logprobs.dtype == torch.float32
    assert torch.equal(half.logprobs, full.logprobs)


def test_logprobs_are_those_of_the_raw_logits():
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    state = state_of(params(logprobs=3, logit_bias={8: 100.0}), params(temperature=1, top_k=2, seed=0))
    output = choose(logits, state, [0, 1])
    exact = logits.log_softmax(-1)
    assert output.tokens[0] == 8
    torch.testing.assert_close(output.logprobs, exact.gather(1, output.tokens[:, None])[:, 0])
    torch.testing.assert_close(output.top_logprobs, exact.topk(3).values)
    assert torch.equal(output.top_ids, exact.topk(3).indices)
    assert choose(logits, state, [1])[1:] == (None, None, None)
    state = state_of(params(logprobs=0))
    assert choose(logits[:1], state, [0]).top_ids is None
    state = state_of(params(vocab=5, logprobs=20), vocab=5)
    assert choose(logits[:1, :5], state, [0]).top_ids.shape == (1, 5)


def test_minimum_length_ends():
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 9], logits[0, 50] = 3.0, 2.0, 1.0
    state = state_of(params(min_new_tokens=2, stop_token_ids=[9]))
    assert [choose(logits, state, [0], generated=[n]).tokens.item() for n in range(4)] == [50, 50, EOS, EOS]


def test_it_compiles():
    torch._dynamo.reset()
    requests, prompts, outputs, logits = random_batch(7, 4)
    state = state_of(*requests, prompts=prompts, outputs=outputs)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    slots = torch.arange(4)
    arguments = (logits, state, slots, slots + 5, slots, state.needs(range(4)))
    assert torch.equal(compiled(*arguments).tokens, sample(*arguments).tokens)


@pytest.mark.parametrize("seed", range(12))
def test_log_probabilities_of_what_was_drawn_from(seed):
    """In one batch: of rows that ask for it those of the processed distribution, of others the model's own."""
    rows = 8
    requests, prompts, outputs, logits = random_batch(seed + 500, rows)
    requests = [replace(request, logprobs=request.logprobs or 5) for request in requests]
    state = state_of(*requests, prompts=prompts, outputs=outputs)
    generated = [len(output) for output in outputs]
    out = choose(logits, state, range(rows), positions=[40] * rows, generated=generated)
    kinds = {request.logprobs_of for request in requests}
    assert state.needs(range(rows)).sampled_logprobs == ("sampled" in kinds)
    for row, request in enumerate(requests):
        expected = logits[row].log_softmax(-1)
        if request.logprobs_of == "sampled":
            expected = hugging_face(request, prompts[row], outputs[row], logits[row : row + 1].clone())[0]
            expected = expected.log_softmax(-1)
        token = out.tokens[row]
        torch.testing.assert_close(out.logprobs[row], expected[token], rtol=1e-4, atol=1e-4)
        assert out.logprobs[row] > -INF
        top = out.top_logprobs[row, : request.logprobs]
        torch.testing.assert_close(top, expected.topk(request.logprobs).values, rtol=1e-4, atol=1e-4)
        assert torch.equal(expected[out.top_ids[row, : request.logprobs]].isfinite(), top.isfinite())


def test_what_a_row_tells_changes_no_token():
    requests, prompts, outputs, logits = random_batch(77, 8)
    tokens = []
    for of in ("model", "sampled"):
        told = [replace(request, logprobs=2, logprobs_of=of) for request in requests]
        state = state_of(*told, prompts=prompts, outputs=outputs)
        tokens.append(choose(logits, state, range(8), positions=[40] * 8).tokens)
    assert torch.equal(*tokens)


def test_tokens_behind_the_counted_ones_are_penalised_alike():
    """What a row's output ends with, and its counts do not have yet; below 0: nothing."""
    wanted = [params(temperature=0, repetition_penalty=1.9), params(seed=3, temperature=1.0, frequency_penalty=1.5)]
    outputs, behind = [[5, 5, 7], [9]], [[11, 5, -1], [9, -2, 30]]
    joined = [[*output, *(token for token in more if token >= 0)] for output, more in zip(outputs, behind, strict=True)]
    slots, positions, generated = torch.arange(2), torch.tensor([10, 10]), torch.zeros(2, dtype=torch.int64)
    for seed in range(20):
        logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(seed))
        logits[:, [5, 7, 9, 11, 30]] += 3
        whole, part = state_of(*wanted, outputs=joined), state_of(*wanted, outputs=outputs)
        before = part.output_counts.clone()
        expected = choose(logits, whole, range(2)).tokens
        found = sample(
            logits, part, slots, positions, generated, part.needs([0, 1]), behind=torch.tensor(behind)
        ).tokens
        assert torch.equal(found, expected)
        assert torch.equal(part.output_counts, before)


@pytest.mark.parametrize("slots", [[2], [0, 1, 2, 3], [5, 1, 3]])
def test_several_slots_at_once_equal_one_after_the_other(slots):
    rng = random.Random(len(slots))
    one, all_ = (SamplerState(6, VOCAB, "cpu", keeps_text=True) for _ in range(2))
    # Every table is there, and each slot had another request before.
    for state in (one, all_):
        for slot in range(6):
            state.assign(slot, params(seed=1, repetition_penalty=2.0, min_new_tokens=3, logit_bias={5: 1.0}), [3], [4])
    requests = [
        (slot, random_request(rng, seed), [rng.randrange(VOCAB)] * 3, [seed]) for seed, slot in enumerate(slots)
    ]
    for request in requests:
        one.assign(*request)
    all_.assign_all(requests)
    assert one.tensors().keys() == all_.tensors().keys()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, all_.tensors()[name]), name
    assert one.needs(range(6)) == all_.needs(range(6))
