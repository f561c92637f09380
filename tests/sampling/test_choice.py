"""The ops' references, and the judge that the kernels' tests use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from sampling_cases import judge, needs, random_batch

from hybridgen.sampling.choice import choose_greedy, choose_sampled, reference_greedy

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), vocab=st.sampled_from([1, 2, 15, 300]), dtype=dtypes)
def test_the_reference_is_what_the_judge_expects(seed: int, vocab: int, dtype: torch.dtype) -> None:
    batch = random_batch(seed, 9, vocab, dtype)
    tokens = choose_sampled(*batch, *needs(batch))
    assert judge(batch, tokens) == []
    assert torch.equal(choose_sampled(*batch, True, True, True), tokens)
    assert torch.equal(choose_greedy(batch.logits), reference_greedy(batch.logits))


def test_the_judge_finds_wrong_tokens() -> None:
    batch = random_batch(3, 200, 300, torch.float32)
    tokens = choose_sampled(*batch, *needs(batch))
    other = torch.where(tokens == 17, 18, 17)
    assert len(judge(batch, other)) == 200
    moved = batch._replace(positions=batch.positions + 1)
    assert len(judge(moved, tokens)) > 50  # the noise of another position


def test_what_the_plan_leaves_out_is_not_looked_at() -> None:
    batch = random_batch(4, 50, 300, torch.float32)
    plain = batch._replace(reals=batch.reals.clone(), integers=batch.integers.clone())
    plain.integers[:, 1] = 0
    assert torch.equal(choose_sampled(*batch, False, True, True), choose_sampled(*plain, False, True, True))
    plain.reals[:, 1] = 1.0
    assert torch.equal(choose_sampled(*batch, False, False, True), choose_sampled(*plain, False, False, True))
    plain.reals[:, 2] = -torch.inf
    assert torch.equal(choose_sampled(*batch, False, False, False), choose_sampled(*plain, False, False, False))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_the_ops_are_custom_ops_as_torch_wants_them(rows: int) -> None:
    batch = random_batch(1, 3, 100, torch.float32)
    few = batch.rows(slice(0, rows))
    if rows:
        torch.library.opcheck(torch.ops.hybridgen.choose_greedy.default, (few.logits,))
        torch.library.opcheck(torch.ops.hybridgen.choose_sampled.default, (*few, True, True, True))
    assert choose_sampled(*few, True, True, True).shape == (rows,)
