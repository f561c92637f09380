"""The ring in which steps leave what they produced, and the host's view of one step's line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hybridgen.core import TokenLogprob
from hybridgen.device.mapped import host_mapped
from hybridgen.execution.plan import DraftCounts, StepOutput
from hybridgen.kernels.step.advance import REJECTED, advance, publish
from hybridgen.params import MAX_LOGPROBS
from hybridgen.sampling import SampleOutput

LINES = 8
"""Steps that can be in flight; the loop has at most two prefill and two decode calls."""


class TokenRing:
    """Outputs of the last steps, in host memory that the device writes to as part of the step.

    On CUDA the memory is pinned and mapped into the device's address space, so that a step needs no copy after it: an
    event behind the step says when its line can be read.
    """

    def __init__(self, max_batch: int, device: torch.device, *, query_len: int = 1, tells_drafts: bool = False) -> None:
        """
        Args:
            query_len: tokens of a row in a step at most.
            tells_drafts: steps say what became of drafts.
        """
        self.device = device
        width = max_batch * query_len + 1  # never a step's size: see `ModelSteps`
        self.tokens, self._host_tokens = host_mapped((LINES, width), torch.int64, device)
        self.logprobs, self._host_logprobs = host_mapped((LINES, width), torch.float32, device)
        top = (LINES, width, MAX_LOGPROBS)
        self.top_ids, self._host_top_ids = host_mapped(top, torch.int64, device)
        self.top_logprobs, self._host_top_logprobs = host_mapped(top, torch.float32, device)
        counts = LINES, max_batch + 1, len(DraftCounts._fields)
        self.drafts, self._host_drafts = host_mapped(counts, torch.int64, device)
        self._tells_drafts = tells_drafts
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        """int64 [1]: steps that ran, on the device."""
        self.check: Callable[[], object] = _nothing
        """Called after each wait for a step; raises where what it left is not to be used."""
        self.waiting: AbstractContextManager[Any] = nullcontext()
        """Entered for each wait."""
        self._launched = 0
        self._steps: list[LaunchedStep | None] = [None] * LINES
        self._events = [torch.cuda.Event() for _ in range(LINES)] if device.type == "cuda" else None

    def tensors(self) -> dict[str, Tensor]:
        """What steps read and write, by name."""
        tops = {"ring of top ids": self.top_ids, "ring of top log-probabilities": self.top_logprobs}
        tops |= {"ring of drafts": self.drafts} if self._tells_drafts else {}
        return {"ring": self.tokens, "ring of log-probabilities": self.logprobs, **tops, "counter": self.counter}

    def finish(
        self,
        sampled: SampleOutput,
        rows: Tensor,
        lengths: Tensor,
        generated: Tensor,
        table: Tensor,
        counts: Tensor | None = None,
        drafts: Tensor | None = None,
    ) -> None:
        """Part of a step: publish what was sampled, and make it the rows' state (`kernels.step.advance`).

        Args:
            drafts: int64 [B, 3], by row `DraftCounts`.
        """
        if sampled.logprobs is not None:
            publish(sampled.logprobs, self.logprobs, self.counter)
        if sampled.top_ids is not None and sampled.top_logprobs is not None:
            publish(sampled.top_ids, self.top_ids, self.counter)
            publish(sampled.top_logprobs, self.top_logprobs, self.counter)
        if drafts is not None:
            publish(drafts, self.drafts, self.counter)
        advance(sampled.tokens, rows, lengths, generated, table, self.tokens, self.counter, counts)

    def reserve(self) -> None:
        """Before a step is launched: read the line that it will overwrite, if nobody has yet."""
        previous = self._steps[self._launched % LINES]
        if previous is not None:
            previous.fetch()

    def drain(self) -> None:
        """Read every line that nobody has read yet: steps that are not for anybody are about to run."""
        for step in self._steps:
            if step is not None:
                step.fetch()

    def launched(self, rows: int, logprobs: int | None, kind: str, reason: str, query_len: int = 1) -> LaunchedStep:
        """After a step was launched: the handle that reads its line.

        Args:
            rows: how many rows of it belong to requests.
            logprobs: the largest number of top log-probabilities that a row wants; None: no row wants any.
            query_len: tokens of a row that were fed, and so at most how many each brings.
        """
        line = self._launched % LINES
        if self._events is not None:
            self._events[line].record()
        step = self._steps[line] = LaunchedStep(self, line, rows, logprobs, kind, reason, query_len)
        self._launched += 1
        return step

    def resynchronize(self) -> None:
        """Set the device's counter to the host's: after a step that failed, or one that was not for anybody."""
        self.counter.fill_(self._launched)

    def wait(self, line: int) -> None:
        """Wait until the step of this line has run."""
        if self._events is not None:
            with self.waiting:
                self._events[line].synchronize()
        self.check()

    def read(self, line: int, rows: int, logprobs: int | None, query_len: int = 1) -> StepOutput:
        """What the step of this line left; it must have run."""
        count = rows * query_len
        tokens = self._host_tokens[line, :count].reshape(rows, query_len).tolist()
        if query_len > 1:
            tokens = [[token for token in row if token != REJECTED] for row in tokens]
        drafts = None
        if self._tells_drafts:
            drafts = [DraftCounts(*row) for row in self._host_drafts[line, :rows].tolist()]
        if logprobs is None:
            return StepOutput(tokens, None, drafts)
        values = self._host_logprobs[line, :count].tolist()
        ids = self._host_top_ids[line, :count, :logprobs].tolist()
        tops = self._host_top_logprobs[line, :count, :logprobs].tolist()
        found = []
        for row, accepted in enumerate(tokens):
            first = row * query_len
            found.append(
                [
                    TokenLogprob(token, values[i], tuple(zip(ids[i], tops[i], strict=True)))
                    for i, token in enumerate(accepted, first)
                ]
            )
        return StepOutput(tokens, found, drafts)


def _nothing() -> None:
    return None


class Scores(Protocol):
    """Log-probabilities on their way to the host."""

    def read(self) -> list[list[TokenLogprob]]:
        """Wait for them: those of each prompt that has some, in the order of the call."""


class States(Protocol):
    """Hidden states on their way to the host."""

    def read(self) -> list[Tensor]:
        """Wait for them: those of each prompt that wants some, in the order of the call."""


class LaunchedStep:
    """A step that was launched; `read()` waits for it alone, while later ones run."""

    __slots__ = ("_line", "_logprobs", "_output", "_query_len", "_ring", "hidden", "kind", "reason", "rows", "scores")

    def __init__(
        self,
        ring: TokenRing,
        line: int,
        rows: int,
        logprobs: int | None,
        kind: str,
        reason: str,
        query_len: int = 1,
    ) -> None:
        self._ring = ring
        self._line = line
        self._logprobs = logprobs
        self._query_len = query_len
        self._output: StepOutput | None = None
        self.rows = rows
        """Rows that it sampled for; 0 when no prompt ended in it."""
        self.kind = kind
        """How it ran: see `StepSummary.kind`."""
        self.reason = reason
        """Why it ran that way."""
        self.scores: Scores | None = None
        """Of a prefill whose prompts it tells log-probabilities of."""
        self.hidden: States | None = None
        """Of a prefill that hidden states are wanted of."""

    def fetch(self) -> StepOutput:
        """Wait for the step; what it produced is kept from then on."""
        if self._output is None:
            self._ring.wait(self._line)
            self._output = self._ring.read(self._line, self.rows, self._logprobs, self._query_len)
        return self._output

    def read(self) -> StepOutput:
        """Wait for the step and return what it produced."""
        return self.fetch()

    def part(self, rows: slice) -> StepPart:
        """Some of its rows as a step of their own, for who reads these alone."""
        return StepPart(self, rows)


class StepPart(NamedTuple):
    """Some rows of a step that was launched."""

    step: LaunchedStep
    which: slice
    scores: Scores | None = None
    hidden: States | None = None

    def read(self) -> StepOutput:
        """Wait for the step and return what it produced for these rows."""
        tokens, logprobs, drafts = self.step.read()
        which = self.which
        return StepOutput(
            tokens[which],
            None if logprobs is None else logprobs[which],
            None if drafts is None else drafts[which],
        )
