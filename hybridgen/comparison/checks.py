"""How far a subject's logits are from mode eager's.

The engine reports log-probabilities: logits less the logarithm of their sum of exponentials, in float32. The error of a
cell is the largest difference, in nats, over the tokens that mode eager finds most likely, at every position up to and
including the first where the outputs differ: until there both had the same input. The positions' most likely tokens
are compared where both subjects report them.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridgen.core import MAX_LOGPROBS, Completion

CANDIDATES = 20
"""Tokens per position that are compared."""


def logit_error(ours: Sequence[Completion], reference: Sequence[Completion]) -> float:
    """The largest difference; 0 where nothing can be compared, which is no token at all."""
    worst = 0.0
    for mine, theirs in zip(ours, reference, strict=True):
        for at, (logprob, expected) in enumerate(zip(mine.logprobs or (), theirs.logprobs or (), strict=False)):
            found = dict(logprob.top)
            for token, value in expected.top[:CANDIDATES]:
                if token in found:
                    worst = max(worst, abs(found[token] - value))
            if mine.token_ids[at] != theirs.token_ids[at]:
                break
    return worst


REPORTED = min(MAX_LOGPROBS, 2 * CANDIDATES)
"""Asked for: more than are compared, so that a token that lost a few places is still among them."""
