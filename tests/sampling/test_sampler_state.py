import random

import pytest
import torch
from sampler_cases import INF, VOCAB, choose, count, hugging_face, params, random_request, state_of

from hybridgen.sampling import SamplerPlan, SamplerState, sample


def test_what_was_chosen_is_counted():
    requests = [params(frequency_penalty=1.0), params(), params(presence_penalty=2.0)]
    state = state_of(*requests, prompts=[[3], [3], [3]], outputs=[[4, 4], [4], [5]])
    assert state.output_counts[0, 4] == 2
    assert state.output_counts[1].sum() == 0  # it has no penalty
    before = state.output_counts.clone()
    count(state, torch.tensor([2, 0], dtype=torch.int32), torch.tensor([7, -1]))
    before[2, 7] += 1
    assert torch.equal(state.output_counts, before)
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 8] = 2.5, 1.0
    assert choose(logits, state, [0]).tokens.item() == 8  # 2.5 - 2 against 1
    count(state_of(params()), torch.tensor([0]), torch.tensor([7]))  # nothing to count


def test_a_loop_with_penalties_follows_hugging_face():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 1, VOCAB, generator=generator).cumsum(0)
    request = params(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2)
    state, output = state_of(request, prompts=[[1, 2, 3]]), []
    for step in range(12):
        expected = hugging_face(request, [1, 2, 3], output, logits[step].clone()).argmax(-1).item()
        tokens = choose(logits[step], state, [0], generated=[step]).tokens
        count(state, torch.tensor([0]), tokens)
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
        sequence_bias=[((token, token % 5), 20.0) for token in range(VOCAB)],
        no_repeat_ngram_size=1,
        begin_suppress_tokens=list(range(50)),
        forced_eos_token_id=3,
        typical_p=0.2,
        epsilon_cutoff=0.5,
        eta_cutoff=0.5,
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
        plan = SamplerPlan(True, VOCAB, *[True] * 9, None)
        used.allocate(plan)
        fresh.allocate(plan)
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
    assert state.needs([1]) == SamplerPlan(sample=True, ranked=64, top_k=True)
    assert state.needs([2]) == SamplerPlan(sample=True, ranked=VOCAB, nucleus=True)
    assert state.needs([1, 4]) == SamplerPlan(sample=True, ranked=64, min_p=True, top_k=True, logprobs=3)
    assert state.needs([5, 0]) == SamplerPlan(penalties=True, logprobs=0)
    assert state.needs((6, 7)) == SamplerPlan(bias=True, by_length=True)
    assert [state.needs([i]).filter for i in range(6)] == [False, True, True, False, True, False]
    assert hash(state.needs(range(9))) == hash(state.needs(range(9)))


def test_tables_of_the_vocabularys_width_are_allocated_when_needed():
    state = state_of(params(), params(temperature=1, top_k=3))
    assert (state.bias, state.rules, state.prompt_seen, state.output_counts, state.history) == (None,) * 5
    state.assign(0, params(logit_bias={1: 1.0}))
    assert state.bias.shape == (2, VOCAB)
    assert (state.rules, state.prompt_seen) == (None, None)
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
