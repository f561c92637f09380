"""What requests bring themselves: functions that change their row's logits, and functions that say when to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridgen.errors import RequestError, SamplingError, described, shown
from hybridgen.sampling.grammar import Constraint


class OwnProcessors:
    """The functions of one request, and how many tokens it has."""

    def __init__(self, functions: Sequence[Callable[..., Any]], prompt: int, generated: int) -> None:
        """
        Args:
            prompt: tokens of the prompt.
            generated: what was generated before.
        """
        from transformers import LogitsProcessor

        begun = [each.begin(prompt) if isinstance(each, Constraint) else each for each in functions]
        # transformers' own see a batch of one row.
        self._functions = [(function, isinstance(function, LogitsProcessor)) for function in begun]
        self.length = prompt + generated
        self.failure: str | None = None
        """Why the next token could not be chosen."""

    def apply(self, text: Tensor, scores: Tensor) -> Tensor:
        """What the functions make of a row; NaN everywhere if one fails.

        Args:
            text: int32 [context], the request's tokens by position.
            scores: float32 [V].
        """
        ids = text[: self.length].long()
        scores = scores.clone()
        for function, batched in self._functions:
            try:
                made = function(ids[None], scores[None]) if batched else function(ids, scores)
                scores = self._checked(made[0] if batched and isinstance(made, Tensor) else made, scores)
            except SamplingError as error:
                self.failure = self.failure or str(error)
                return torch.full_like(scores, torch.nan)
            except Exception as error:  # anybody's code
                self.failure = self.failure or f"its logits processor {shown(function)} failed: {described(error)}"
                return torch.full_like(scores, torch.nan)
        return scores

    @staticmethod
    def _checked(made: Any, before: Tensor) -> Tensor:
        if not isinstance(made, Tensor):
            raise TypeError(f"it returned {shown(made)}; return the logits, a tensor [vocab]")
        if made.shape != before.shape or not made.is_floating_point():
            kind = str(made.dtype).removeprefix("torch.")
            raise TypeError(f"it returned {kind} {list(made.shape)}; return floats {list(before.shape)}")
        return made.to(before)


class OwnRows(tuple[tuple[int, int, OwnProcessors], ...]):
    """Which rows of a step have functions of their own: (row, slot, functions)."""

    __slots__ = ()

    def apply(self, text: Tensor, scores: Tensor) -> Tensor:
        """Change those rows of the logits, float32 [B, V]; the others stay as they are. Returns a copy."""
        scores = scores.clone()
        for row, slot, own in self:
            scores[row] = own.apply(text[slot], scores[row])
        return scores

    def launched(self) -> None:
        """The step was launched: each has one more token."""
        for _, _, own in self:
            own.length += 1


def criteria_met(criteria: Sequence[Callable[..., Any]], prompt: Sequence[int], generated: Sequence[int]) -> bool:
    """Whether one of transformers' stopping criteria, or a function like them, ends a request here.

    Each is called with int64 [1, n] on the CPU, and None for the scores.

    Raises:
        RequestError: one returned something else than one truth value.
    """
    ids = torch.tensor([[*prompt, *generated]], device="cpu")
    for criterion in criteria:
        met = criterion(ids, None)
        if isinstance(met, Tensor) and met.numel() == 1:
            met = bool(met.item())
        if not isinstance(met, bool):
            raise RequestError(f"the stopping criterion {shown(criterion)} returned {shown(met)}; return True or False")
        if met:
            return True
    return False
