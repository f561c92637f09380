"""The Triton kernel of `kernels.scoring` in Triton's interpreter; run by test_scoring.py."""

from __future__ import annotations

import torch

from hybridgen.kernels.scoring.logprobs import token_logprobs, with_likely
from hybridgen.kernels.scoring.logprobs_kernels import launch


def check() -> None:
    """Rows of several blocks and of part of one, ties across blocks, infinities and NaN."""
    inf = float("inf")
    for seed, (rows, vocab, k) in enumerate([(1, 5, 1), (7, 200, 4), (3, 64, 1), (2, 65, 0), (4, 130, 130)]):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, vocab, generator=generator) * 10
        if vocab > 100:
            logits[0, [70, 3, 120]] = 99.0  # ties across blocks
            logits[1, :70] = -inf
        targets = torch.randint(0, vocab, (rows,), generator=generator)
        ours, theirs = with_likely(logits, k, *launch(logits, targets, block=64)), token_logprobs(logits, targets, k)
        if not torch.equal(ours[1][:, 0], theirs[1][:, 0]) or (k > 1 and not torch.equal(ours[1], theirs[1])):
            raise AssertionError((seed, ours[1], theirs[1]))
        for one, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
            if not torch.allclose(one, other, atol=1e-5):
                raise AssertionError((seed, one, other))
    wrong = torch.tensor([[0.0, float("nan")] * 40])
    if not launch(wrong, torch.tensor([0]), block=64)[0].isnan().all():
        raise AssertionError("a NaN was lost")
