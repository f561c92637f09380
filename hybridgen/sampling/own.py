"""What requests bring themselves: functions that change their row's logits, and functions that say when to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridgen.errors import RequestError, described, shown
from hybridgen.sampling.grammar import Constraint, fill, fill_with_drafts


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
        """It gets one more token, from this row of a step; where drafts are checked, which nobody does beside
        functions, maybe several."""
        self.length += 1
        self._last = step, row

    def catch_up(self) -> None:
        """Go on in the grammar with what the last step brought, which it waits for; one in flight since runs on."""
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
        guided = [(row, own, own.grammar) for row, _, own in rows if own.grammar is not None]
        self._waiting = [own for _, own, _ in guided]
        self._grammars = [grammar for _, _, grammar in guided]
        self._guided_slots = [slot for _, slot, own in rows if own.grammar is not None]
        self.guided = tuple(row for row, _, _ in guided)
        """Rows with a grammar."""
        self.calls = any(own.functions for _, _, own in rows)
        """Whether some row has functions, which read its text."""

    def apply(self, text: Tensor | None, scores: Tensor) -> Tensor:
        """Change those rows of the logits, [B, V], by their functions; the others stay as they are. Returns a copy in
        float32.

        Args:
            text: int32 [slots, context], the tokens of each slot by position; None where no row has functions.
        """
        scores = scores.to(torch.float32, copy=True)
        if text is not None:
            for row, slot, own in self._rows:
                if own.functions:
                    scores[row] = own.apply(text[slot], scores[row])
        return scores

    def catch_up(self) -> None:
        """Wait for the step before, and go on in the grammars with its tokens."""
        for own in self._waiting:
            own.catch_up()

    def fill(self, bits: Tensor) -> None:
        """Write which tokens may come next in each of the `guided` rows: int32 [G, ceil(V / 32)], on the CPU."""
        fill(self._grammars, bits)

    def fill_with_drafts(self, bits: Tensor, drafts: Tensor) -> None:
        """The same for each place of a step that checks drafts.

        Args:
            bits: int32 [G * Q, ceil(V / 32)], on the CPU; the lines of a row follow each other.
            drafts: int64 [slots, Q - 1], on the CPU; below 0: none from here on.
        """
        fill_with_drafts(self._grammars, drafts[self._guided_slots].tolist(), bits)

    def launched(self, step: Sampled) -> None:
        """The step was launched: each gets what it brings."""
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
