"""Rows to sample from, and a judge that knows how far two samplers may differ."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from hybridgen.sampling.processors import best_of, drop_unlikely, keep_top, temper
from hybridgen.sampling.random import gumbel_noise

INF = math.inf
MASS_SLACK = 2.0**-18
"""Of a running sum around p, as `sampling.choice` says."""
NOISE_SLACK = 1e-5
"""Of a score: a few last bits of a noise below 30, and of the sum with the tempered logit."""


class Batch(NamedTuple):
    logits: Tensor
    reals: Tensor
    integers: Tensor
    slots: Tensor
    positions: Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(field.to(device) for field in self))

    def rows(self, which: list[int] | slice) -> Batch:
        """Some of the rows, with the same tables."""
        return self._replace(logits=self.logits[which], slots=self.slots[which], positions=self.positions[which])


def tables(requests: list[dict[str, float]]) -> tuple[Tensor, Tensor]:
    """The parameter tables, as wide as the sampler's, from `temperature`, `top_k`, `top_p`, `min_p` and `seed`."""
    reals = torch.full((len(requests), 6), math.nan)  # nobody may read the columns of penalties
    integers = torch.full((len(requests), 3), -1)
    for slot, request in enumerate(requests):
        min_p = request.get("min_p", 0.0)
        reals[slot, 0] = request.get("temperature", 0.0)
        reals[slot, 1] = request.get("top_p", 1.0)
        reals[slot, 2] = math.log(min_p) if min_p else -INF
        integers[slot, 0] = int(request.get("seed", 0))
        integers[slot, 1] = int(request.get("top_k", 0))
    return reals, integers


def random_request(source: random.Random, vocab: int) -> dict[str, float]:
    return {
        "temperature": source.choice([0.0, 0.3, 0.8, 1.0, 1.7, 1e-4, 100.0]),
        "top_k": source.choice([0, 0, 1, 2, 7, 40, vocab // 2, vocab - 1, vocab, vocab + 5]),
        "top_p": source.choice([1.0, 1.0, 0.95, 0.8, 0.3, 1e-6, 1 - 2**-24]),
        "min_p": source.choice([0.0, 0.0, 0.02, 0.1, 1.0]),
        "seed": source.randrange(-(2**63), 2**63),
    }


def random_logits(source: random.Random, vocab: int) -> Tensor:
    """One row [V]: smooth, with ties, peaked, with infinities, constant, tiny or without a choice."""
    generator = torch.Generator().manual_seed(source.randrange(2**31))
    row = torch.randn(vocab, generator=generator) * source.choice([0.01, 1.0, 3.0, 10.0])
    kind = source.choice(["smooth", "smooth", "ties", "peaked", "banned", "constant", "zeros", "tiny", "bad"])
    some = torch.randperm(vocab, generator=generator)[: max(1, vocab // 8)]
    if kind == "ties":
        row = (row * 2).round() / 2
    elif kind == "peaked":
        row[some[:3]] += 20
    elif kind == "banned":
        row[some] = -INF
        row[0] = 0.0
    elif kind == "constant":
        row.fill_(source.choice([-3.5, 0.0, 7.0]))
    elif kind == "zeros":  # both of them
        row = row.sign() * 0.0
    elif kind == "tiny":
        row *= 1e-4
    elif kind == "bad":
        row[some[0]] = source.choice([math.nan, -math.nan, INF])
        if source.random() < 0.3:
            row.fill_(-INF)
    return row


def random_batch(seed: int, rows: int, vocab: int, dtype: torch.dtype) -> Batch:
    source = random.Random(seed)
    reals, integers = tables([random_request(source, vocab) for _ in range(rows + 1)])
    logits = torch.stack([random_logits(source, vocab) for _ in range(rows)]).to(dtype)
    slots = torch.tensor(source.sample(range(rows + 1), rows))
    positions = torch.tensor([source.choice([0, 7, 1000, 2**33]) for _ in range(rows)])
    return Batch(logits, reals, integers, slots, positions)


def needs(batch: Batch) -> tuple[bool, bool, bool]:
    """Whether some row has top-k, top-p, min-p."""
    drawn = batch.reals[batch.slots, 0] > 0
    top_k, top_p = batch.integers[batch.slots, 1] > 0, batch.reals[batch.slots, 1] < 1
    min_p = batch.reals[batch.slots, 2] > -INF
    return bool((drawn & top_k).any()), bool((drawn & top_p).any()), bool((drawn & min_p).any())


def _kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, slack: float) -> Tensor:
    """What top-k and top-p keep if the running sum is off by `slack`; bool [B, V]."""
    inside = keep_top(scaled, top_k, top_p, scaled.shape[-1], False) > -INF
    order = torch.where(inside, scaled, -INF).double().sort(dim=-1, descending=True, stable=True)
    share = order.values.softmax(-1)
    before = share.cumsum(-1) - share
    ranked = (before < top_p.double()[:, None] + slack) & (order.values > -INF)
    ranked[:, 0] = True
    kept = torch.zeros_like(inside).scatter(-1, order.indices, ranked)
    return torch.where(top_p[:, None] < 1, kept, inside)


def judge(batch: Batch, tokens: Tensor) -> list[str]:
    """What is wrong with the tokens: each has to be the reference's, or as good within what may differ."""
    logits, reals, integers, slots, positions = batch
    raw = logits.float()
    temperature = reals[slots, 0]
    draws = temperature > 0
    scaled = temper(raw, torch.where(draws, temperature, 1))
    noisy = scaled + gumbel_noise(integers[slots, 0], positions, raw.shape[-1])
    usable = scaled.isfinite().any(-1) & ~scaled.isnan().any(-1)
    top_k, top_p, log_min_p = integers[slots, 1], reals[slots, 1], reals[slots, 2]
    likely = drop_unlikely(scaled, log_min_p) > -INF
    safe = scaled.nan_to_num(nan=0.0, posinf=0.0, neginf=-INF)
    least = noisy.masked_fill(~(_kept(safe, top_k, top_p, -MASS_SLACK) & likely), -INF)
    most = noisy.masked_fill(~(_kept(safe, top_k, top_p, MASS_SLACK) & likely), -INF)
    greedy = best_of(raw)
    wrong = []
    for row, token in enumerate(tokens.tolist()):
        if not draws[row]:
            if token != greedy[row]:
                wrong.append(f"row {row}: greedy {token}, not {greedy[row]}")
        elif not usable[row]:
            if token != -1:
                wrong.append(f"row {row}: {token} where there is nothing to choose")
        elif token < 0 or most[row, token] == -INF:
            wrong.append(f"row {row}: {token} is not among what is kept")
        else:
            slack = NOISE_SLACK + 2.0**-22 * abs(most[row, token].item())
            if most[row, token] < least[row].max() - slack:
                wrong.append(f"row {row}: {token} has {most[row, token]}, the best {least[row].max()}")
    return wrong
