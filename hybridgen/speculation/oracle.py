"""A drafter that knows what comes, for tests and benchmarks: as many of its drafts are right as it is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridgen.execution.drafting import DraftCall
from hybridgen.kernels.step.drafts import NO_DRAFT


class OracleDrafter:
    """Reads its drafts from sequences that are known already, and makes those behind the first few wrong.

    A row's sequence is the one that begins with the row's first token, so that it can be found on the device. Rows that
    begin otherwise have no drafts.
    """

    name = "oracle"

    def __init__(self, sequences: Sequence[Sequence[int]], right: Sequence[int], most: int | None = None) -> None:
        """
        Args:
            sequences: prompts with what is generated behind them; each begins with another token.
            right: of each sequence, how many drafts of a step are right.
            most: drafts of a row; None: as many as a step can check.

        Raises:
            ValueError: two sequences begin alike, or `right` is of another length.
        """
        if len({sequence[0] for sequence in sequences}) < len(sequences) or len(right) != len(sequences):
            raise ValueError("sequences begin with a token each of their own, and each has its number of right drafts")
        self._sequences = sequences
        self._right = right
        self._limit = most

    def begin(self, *, slots: int, context: int, vocab_size: int, count: int, device: torch.device) -> None:
        """Bring the sequences to the device; row 0 is of rows that are not known."""
        known = torch.full((len(self._sequences) + 1, context + count + 1), NO_DRAFT, dtype=torch.int64)
        which = torch.zeros(vocab_size, dtype=torch.int64)
        for index, sequence in enumerate(self._sequences, 1):
            known[index, : len(sequence)] = torch.tensor(sequence)
            which[sequence[0]] = index
        self._vocab_size = vocab_size
        self._known, self._which = known.to(device), which.to(device)
        self._first_wrong = torch.tensor([0, *self._right], device=device)
        self._places = torch.arange(count, device=device)
        self._outside = self._places >= (count if self._limit is None else self._limit)

    def tell(self, right: Sequence[int]) -> None:
        """From now on so many drafts are right."""
        self._first_wrong.copy_(torch.tensor([0, *right]))

    def draft(self, call: DraftCall) -> Tensor:
        """int64 [B, count]: the next tokens of each row's sequence, the wrong ones one above them."""
        which = self._which[call.text[call.slots, 0].long()]
        drafts = self._known[which[:, None], call.lengths[:, None] + self._places]
        drafts = drafts.masked_fill(self._outside, NO_DRAFT)
        wrong = self._places >= self._first_wrong[which][:, None]
        return torch.where(wrong & (drafts >= 0), (drafts + 1) % self._vocab_size, drafts)

    def tensors(self) -> dict[str, Tensor]:
        """All that `begin` made."""
        tables = {"known": self._known, "which": self._which, "first wrong": self._first_wrong}
        return tables | {"places": self._places, "outside": self._outside}
