"""A drafter without a model: what came behind the same tokens earlier in the text."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridgen.execution.drafting import DraftCall
from hybridgen.kernels.step.ngrams import draft_ngrams

SHORTEST = 2
"""Tokens that have to agree."""
LONGEST = 8
"""Tokens that are compared at most."""


class NgramDrafter:
    """Prompt and output are searched; see `hybridgen.kernels.step.ngrams`."""

    name = "ngram"

    def begin(self, *, slots: int, context: int, vocab_size: int, count: int, device: torch.device) -> None:
        """Nothing to allocate."""

    def draft(self, call: DraftCall) -> Tensor:
        """int64 [B, count]; -1 for rows whose end comes for the first time."""
        return draft_ngrams(call.text, call.slots, call.lengths, SHORTEST, LONGEST, call.most)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is kept."""
        return {}
