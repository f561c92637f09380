"""The Triton kernel of `kernels.sampling.allowed` in Triton's interpreter; run by test_allowed.py."""

from __future__ import annotations

import torch

from hybridgen.kernels.sampling.allowed import keep_allowed
from hybridgen.kernels.sampling.allowed_kernels import launch


def check() -> None:
    """Vocabularies of several blocks and of part of one, rows in any order and none, NaN, all bits and none."""
    for seed, (rows, vocab, named) in enumerate(
        [(1, 5, [0]), (4, 200, [2, -1, 0]), (3, 64, [1]), (2, 130, [0, 1, -1])]
    ):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, vocab, generator=generator)
        logits[0, 3] = float("nan")
        bits = torch.randint(-(2**31), 2**31, (len(named), -(-vocab // 32) + seed), generator=generator).int()
        bits[0] = 0 if seed % 2 else -1
        ours, theirs = logits.clone(), logits.clone()
        launch(ours, torch.tensor(named), bits, block=64)
        keep_allowed(theirs, torch.tensor(named), bits)
        if not torch.equal(ours.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0)):
            raise AssertionError((seed, ours, theirs))
