import math
import random
from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hybridgen.core import SamplingParams
from hybridgen.sampling import SamplerPlan, SamplerState, gumbel_noise, record, resolve, sample
from hybridgen.sampling.sampler import process, truncate

VOCAB = 200
EOS = 2
INF = math.inf


def params(vocab=VOCAB, **fields):
    return resolve(SamplingParams(**fields), None, (EOS,), vocab)


def state_of(*requests, vocab=VOCAB, prompts=None, outputs=None):
    """A state with one slot per request."""
    state = SamplerState(len(requests), vocab, "cpu")
    for slot, request in enumerate(requests):
        state.assign(slot, request, prompts[slot] if prompts else (), outputs[slot] if outputs else ())
    return state


def choose(logits, state, slots, positions=None, generated=None):
    slots = list(slots)
    positions = [10] * len(slots) if positions is None else positions
    generated = [0] * len(slots) if generated is None else generated
    return sample(
        logits,
        state,
        torch.tensor(slots),
        torch.tensor(positions),
        torch.tensor(generated),
        state.needs(slots),
    )


def random_request(rng, seed, vocab=VOCAB):
    return params(
        vocab,
        seed=seed,
        temperature=rng.choice([0, 0, 0.3, 0.8, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 5, 40, 100, 199]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.8, 0.3, 1e-6]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.1, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2, 0.8]),
        presence_penalty=rng.choice([0.0, 0.0, 0.7, -0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
        logit_bias=rng.choice([{}, {}, {3: 5.0, 7: -INF, 11: -2.5}]),
        min_new_tokens=rng.choice([0, 0, 4]),
        stop_token_ids=rng.choice([(), (9, 17)]),
        logprobs=rng.choice([None, None, 0, 3]),
    )


def random_batch(seed, rows, vocab=VOCAB):
    """Requests, their prompts and outputs, and logits."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    requests = [random_request(rng, seed * 1000 + row, vocab) for row in range(rows)]
    prompts = [rng.choices(range(vocab), k=rng.randint(1, 30)) for _ in range(rows)]
    outputs = [rng.choices(range(vocab), k=rng.randint(0, 8)) for _ in range(rows)]
    logits = torch.randn(rows, vocab, generator=generator) * rng.choice([1, 3, 10])
    return requests, prompts, outputs, logits


def hugging_face(request, prompt, output, scores):
    """What Hugging Face's classes make of one row; without those for sampling where it is greedy."""
    for token, bias in request.logit_bias:
        scores[:, token] += bias
    steps = LogitsProcessorList()
    steps.append(RepetitionPenaltyLogitsProcessor(float(request.repetition_penalty)))
    ids = torch.tensor([prompt + output])
    scores = steps(ids, scores)
    for token, count in Counter(output).items():
        scores[:, token] -= request.presence_penalty + request.frequency_penalty * count
    steps = LogitsProcessorList()
    if request.min_new_tokens:
        steps.append(
            MinNewTokensLengthLogitsProcessor(
                len(prompt), request.min_new_tokens, list(request.stop_token_ids)
            )
        )
    if request.greedy:
        return steps(ids, scores)
    steps.append(TemperatureLogitsWarper(float(request.temperature)))
    if request.top_k:
        steps.append(TopKLogitsWarper(request.top_k))
    if request.top_p < 1:
        steps.append(TopPLogitsWarper(request.top_p))
    if request.min_p:
        steps.append(MinPLogitsWarper(request.min_p))
    return steps(ids, scores)


@pytest.mark.parametrize("seed", range(40))
def test_processors_agree_with_hugging_face(seed):
    rows = 8
    requests, prompts, outputs, logits = random_batch(seed, rows)
    state = state_of(*requests, prompts=prompts, outputs=outputs)
    slots, plan = torch.arange(rows), state.needs(range(rows))
    scores = process(logits, state, slots, torch.tensor([len(output) for output in outputs]), plan)
    scaled = truncate(scores, state, slots, plan)
    for row, request in enumerate(requests):
        expected = hugging_face(request, prompts[row], outputs[row], logits[row : row + 1].clone())[0]
        if request.greedy:
            torch.testing.assert_close(scores[row], expected)
            continue
        assert torch.equal(scaled[row].isfinite(), expected.isfinite()), request
        # Ours are shifted by the maximum, which changes no probability.
        torch.testing.assert_close(scaled[row], expected - expected.max(), rtol=1e-4, atol=1e-4)


def test_partial_sort_gives_what_a_full_one_gives():
    """Top-k narrower than the vocabulary sorts 64, 256 or 1024 values, ties included."""
    vocab = 3000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, vocab, generator=generator) * 2
    logits[12:] = (logits[12:] * 2).round() / 2  # many ties
    slots = torch.arange(24)
    requests = [
        params(
            vocab,
            temperature=1,
            top_k=[3, 50, 64, 200, 256, 1000][i % 6],
            top_p=[1.0, 0.9, 0.5, 0.999][i % 4],
        )
        for i in range(24)
    ]
    state = state_of(*requests, vocab=vocab)
    for row in range(24):
        plan = state.needs([row])
        assert plan.ranked < vocab
        narrow = truncate(logits[row : row + 1], state, slots[row : row + 1], plan)
        full = truncate(logits[row : row + 1], state, slots[row : row + 1], plan._replace(ranked=vocab))
        assert torch.equal(narrow, full)


