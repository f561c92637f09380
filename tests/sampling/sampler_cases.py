"""Requests, batches and the Hugging Face reference for the tests of the sampler."""

import math
import random
from collections import Counter

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hybridgen.kernels.step.advance import advance
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerState, resolve, sample

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
        logprobs_of=rng.choice(["model", "sampled"]),
        typical_p=rng.choice([1.0, 1.0, 0.9, 0.4]),
        epsilon_cutoff=rng.choice([0.0, 0.0, 0.004, 0.1]),
        eta_cutoff=rng.choice([0.0, 0.0, 0.004, 0.3]),
        no_repeat_ngram_size=rng.choice([0, 0, 0, 40]),
        sequence_bias=rng.choice([[], [], [((3, 4, 5), 2.0)]]),
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
            MinNewTokensLengthLogitsProcessor(len(prompt), request.min_new_tokens, list(request.stop_token_ids))
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
    if request.typical_p < 1:
        steps.append(TypicalLogitsWarper(request.typical_p))
    if request.epsilon_cutoff:
        steps.append(EpsilonLogitsWarper(request.epsilon_cutoff))
    if request.eta_cutoff:
        steps.append(EtaLogitsWarper(request.eta_cutoff))
    return steps(ids, scores)


def count(state: SamplerState, slots: Tensor, tokens: Tensor) -> None:
    """Count chosen tokens for penalties, as the end of a step does."""
    rows = slots.long()
    table = torch.zeros(3, state.max_batch + 1, dtype=torch.int64)
    ring = torch.zeros(1, len(rows), dtype=torch.int64)
    advance(tokens, rows, rows, rows, table, ring, torch.zeros(1, dtype=torch.int64), state.output_counts)
