"""Triton's kernels for latents against dense attention, in Triton's interpreter; run by test_latent_triton.py.

float32 only: the interpreter's `tl.dot` is wrong on bfloat16.
"""

from __future__ import annotations

import random

import torch
from latent_cases import dense, error, make_latents, mean_latents

from hybridgen.kernels.attention import latent_launches
from hybridgen.kernels.attention.latent_launches import Tuning

CASES = [  # heads, rank, rope, page size, lengths, fed to prefill
    (3, 24, 8, 8, [1, 8, 9, 50], [1, 2, 1, 50]),
    (16, 32, 16, 16, [33, 1, 100], [9, 1, 3]),
    (40, 16, 8, 64, [70, 2], [2, 2]),
    (20, 16, 8, 32, [70], [5]),
]
TUNES = [
    Tuning(16, 16, 4, 1, programs=16, chunk=16),
    Tuning(32, 16, 4, 1, chunk=64),
    Tuning(16, 64, 4, 1, chunk=4096),
]
BY_HEADS = [
    Tuning(16, 16, 4, 1, programs=16, chunk=16, parts=1),
    Tuning(32, 16, 4, 1, chunk=64, parts=2),
    Tuning(16, 64, 4, 1, chunk=4096, parts=4),
]
"""One of these in each case."""
OWN = Tuning(16, 32, 4, 1)
"""Of runs that begin in the call: less than their tokens, so that there are several tiles of each kind."""


def _strided(*size: int) -> torch.Tensor:
    """As a product by heads leaves it: heads outermost, and part of a wider row."""
    tokens, heads, width = size
    return torch.randn(heads, tokens, width + 8).transpose(0, 1)[..., 8:]


def check_case(number: int) -> None:
    """Decode, with new tokens and without, rows alone with equal bits, and prefill, for one of `CASES`."""
    torch.manual_seed(number)
    heads, rank, rope, page_size, lengths, fed = CASES[number]
    check(heads, rank, rope, page_size, lengths, fed, number)


def check_random(seed: int) -> None:
    """The same for a random case."""
    torch.manual_seed(seed)
    chosen = random.Random(seed)
    lengths = [chosen.randint(1, 100) for _ in range(chosen.randint(1, 3))]
    fed = [chosen.randint(1, min(length, 9)) for length in lengths]
    rank, rope = chosen.choice([8, 16, 40, 64]), chosen.choice([8, 16, 24])
    check(chosen.choice([1, 5, 16, 24]), rank, rope, chosen.choice([8, 16, 64]), lengths, fed, seed)


def check(heads: int, rank: int, rope: int, page_size: int, lengths: list[int], fed: list[int], number: int) -> None:
    ones, scale = [1] * len(lengths), 0.3
    errors = []
    for tune in (*TUNES, BY_HEADS[number % len(BY_HEADS)]):
        cache = make_latents(lengths, rank, rope, page_size)
        q, q_rotary = _strided(len(lengths), heads, rank), _strided(len(lengths), heads, rope)
        wanted = mean_latents(q, q_rotary, cache, ones, scale)
        places = cache.places(ones)
        found = latent_launches.decode(q, q_rotary, *places, scale, tune=tune)
        errors.append(error(found, wanted))
        if len(lengths) > 1:
            last = torch.full_like(cache.slots, len(lengths) - 1).long()
            other = latent_launches.decode(
                q[last], q_rotary[last], *places[:2], *(each[last] for each in places[2:]), scale, tune=tune
            )
            assert torch.equal(other, found[last]), "the last row has other bits beside other rows"
        alone = latent_launches.decode(
            q[:1], q_rotary[:1], *places[:2], *(each[:1] for each in places[2:]), scale, tune=tune
        )
        errors.append(error(alone, wanted[:1]))
        new = cache.take_newest()
        found = latent_launches.decode(q, q_rotary, *places, scale, *new, tune=tune)
        errors.append(error(found, wanted))
        assert torch.equal(cache.newest(), torch.stack([each[-1] for each in cache.sequences]))
        q, q_rotary = _strided(sum(fed), heads, rank), _strided(sum(fed), heads, rope)
        found = latent_launches.prefill(
            q, q_rotary, *cache.places(fed), cache.starts(fed, len(fed) + 2), scale, tune=tune
        )
        errors.append(error(found, mean_latents(q, q_rotary, cache, fed, scale)))
    errors.append(error_of_own_runs(heads, rank, rope, lengths, fed, scale))
    assert max(errors) < 2e-6, (heads, rank, rope, page_size, lengths, fed, errors)


def error_of_own_runs(heads: int, rank: int, rope: int, lengths: list[int], fed: list[int], scale: float) -> float:
    """Of the runs among them that begin at position 0, attending to keys and values; others must be left alone."""
    nope, value_dim = 24, 40
    starts = torch.tensor([0, *fed, 0]).cumsum(0).int()
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(lengths, fed, strict=True)])
    q, q_rotary = _strided(sum(fed), heads, nope), _strided(sum(fed), heads, rope)
    both, rotary = torch.randn(sum(fed), heads, nope + value_dim), torch.randn(sum(fed), 1, rope + rank)[..., rank:]
    out = torch.full((sum(fed), heads, value_dim), torch.nan)
    latent_launches.prefill_fresh(q, q_rotary, both, rotary, positions, starts, scale, out, OWN)
    worst = 0.0
    for row, (length, count) in enumerate(zip(lengths, fed, strict=True)):
        here = slice(int(starts[row]), int(starts[row + 1]))
        if count < length:
            assert out[here].isnan().all()
            continue
        keys = torch.cat((both[here, :, :nope], rotary[here].expand(-1, heads, -1)), dim=-1)
        wanted = dense(torch.cat((q[here], q_rotary[here]), dim=-1), keys, both[here, :, nope:], scale)
        worst = max(worst, error(out[here], wanted))
    return worst