def test_ties_with_the_kth_stay():
    state = state_of(params(temperature=1, top_k=2))
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 9, 30]] = 1.0
    logits[0, 40] = 2.0
    kept = truncate(logits, state, torch.tensor([0]), state.needs([0]))[0]
    assert kept.isfinite().nonzero().flatten().tolist() == [5, 9, 30, 40]


def test_top_p_keeps_the_smallest_set_and_lower_ids_of_ties():
    probabilities = torch.full((VOCAB,), 1e-9)
    probabilities[[50, 20, 70, 10]] = torch.tensor([0.4, 0.2, 0.2, 0.2])
    for top_p, expected in [
        (1e-6, [50]),
        (0.39, [50]),
        (0.5, [20, 50]),
        (0.7, [20, 50, 70]),
        (0.9, [10, 20, 50, 70]),
    ]:
        state = state_of(params(temperature=1, top_p=top_p))
        kept = truncate(probabilities.log()[None], state, torch.tensor([0]), state.needs([0]))[0]
        finite = kept.isfinite().nonzero().flatten().tolist()
        assert len(finite) == len(expected)
        assert 50 in finite
    state = state_of(params(temperature=1, top_p=0.5))
    kept = truncate(probabilities.log()[None], state, torch.tensor([0]), state.needs([0]))[0]
    assert kept.isfinite().nonzero().flatten().tolist() == [10, 50]


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
    shuffled = choose(
        logits[order], state, order, [positions[i] for i in order], [generated[i] for i in order]
    ).tokens
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


def test_record_counts_what_was_chosen():
    requests = [params(frequency_penalty=1.0), params(), params(presence_penalty=2.0)]
    state = state_of(*requests, prompts=[[3], [3], [3]], outputs=[[4, 4], [4], [5]])
    assert state.output_counts[0, 4] == 2
    assert state.output_counts[1].sum() == 0  # it has no penalty
    before = state.output_counts.clone()
    record(state, torch.tensor([2, 0], dtype=torch.int32), torch.tensor([7, -1]))
    before[2, 7] += 1
    assert torch.equal(state.output_counts, before)
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 8] = 2.5, 1.0
    assert choose(logits, state, [0]).tokens.item() == 8  # 2.5 - 2 against 1
    record(state_of(params()), torch.tensor([0]), torch.tensor([7]))  # nothing to count


def test_a_loop_with_penalties_follows_hugging_face():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 1, VOCAB, generator=generator).cumsum(0)
    request = params(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2)
    state, output = state_of(request, prompts=[[1, 2, 3]]), []
    for step in range(12):
        expected = hugging_face(request, [1, 2, 3], output, logits[step].clone()).argmax(-1).item()
        tokens = choose(logits[step], state, [0], generated=[step]).tokens
        record(state, torch.tensor([0]), tokens)
        output.append(tokens.item())
        assert output[-1] == expected
    again = state_of(request, prompts=[[1, 2, 3]], outputs=[output])
    assert torch.equal(again.output_counts, state.output_counts)


