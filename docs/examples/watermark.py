"""A watermark: half of the vocabulary, chosen by the token before, is favoured (arXiv:2301.10226), and found again.

python docs/examples/watermark.py [MODEL]
"""

import itertools
import math
import sys

import torch

import hybridgen

BIAS = 6.0


def green(before: torch.Tensor, vocab: int) -> torch.Tensor:
    """Which ids are favoured behind a token: about half. On the device, without waiting for it."""
    ids = torch.arange(vocab, device=before.device)
    mixed = (ids + before * 40503 + 12345) * 2654435761 % 4294967296
    return (mixed >> 16) % 2 == 0


def watermark(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits + BIAS * green(ids[-1], len(logits))


def z_score(ids: tuple[int, ...], vocab: int) -> float:
    """By how many standard deviations there are more favoured tokens than chance gives."""
    pairs = itertools.pairwise(ids)
    hits = sum(bool(green(torch.tensor(before), vocab)[token]) for before, token in pairs)
    count = len(ids) - 1
    return (hits - count / 2) / math.sqrt(count / 4)


model = sys.argv[1] if len(sys.argv) > 1 else None
with hybridgen.Engine.load(model) as engine:
    vocab = engine.checkpoint.vocab_size
    fields = {"max_new_tokens": 80, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    plain = engine.generate("def main():\n", **fields)
    marked = engine.generate("def main():\n", logits_processors=[watermark], **fields)

print(
    f"z-score without {z_score(plain.token_ids, vocab):.1f}, with the watermark {z_score(marked.token_ids, vocab):.1f}"
)
