"""`choose_greedy` and `choose_sampled` on a GPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from sampling_cases import Batch, judge, needs, random_batch, tables

from hybridgen.kernels.sampling.allowed import keep_allowed
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerState, resolve, sample
from hybridgen.sampling.choice import choose_greedy, choose_sampled, reference_greedy, reference_sampled

if torch.cuda.is_available():  # it imports Triton
    from hybridgen.kernels.sampling.ops import launch_greedy, launch_sampled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FILTERS = {
    "temperature": {},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.95},
    "min-p": {"min_p": 0.05},
    "all": {"top_k": 200, "top_p": 0.9, "min_p": 0.01},
}


def poison() -> None:
    """Leave something else in the memory that the next scratch comes from."""
    junk = [torch.full((n,), 0x7FFFFFFFFFFFFFFF, device="cuda") for n in (100, 5000, 100_000, 1_000_000)]
    del junk


def same(rows: int, vocab: int, scale: float, dtype: torch.dtype, **fields: float) -> Batch:
    """Rows with one set of parameters and a seed each."""
    generator = torch.Generator("cuda").manual_seed(rows)
    logits = (torch.randn(rows, vocab, generator=generator, device="cuda") * scale).to(dtype)
    reals, integers = tables([{"temperature": 0.8, "seed": 77 + row, **fields} for row in range(rows)])
    slots = torch.arange(rows)
    return Batch(logits, reals.cuda(), integers.cuda(), slots.cuda(), (slots + 5).cuda())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 15, 1000, 1024, 1025, 5003, 32000])
def test_random_rows_against_the_judge(vocab: int, dtype: torch.dtype) -> None:
    for seed in range(12):
        batch = random_batch(seed, 17, vocab, dtype).to("cuda")
        poison()
        assert judge(batch, choose_sampled(*batch, *needs(batch))) == []
        assert torch.equal(choose_greedy(batch.logits), reference_greedy(batch.logits))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("vocab", [128256, 151936, 262144])
def test_large_vocabularies_against_the_reference(vocab: int, scale: float, name: str) -> None:
    for dtype in DTYPES:
        batch = same(32, vocab, scale, dtype, **FILTERS[name])
        tokens = choose_sampled(*batch, *needs(batch))
        assert judge(batch, tokens) == []
        expected = reference_sampled(*batch, *needs(batch))
        assert (tokens == expected).sum() >= 31  # the judge allows for last bits, which are seldom decisive
        assert torch.equal(choose_greedy(batch.logits), reference_greedy(batch.logits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(dtype: torch.dtype) -> None:
    batch = random_batch(5, 300, 40_000, dtype).to("cuda")
    together = choose_sampled(*batch, True, True, True)
    for _ in range(3):
        poison()
        assert torch.equal(choose_sampled(*batch, True, True, True), together)
    order = torch.randperm(300).tolist()
    assert torch.equal(choose_sampled(*batch.rows(order), True, True, True), together[order])
    for row in range(0, 300, 7):
        alone = batch.rows(slice(row, row + 1))
        assert choose_sampled(*alone, True, True, True) == together[row]
        assert choose_sampled(*alone, *needs(alone)) == together[row]  # a smaller plan, other kernels
    wide = batch._replace(logits=batch.logits.float())  # what a row with penalties in the batch causes
    assert torch.equal(choose_sampled(*wide, True, True, True), together)


@pytest.mark.parametrize("vocab", [1, 1025, 5003, 151936])
def test_one_pass_gives_unfiltered_rows_what_all_kernels_give_them(vocab: int) -> None:
    temperatures = (1e-32, 1e-4, 0.1, 0.6, 1.0, 3.0, 100.0, 1e32)
    for seed, dtype in enumerate(DTYPES * 3):
        batch = random_batch(seed, 200, vocab, dtype).to("cuda")
        batch.reals[:, 0] = torch.tensor(temperatures, device="cuda").repeat(26)[: len(batch.reals)]
        batch.reals[:, 1:3] = torch.tensor([1.0, -math.inf], device="cuda")
        batch.integers[:, 1] = 0
        poison()
        assert torch.equal(choose_sampled(*batch, False, False, False), choose_sampled(*batch, True, True, True))


@pytest.mark.parametrize("block", [128, 512, 2048, 4096])
def test_no_result_depends_on_the_block(block: int) -> None:
    batch = random_batch(8, 40, 20_000, torch.bfloat16).to("cuda")
    for needed in (True, False):
        plan = (needed,) * 3
        assert torch.equal(launch_sampled(*batch, *plan, block=block), launch_sampled(*batch, *plan))
    assert torch.equal(launch_greedy(batch.logits, block=block), launch_greedy(batch.logits))


@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_a_replay_gives_what_the_call_gives(rows: int) -> None:
    vocab = 128256 if rows < 4096 else 3000
    batch = same(rows, vocab, 2.0, torch.bfloat16, top_k=300, top_p=0.9, min_p=0.001)
    for call in (
        lambda: choose_sampled(*batch, True, True, True),
        lambda: choose_sampled(*batch, False, False, False),
        lambda: choose_greedy(batch.logits),
    ):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first, second = call(), call()
        for turn in range(5):
            batch.positions.add_(turn)
            batch.logits.copy_(batch.logits.roll(turn * 11, 1))
            graph.replay()
            expected = call()
            assert torch.equal(first, expected)
            assert torch.equal(second, expected)


def test_logits_that_are_not_adjacent_or_aligned() -> None:
    batch = random_batch(3, 9, 5001, torch.bfloat16).to("cuda")
    expected, unfiltered = (choose_sampled(*batch, *plan) for plan in ((True,) * 3, (False,) * 3))
    padded = torch.zeros(9, 6000, dtype=torch.bfloat16, device="cuda")
    for start in (0, 1, 8):
        padded[:, start : start + 5001] = batch.logits
        view = batch._replace(logits=padded[:, start : start + 5001])
        assert torch.equal(choose_sampled(*view, True, True, True), expected)
        assert torch.equal(choose_sampled(*view, False, False, False), unfiltered)
        assert torch.equal(choose_greedy(view.logits), choose_greedy(batch.logits))
    turned = batch._replace(logits=batch.logits.t().contiguous().t())
    assert torch.equal(choose_sampled(*turned, True, True, True), expected)


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_distribution(name: str) -> None:
    vocab, draws = 1500, 40_000
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(1)).mul(2).cuda()
    reals, integers = tables([{"temperature": 0.8, "seed": 3, **FILTERS[name]}])
    logits = row.expand(draws, vocab).contiguous()
    slots = torch.zeros(draws, dtype=torch.int64, device="cuda")
    positions = torch.arange(draws, device="cuda")
    batch = Batch(logits, reals.cuda(), integers.cuda(), slots, positions)
    counts = torch.bincount(choose_sampled(*batch, *needs(batch)), minlength=vocab).double().cpu()
    exact = _probabilities(row.cpu(), **FILTERS[name])
    assert _chi2_deviations(counts, exact) < 4
    assert _chi2_deviations(counts, exact**1.15 / (exact**1.15).sum()) > 4  # the test can tell


def _probabilities(row: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """float64 [V], written anew: sort, cut, normalise."""
    values, ids = (row.double() / 0.8).sort(descending=True)
    share = values.softmax(0)
    if top_k:
        share[top_k:] = 0
        share /= share.sum()
    if top_p < 1:
        share[share.cumsum(0) - share >= top_p] = 0
    share[share < min_p * share[0]] = 0
    return torch.zeros_like(share).scatter(0, ids, share / share.sum())


def _chi2_deviations(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations the chi-square statistic is above its mean (Wilson and Hilferty 1931)."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    k = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


def test_sample_on_the_gpu_is_sample_on_the_cpu() -> None:
    vocab = 500
    requests = [
        {},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 20, "min_p": 0.05, "logprobs": 3},
        {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"logit_bias": {5: 9.0, 7: -math.inf}},
        {"temperature": 1.2, "min_new_tokens": 5, "stop_token_ids": [9]},
        {"logprobs": 0},
    ]
    for which in (range(7), [0], [1], [0, 1], [2], [3, 4], [5, 6]):
        outputs = []
        for device in ("cpu", "cuda"):
            state = SamplerState(7, vocab, device)
            for slot in which:
                params = resolve(SamplingParams(**requests[slot], seed=slot), None, (2,), vocab)
                state.assign(slot, params, [1, 2, 3], [4, 4, 5])
            plan = state.needs(list(which))
            slots = torch.tensor(list(which), device=device)
            for seed in range(10):
                logits = torch.randn(len(slots), vocab, generator=torch.Generator().manual_seed(seed)) * 3
                logits[0, 9] = math.nan if seed == 9 else 0.0
                generated = torch.full_like(slots, 3)
                outputs.append(sample(logits.to(device), state, slots, generated + seed, generated, plan))
        for mine, theirs in zip(outputs[10:], outputs[:10], strict=True):
            assert torch.equal(mine.tokens.cpu(), theirs.tokens)
            if theirs.logprobs is not None:
                torch.testing.assert_close(mine.logprobs.cpu(), theirs.logprobs, equal_nan=True)


def test_what_the_kernels_do_not_take() -> None:
    with pytest.raises(TypeError, match="float64"):
        choose_greedy(torch.zeros(1, 5, dtype=torch.float64, device="cuda"))
    with pytest.raises(ValueError, match="vocabulary"):
        choose_greedy(torch.zeros(1, 2**19, device="cuda"))
    assert choose_greedy(torch.zeros(0, 5, device="cuda")).shape == (0,)


def test_the_ops_are_custom_ops_as_torch_wants_them() -> None:
    batch = random_batch(1, 3, 100, torch.float32).to("cuda")
    torch.library.opcheck(torch.ops.hybridgen.choose_greedy.default, (batch.logits,))
    torch.library.opcheck(torch.ops.hybridgen.choose_sampled.default, (*batch, True, True, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (32, 128256), (7, 4097)])
def test_masks_of_grammars_are_those_of_the_reference(rows: int, vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    logits[0, 2] = math.nan
    named = torch.randperm(rows, generator=generator)[: rows - rows // 3]
    bits = torch.randint(-(2**31), 2**31, (len(named), -(-vocab // 32)), generator=generator).int()
    expected, found = logits.clone(), logits.cuda()
    named[len(named) // 2 :: 5] = -1  # lines for nobody
    keep_allowed(expected, named, bits)
    keep_allowed(found, named.cuda(), bits.cuda())
    assert torch.equal(found.cpu().nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
