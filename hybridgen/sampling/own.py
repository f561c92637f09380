"""What requests bring themselves: functions that change their row's logits, and functions that say when to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridgen.errors import RequestError, described, shown
from hybridgen.kernels.sampling.allowed import keep_allowed
from hybridgen.sampling.grammar import Constraint, fill


class Sampled(Protocol):
    """A step that was launched."""

    def fetch(self) -> Any:
        """Wait for it; `tokens` of what it returns are those of each row."""


class OwnProcessors:
    """The functions of one request, its grammar, and how many tokens it has."""

    def __init__(
        self, functions: Sequence[Callable[..., Any]], constraint: Constraint | None, prompt: int, generated: int
    ) -> None:
        """
        Args:
            prompt: tokens of the prompt.
            generated: how many were generated before.
        """
        from transformers import LogitsProcessor

        # transformers' own see a batch of one row.
        self.functions = [(function, isinstance(function, LogitsProcessor)) for function in functions]
        self.grammar = None if constraint is None else constraint.begin()
        self.length = prompt + generated
        self._failure: str | None = None
        self._last: tuple[Sampled, int] | None = None

    @property
    def failure(self) -> str | None:
        """Why the next token could not be chosen."""
        if self._failure is None and self.grammar is not None:
            return self.grammar.failure or (
                "no token is left that the grammar and the request's other fields allow, or the model gave no numbers"
            )
        return self._failure

    def launched(self, step: Sampled, row: int) -> None:
        """It gets one more token, from this row of a step."""
        self.length += 1
        self._last = step, row

    def catch_up(self) -> None:
        """Go on in the grammar with the token of the last step, which it waits for; one in flight since runs on."""
        if self._last is None or self.grammar is None:
            return
        step, row = self._last
        self._last = None
        for token in step.fetch().tokens[row]:
            if token >= 0:
                self.grammar.accept(token)

    def apply(self, text: Tensor, scores: Tensor) -> Tensor:
        """What the functions make of a row; NaN everywhere if one fails.

        Args:
            text: int32 [context], the request's tokens by position.
            scores: float32 [V].
        """
        ids = text[: self.length].long()
        scores = scores.clone()
        for function, batched in self.functions:
            try:
                made = function(ids[None], scores[None]) if batched else function(ids, scores)
                scores = self._checked(made[0] if batched and isinstance(made, Tensor) else made, scores)
            except Exception as error:  # anybody's code
                self._failure = self._failure or f"its logits processor {shown(function)} failed: {described(error)}"
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


class OwnRows:
    """Which rows of a step have functions or a grammar of their own."""

    def __init__(self, rows: Sequence[tuple[int, int, OwnProcessors]]) -> None:
        """
        Args:
            rows: (row, slot, what is its own).
        """
        self._rows = tuple(rows)
        self._guided = [(row, own, own.grammar) for row, _, own in rows if own.grammar is not None]
        self._places: Tensor | None = None
        self.calls = any(own.functions for _, _, own in rows)
        """Whether some row has functions, which read its text."""

    def apply(self, text: Tensor | None, scores: Tensor) -> Tensor:
        """Change those rows of the logits, [B, V], by their functions and then by their grammars; the others stay as
        they are. Returns a copy, float32 where there are functions.

        Args:
            text: int32 [slots, context], the tokens of each slot by position; None where no row has functions.
        """
        scores = scores.to(torch.float32 if self.calls else scores.dtype, copy=True)
        if text is not None:
            for row, slot, own in self._rows:
                if own.functions:
                    scores[row] = own.apply(text[slot], scores[row])
        if self._guided:
            self._guide(scores)
        return scores

    def _guide(self, scores: Tensor) -> None:
        """-inf for what the grammars do not allow. The host waits for the step before; the forward of this one runs."""
        on_cuda = scores.is_cuda
        if self._places is None or self._places.device != scores.device:
            rows = torch.tensor([row for row, _, _ in self._guided], dtype=torch.int64, pin_memory=on_cuda)
            self._places = rows.to(scores.device, non_blocking=True)
        for _, own, _ in self._guided:
            own.catch_up()
        shape = len(self._guided), -(-scores.shape[1] // 32)
        bits = torch.empty(shape, dtype=torch.int32, device="cpu", pin_memory=on_cuda)  # kept until it is copied
        fill([grammar for _, _, grammar in self._guided], bits)
        keep_allowed(scores, self._places, bits.to(scores.device, non_blocking=True))

    def launched(self, step: Sampled) -> None:
        """The step was launched: each gets one more token from it."""
        for row, _, own in self._rows:
            own.launched(step, row)


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
