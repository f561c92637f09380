"""Which requests run in the next step.

First come, first served. A request is admitted when a slot is free and the pool has pages for its whole prompt and
output, so that nothing ever has to be preempted. Each step runs at most one prefill call, with prompts packed up to
the token budget and long ones in chunks, and one decode call of all requests that are past their prompt.

Most steps decode the same requests as the step before. They are recognised without a look at any of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from hybridgen.cache import PageAllocator, pages_for_tokens
from hybridgen.sampling import ResolvedSampling


class _Steps:
    """How many decode steps a batch has run: one count for all of its sequences."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way through the engine."""

    prompt_ids: tuple[int, ...]
    sampling: ResolvedSampling
    output_ids: list[int] = field(default_factory=list)
    """Generated tokens that the host has read."""
    prefill_ids: tuple[int, ...] = ()
    """What the current prefill feeds: the prompt, and what was generated when it is prefilled again."""
    prefilled: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    finished: bool = False
    _launched: int = field(default=0, init=False)
    """Tokens launched outside its current batch."""
    _batch_steps: _Steps | None = field(default=None, init=False)
    """The steps of the batch that it is in."""

    def __post_init__(self) -> None:
        self.prefill_ids = self.prompt_ids

    @property
    def launched(self) -> int:
        """Generated tokens whose step was launched; the host may not have read the last ones."""
        return self._launched if self._batch_steps is None else self._launched + self._batch_steps.count

    @property
    def capacity(self) -> int:
        """Positions that it may ever use."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    @property
    def length(self) -> int:
        """Tokens so far, launched ones included."""
        return len(self.prompt_ids) + self.launched

    def advance(self, chunk: Chunk) -> None:
        """Note that a part of its prefill is launched; the last part brings a token."""
        self.prefilled += chunk.length
        self._launched += chunk.last

    def join(self, steps: _Steps) -> None:
        """Each step that a new batch counts brings a token."""
        self._batch_steps = steps

    def leave(self) -> None:
        """It is in no batch any more."""
        self._launched, self._batch_steps = self.launched, None


class Chunk(NamedTuple):
    """A part of a sequence's prefill."""

    sequence: Sequence
    start: int
    length: int

    @property
    def last(self) -> bool:
        """Whether the prefill ends here."""
        return self.start + self.length == len(self.sequence.prefill_ids)


class Batch(NamedTuple):
    """The sequences of a decode call. While they are the same, steps have the same object."""

    sequences: tuple[Sequence, ...]
    slots: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Iterable[Sequence]) -> Batch:
        sequences = tuple(sequences)
        return cls(sequences, tuple(sequence.slot for sequence in sequences))


class Schedule(NamedTuple):
    """What the next step runs."""

    admitted: tuple[Sequence, ...]
    prefill: tuple[Chunk, ...]
    decode: Batch | None


class Scheduler:
    """Holds waiting and running sequences, slots and pages."""

    def __init__(
        self,
        *,
        pages: PageAllocator,
        page_size: int,
        max_batch: int,
        token_budget: int,
        reprefill_length: int | None = None,
    ) -> None:
        self.pages = pages
        self._page_size = page_size
        self._token_budget = token_budget
        self._reprefill_length = reprefill_length
        self._free_slots = list(range(max_batch - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._blocked = False
        """Whether the first of the waiting does not fit until something is freed."""
        self._batch: Batch | None = None
        self._batch_alone = Schedule((), (), None)
        self._steps = _Steps()
        """The steps of that batch."""
        self._steady = 0
        """How many of the next steps run that batch alone, unless a request comes that may fit or one ends."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits an empty pool."""
        self.waiting.append(sequence)
        if not self._blocked:
            self._steady = 0

    def schedule(self) -> Schedule:
        """Admit what fits and choose the next step's work; marks it as launched."""
        if self._steady:
            self._steady -= 1
            self._steps.count += 1
            return self._batch_alone
        admitted = self._admit()
        ready = [s for s in self.running if self._can_decode(s)]
        stale = [s for s in ready if self._is_stale(s)]
        for sequence in stale:
            self._restart(sequence)
        self._regroup([s for s in ready if s not in stale] if stale else ready)
        prefill = self._plan_prefill()
        for chunk in prefill:
            chunk.sequence.advance(chunk)
        if self._batch is not None:
            self._steps.count += 1
            if not prefill and not stale:
                self._steady = min(map(self._steps_left, self._batch.sequences))
        return Schedule(tuple(admitted), tuple(prefill), self._batch)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out and free what it holds.

        Steps in flight may still write to its pages; whoever gets them next writes later on the same stream.
        """
        if sequence.finished:
            return
        sequence.finished = True
        self._blocked = False
        self._steady = 0
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        if self._batch is not None and sequence in self._batch.sequences:
            self._regroup([])  # here and not in the next step, which may never come: it would keep them in memory
        self.pages.release(sequence.pages)
        self._free_slots.append(sequence.slot)

    def _admit(self) -> list[Sequence]:
        admitted: list[Sequence] = []
        while self.waiting and not self._blocked:
            sequence = self.waiting[0]
            needed = pages_for_tokens(sequence.capacity, self._page_size)
            pages = self.pages.allocate(needed) if self._free_slots else None
            if pages is None:
                self._blocked = True
                break
            self.waiting.popleft()
            sequence.pages, sequence.slot = pages, self._free_slots.pop()
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _can_decode(self, sequence: Sequence) -> bool:
        return sequence.prefilled == len(sequence.prefill_ids) and sequence.launched < sequence.sampling.max_new_tokens

    def _is_stale(self, sequence: Sequence) -> bool:
        """Whether its cached keys went stale with this length, so that it is prefilled again (longrope)."""
        return sequence.length == self._reprefill_length and len(sequence.prefill_ids) < sequence.length

    def _restart(self, sequence: Sequence) -> None:
        """Prefill all of its tokens again, once the host has read the last of them; until then it waits."""
        if len(sequence.output_ids) == sequence.launched:
            sequence.prefill_ids = sequence.prompt_ids + tuple(sequence.output_ids)
            sequence.prefilled = 0

    def _regroup(self, sequences: list[Sequence]) -> None:
        """Make these the batch, unless they are."""
        before = () if self._batch is None else self._batch.sequences
        if tuple(sequences) == before:
            return
        for sequence in before:
            sequence.leave()
        self._batch = Batch.of(sequences) if sequences else None
        self._batch_alone = Schedule((), (), self._batch)
        self._steps = _Steps()
        for sequence in sequences:
            sequence.join(self._steps)

    def _steps_left(self, sequence: Sequence) -> int:
        """How many more steps it decodes before it ends by its limit or its cached keys go stale."""
        left = sequence.sampling.max_new_tokens - sequence.launched
        if self._reprefill_length is None or sequence.length > self._reprefill_length:
            return left
        return min(left, self._reprefill_length - sequence.length)

    def _plan_prefill(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self._token_budget
        for sequence in self.running:
            length = min(budget, len(sequence.prefill_ids) - sequence.prefilled)
            if length > 0:
                chunks.append(Chunk(sequence, sequence.prefilled, length))
                budget -= length
        return chunks
