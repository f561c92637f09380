"""Triton's sampling kernels in Triton's interpreter; run by test_sampling_triton.py.

A script of its own because TRITON_INTERPRET is read when Triton is imported.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from sampling_cases import judge, needs, random_batch

from hybridgen.kernels import sampling
from hybridgen.sampling.choice import reference_greedy, reference_sampled

_agreed = [0, 0]
"""Tokens that were the reference's, and all."""


def _poisoned(count: int, device: torch.device) -> torch.Tensor:
    return torch.full((count,), 2**63 - 1, device=device)


@seed(4)
@settings(max_examples=int(os.environ.get("EXAMPLES", "24")), deadline=None, database=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([1, 2, 15, 64, 65, 150]),
    dtype=st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
)
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


def main() -> None:
    sampling._scratch = _poisoned
    check()
    # A larger plan than the rows need, and other blocks.
    batch = random_batch(1, 4, 100, torch.float32)
    batch.reals[:, 1] = 1.0
    small = sampling.launch_sampled(*batch, True, False, block=64)
    assert torch.equal(sampling.launch_sampled(*batch, True, True, block=32), small)
    # The judge allows for last bits, which are seldom decisive.
    assert _agreed[0] >= 0.98 * _agreed[1], _agreed


if __name__ == "__main__":
    main()