def test_assign_leaves_nothing_of_the_former_request():
    rng = random.Random(5)
    everything = params(
        temperature=2,
        top_k=3,
        top_p=0.5,
        min_p=0.5,
        repetition_penalty=2,
        presence_penalty=1,
        frequency_penalty=1,
        logit_bias={1: -INF, 2: 9.0},
        min_new_tokens=50,
        seed=1,
    )
    logits = torch.randn(1, VOCAB)
    for _ in range(20):
        request = random_request(rng, rng.randrange(2**63))
        prompt, output = rng.choices(range(VOCAB), k=5), rng.choices(range(VOCAB), k=5)
        used = state_of(everything, prompts=[list(range(VOCAB))], outputs=[list(range(VOCAB))])
        used.assign(0, request, prompt, output)
        fresh = state_of(request, prompts=[prompt], outputs=[output])
        assert used.needs([0]) == fresh.needs([0])
        assert choose(logits, used, [0]).tokens == choose(logits, fresh, [0]).tokens
        # Also where another row makes the plan ask for all of it.
        plan = SamplerPlan(True, VOCAB, True, True, True, True, True, None)
        arguments = (torch.tensor([0]), torch.tensor([10]), torch.tensor([0]))
        assert sample(logits, used, *arguments, plan).tokens == sample(logits, fresh, *arguments, plan).tokens


def test_plans():
    requests = [
        params(),
        params(temperature=1, top_k=50),
        params(temperature=1, top_p=0.9),
        params(temperature=0, top_k=5, top_p=0.5, min_p=0.5),
        params(temperature=1, min_p=0.1, logprobs=3),
        params(presence_penalty=1, logprobs=0),
        params(logit_bias={1: 1.0}),
        params(min_new_tokens=1),
        params(min_new_tokens=1, ignore_eos=True),
    ]
    state = state_of(*requests)
    assert state.needs([0]) == state.needs([3]) == state.needs([8]) == SamplerPlan()
    assert state.needs([1]) == SamplerPlan(sample=True, ranked=64)
    assert state.needs([2]) == SamplerPlan(sample=True, ranked=VOCAB, nucleus=True)
    assert state.needs([1, 4]) == SamplerPlan(sample=True, ranked=64, min_p=True, logprobs=3)
    assert state.needs([5, 0]) == SamplerPlan(penalties=True, logprobs=0)
    assert state.needs((6, 7)) == SamplerPlan(bias=True, min_tokens=True)
    assert [state.needs([i]).filter for i in range(6)] == [False, True, True, False, True, False]
    assert hash(state.needs(range(9))) == hash(state.needs(range(9)))


def test_tables_of_the_vocabularys_width_are_allocated_when_needed():
    state = state_of(params(), params(temperature=1, top_k=3))
    assert (state.bias, state.banned, state.prompt_seen, state.output_counts) == (None,) * 4
    state.assign(0, params(logit_bias={1: 1.0}))
    assert state.bias.shape == (2, VOCAB)
    assert (state.banned, state.prompt_seen) == (None, None)
    with torch.inference_mode():
        state.assign(1, params(min_new_tokens=1, repetition_penalty=1.1), [1, VOCAB + 3])
    state.assign(1, params(repetition_penalty=1.1), [1])  # works outside of inference mode too
    assert state.prompt_seen[1].nonzero().flatten().tolist() == [1]


def test_misuse():
    state = SamplerState(2, VOCAB, "cpu")
    with pytest.raises(ValueError, match="slot 2"):
        state.assign(2, params())
    with pytest.raises(ValueError, match="slot 1 was not assigned"):
        state.needs([1])
    state.assign(0, params())
    with pytest.raises(ValueError, match="100 columns"):
        choose(torch.randn(1, 100), state, [0])


def test_it_compiles():
    torch._dynamo.reset()
    requests, prompts, outputs, logits = random_batch(7, 4)
    state = state_of(*requests, prompts=prompts, outputs=outputs)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    slots = torch.arange(4)
    arguments = (logits, state, slots, slots + 5, slots, state.needs(range(4)))
    assert torch.equal(compiled(*arguments).tokens, sample(*arguments).tokens)
