"""Triton's sampling kernels in Triton's interpreter; run by test_sampling_triton.py."""

from __future__ import annotations

import itertools
import random
from unittest.mock import patch

import ptx
import torch
import triton
import triton.language as tl
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from sampling_cases import INF, Batch, judge, needs, random_batch, tables
from sampling_history_cases import random_tables

from hybridgen.kernels.sampling import first_kernels, kernels
from hybridgen.kernels.sampling import ops as sampling
from hybridgen.kernels.sampling.arithmetic import (
    ROUGH,
    distance,
    gumbel,
    key_value,
    mass_of,
    ordered,
    rank_key,
    rough_gumbel,
    stream_key,
)
from hybridgen.kernels.sampling.history_kernels import launch_history, launch_remember
from hybridgen.sampling.choice import reference_greedy, reference_sampled
from hybridgen.sampling.history import apply_history, remember
from hybridgen.sampling.random import gumbel_noise

_agreed = [0, 0]
"""Tokens that were the reference's, and all."""


ptx.install()


def _poisoned(count: int, device: torch.device) -> torch.Tensor:
    return torch.full((count,), 2**63 - 1, device=device)


def check(seed: int, vocab: int, dtype: torch.dtype) -> None:
    batch = random_batch(seed, 4, vocab, dtype)
    tokens = sampling.launch_sampled(*batch, *needs(batch), block=64)
    wrong = judge(batch, tokens)
    assert not wrong, wrong
    greedy = sampling.launch_greedy(batch.logits, block=32)
    assert torch.equal(greedy, reference_greedy(batch.logits))
    expected = reference_sampled(*batch, *needs(batch))
    _agreed[0] += int((tokens == expected).sum())
    _agreed[1] += len(tokens)


@triton.jit
def _functions(  # type: ignore[no-untyped-def]
    x, noise, rough, order, again, far, mass, seed, position, temperature, BLOCK: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    key = stream_key(tl.load(seed), tl.load(position))
    tl.store(noise + i, gumbel(key, i))
    tl.store(rough + i, rough_gumbel(key, i))
    tl.store(order + i, ordered(values))
    tl.store(again + i, key_value(rank_key(values, SHIFT), SHIFT))
    away = distance(values, tl.max(values, 0), tl.load(temperature))
    tl.store(far + i, away)
    tl.store(mass + i, mass_of(away))


def check_functions() -> None:
    """Each function of `sampling_math` beside torch's."""
    count = 4096
    for dtype, shift in ((torch.bfloat16, 16), (torch.float16, 13), (torch.float32, 0)):
        generator = torch.Generator().manual_seed(shift)
        bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).int()
        values = bits.view(torch.float32).nan_to_num(0.0).clamp(-6e4, 6e4)
        values[:100] = torch.randn(100, generator=generator) * 5
        values[100:104] = torch.tensor([0.0, -0.0, -INF, 2.0**-24])
        values = values.to(dtype).float()
        noise, rough, again, far = (torch.empty(count) for _ in range(4))
        order, mass = torch.empty(count, dtype=torch.int32), torch.empty(count, dtype=torch.int64)
        seed, position = torch.tensor([-(2**62) - shift]), torch.tensor([2**33 + shift])
        temperature = torch.tensor([0.7])
        outputs = noise, rough, order, again, far, mass
        _functions[(1,)](values, *outputs, seed, position, temperature, BLOCK=count, SHIFT=shift)
        torch.testing.assert_close(noise, gumbel_noise(seed, position, count)[0], rtol=2e-6, atol=2e-7)
        assert (rough - noise).abs().max() < ROUGH.value / 3
        assert torch.equal(again, values)
        assert torch.equal(values[order.argsort()], values.sort().values)
        tempered = (values.max() - values) / temperature
        assert torch.equal(far, tempered)
        torch.testing.assert_close(mass.double() * 2.0**-44, (-tempered.double()).exp(), rtol=2.0**-19, atol=2.0**-44)


def check_ties_across_blocks() -> None:
    """Of equal tokens the first enter: the edge is in the second block of three."""
    sampling._scratch = _poisoned
    rows, vocab = 12, 150
    reals, integers = tables([{"temperature": 1.0, "top_p": 0.595, "seed": 1}])
    slots, positions = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
    batch = Batch(torch.full((rows, vocab), 2.5, dtype=torch.bfloat16), reals, integers, slots, positions)
    tokens = sampling.launch_sampled(*batch, False, True, False, block=64)
    assert torch.equal(tokens, reference_sampled(*batch, False, True, False))
    assert 64 <= tokens.max() < 90  # 0.595 * 150 = 89.25


def check_history() -> None:
    """Sequences, n-grams and the text they are looked for in."""
    for case in range(12):
        tables = random_tables(case)
        bias, history, *_, slots, lengths = tables
        launch_history(*tables)
        expected = torch.zeros_like(bias)
        apply_history(expected, *tables[1:])
        assert torch.equal(bias, expected)
        chosen = torch.arange(-1, len(slots) - 1)
        written = history.clone()
        launch_remember(chosen, slots, lengths, written)
        remember(chosen, slots, lengths, history)
        assert torch.equal(written, history)


