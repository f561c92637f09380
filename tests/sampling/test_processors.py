import pytest
import torch
from sampler_cases import VOCAB, hugging_face, params, random_batch, state_of

from hybridgen.sampling.sampler import process, truncate


@pytest.mark.parametrize("seed", range(40))
def test_processors_agree_with_hugging_face(seed):
    rows = 8
    requests, prompts, outputs, logits = random_batch(seed, rows)
    state = state_of(*requests, prompts=prompts, outputs=outputs)
    slots, plan = torch.arange(rows), state.needs(range(rows))
    positions, generated = torch.tensor([10] * rows), torch.tensor([len(output) for output in outputs])
    scores = process(logits, state, slots, positions, generated, plan)
    scaled = truncate(scores, state, slots, plan)
    for row, request in enumerate(requests):
        expected = hugging_face(request, prompts[row], outputs[row], logits[row : row + 1].clone())[0]
        if request.greedy:
            torch.testing.assert_close(scores[row], expected)
            continue
        assert torch.equal(scaled[row].isfinite(), expected.isfinite()), request
        # Ours are shifted, which changes no probability.
        torch.testing.assert_close(scaled[row].log_softmax(-1), expected.log_softmax(-1), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("seed", range(10))
def test_ties_at_the_edge_of_top_p_keep_as_much_as_hugging_face(seed):
    """bfloat16 logits tie often. Which of the tied tokens stay is up to Hugging Face's unstable sort."""
    logits = (torch.randn(1, 2000, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4
    for fields in ({"top_p": 0.9}, {"top_p": 0.5}, {"top_k": 60, "top_p": 0.97}, {"top_k": 5, "top_p": 0.6}):
        request = params(2000, temperature=1, **fields)
        state = state_of(request, vocab=2000)
        kept = truncate(logits, state, torch.tensor([0]), state.needs([0]))[0]
        expected = hugging_face(request, [0], [], logits.clone())[0]
        assert torch.equal(kept.sort().values, (expected - expected.max()).sort().values)
