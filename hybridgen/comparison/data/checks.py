"""How far a subject's logits are from mode eager's.

The engine reports log-probabilities: logits less the logarithm of their sum of exponentials, in float32. The error of a
cell is the largest difference, in nats, over the tokens that mode eager finds most likely, at every position up to and
including the first where the outputs differ: until there both had the same input. A token that mode eager finds likely
and the subject does not report at all counts as if it were as likely as the last one reported: the error is that at
least. A value that is no number is an infinite error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hybridgen.core import Completion
from hybridgen.params import MAX_LOGPROBS

CANDIDATES = 20
"""Tokens per position that are compared."""


def logit_error(ours: Sequence[Completion], reference: Sequence[Completion]) -> float | None:
    """The largest difference; None where there is nothing to compare."""
    worst: float | None = None
    for mine, theirs in zip(ours, reference, strict=True):
        for at, (logprob, expected) in enumerate(zip(mine.logprobs or (), theirs.logprobs or (), strict=False)):
            found = dict(logprob.top)
            least = min(found.values(), default=-math.inf)
            for token, value in expected.top[:CANDIDATES]:
                error = abs(found[token] - value) if token in found else max(0.0, value - least)
                worst = max(worst or 0.0, error if math.isfinite(error) else math.inf)
            if mine.token_ids[at] != theirs.token_ids[at]:
                break
    return worst


REPORTED = min(MAX_LOGPROBS, 2 * CANDIDATES)
"""Asked for: more than are compared, so that a token that lost a few places is still among them."""