def check_batches(examples: int) -> None:
    """Random batches, judged; the judge allows for last bits, which are seldom decisive."""
    sampling._scratch = _poisoned
    _agreed[:] = 0, 0
    vocabs = st.sampled_from([1, 2, 15, 64, 65, 150])
    dtypes = st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    drawn = given(seed=st.integers(0, 2**31), vocab=vocabs, dtype=dtypes)(check)
    seed(4)(settings(max_examples=examples, deadline=None, database=None)(drawn))()
    assert _agreed[0] >= 0.98 * _agreed[1], _agreed


def check_plans() -> None:
    """A larger plan than the rows need, and other blocks."""
    sampling._scratch = _poisoned
    batch = random_batch(1, 4, 100, torch.float32)
    batch.reals[:, 1] = 1.0
    small = sampling.launch_sampled(*batch, True, False, True, block=64)
    assert torch.equal(sampling.launch_sampled(*batch, True, True, True, block=32), small)
    for case, vocab in enumerate((100, 1, 64)):
        batch = random_batch(case, 6, vocab, torch.bfloat16)
        batch.reals[:, 1:3] = torch.tensor([1.0, -INF])
        batch.integers[:, 1] = 0
        small = sampling.launch_sampled(*batch, False, False, False, block=64)
        assert torch.equal(sampling.launch_sampled(*batch, False, False, True, block=32), small)


@triton.jit
def _open(record, top_k, top_p, log_min_p):  # type: ignore[no-untyped-def]
    """As if no row that draws were settled."""
    return tl.load(record + 1).to(tl.int32).to(tl.float32, bitcast=True) < 0


def check_settled() -> None:
    """A row that is settled early has the token that selection gives it."""
    sampling._scratch = _poisoned
    source = random.Random(0)
    filters = itertools.product((0, 5), (1.0, 0.6), (0.0, 0.2))
    requests = [{**dict(zip(("top_k", "top_p", "min_p"), some, strict=True)), "temperature": 1.0} for some in filters]
    for vocab, times in ((60, 6), (100, 1)):
        reals, integers = tables([{**request, "seed": source.randrange(2**31)} for request in times * requests])
        rows = torch.arange(len(reals))
        logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(vocab))
        batch = Batch(logits, reals, integers, rows, rows)
        tokens = sampling.launch_sampled(*batch, True, True, True, block=64)
        with patch.object(kernels, "_settled", _open):
            assert torch.equal(sampling.launch_sampled(*batch, True, True, True, block=64), tokens)
    # Where the best token of all is often the first that is left out.
    rows = torch.arange(16)
    for fields, logits in (({"top_k": 3}, torch.linspace(0, -0.01, 6)), ({"top_p": 0.5}, torch.zeros(6))):
        reals, integers = tables([{"temperature": 1.0, "seed": 5, **fields}])
        batch = Batch(logits.expand(16, 6).contiguous(), reals, integers, torch.zeros_like(rows), rows)
        tokens = sampling.launch_sampled(*batch, *needs(batch), block=16)
        assert set(tokens.tolist()) == {0, 1, 2}


@triton.jit
def _shaken(key, ids):  # type: ignore[no-untyped-def]
    """Noise that is 0.45 too high or too low."""
    return gumbel(key, ids) + tl.where(ids & 1, 0.45, -0.45)


def check_rough() -> None:
    """Tokens do not depend on how good rough noise is, nor on rough distances."""
    sampling._scratch = _poisoned
    rows = torch.arange(16)
    logits = torch.randn(16, 150, generator=torch.Generator().manual_seed(0))
    reals, integers = tables([{"temperature": 1.0, "top_k": 60, "seed": row} for row in range(16)])
    batch = Batch(logits, reals, integers, rows, rows)
    for top_k, module in ((True, kernels), (False, kernels), (False, first_kernels)):
        plan = top_k, False, module is kernels
        exact = sampling.launch_sampled(*batch, *plan, block=64)
        with patch.object(module, "ROUGH", tl.constexpr(0.5)), patch.object(module, "rough_gumbel", _shaken):
            assert torch.equal(sampling.launch_sampled(*batch, *plan, block=64), exact)
    # At temperatures with no inverse in float32.
    reals[:, 0] = torch.tensor([3e-42, 1e-38, 1.0, 1e38]).repeat(4)
    batch = batch._replace(logits=logits[:, :70] * reals[:, :1])
    tokens = sampling.launch_sampled(*batch, False, False, False, block=32)
    assert torch.equal(sampling.launch_sampled(*batch, False, False, True, block=32), tokens)
    # Blocks in which all tokens are as good as each other, or none can be chosen.
    logits = torch.full((3, 70), 1e-3)
    logits[1, :64] = -INF
    logits[2, 3:] = -INF
    batch = Batch(logits, reals[2:3], integers[2:3], torch.zeros(3, dtype=torch.int64), rows[:3])
    module = first_kernels
    with patch.object(module, "ROUGH", tl.constexpr(32.0)), patch.object(module, "rough_gumbel", _flat):
        tokens = sampling.launch_sampled(*batch, False, False, False, block=32)
    assert torch.equal(sampling.launch_sampled(*batch, False, False, True, block=32), tokens)
    assert tokens[1] >= 64
    assert 0 <= tokens[2] < 3


@triton.jit
def _flat(key, ids):  # type: ignore[no-untyped-def]
    """No noise at all, so that every block is open."""
    return ids * 0.0
