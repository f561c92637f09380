"""Which requests run in the next step.

First come, first served. A request is admitted when a slot is free and the pool has pages for its whole prompt and
output, so that nothing ever has to be preempted. Each step runs at most one prefill call, with prompts packed up to
the token budget and long ones in chunks, and one decode call of all requests that are past their prompt.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from hybridgen.kvcache import PageAllocator, pages_for_tokens
from hybridgen.sampling import ResolvedSampling


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way through the engine."""

    prompt_ids: tuple[int, ...]
    sampling: ResolvedSampling
    output_ids: list[int] = field(default_factory=list)
    """Generated tokens that the host has read."""
    launched: int = 0
    """Generated tokens whose step was launched; the host may not have read the last ones."""
    prefill_ids: tuple[int, ...] = ()
    """What the current prefill feeds: the prompt, and what was generated when it is prefilled again."""
    prefilled: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.prefill_ids = self.prompt_ids

    @property
    def capacity(self) -> int:
        """Positions that it may ever use."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    @property
    def length(self) -> int:
        """Tokens so far, launched ones included."""
        return len(self.prompt_ids) + self.launched


class Chunk(NamedTuple):
    """A part of a sequence's prefill."""

    sequence: Sequence
    start: int
    length: int

    @property
    def last(self) -> bool:
        """Whether the prefill ends here."""
        return self.start + self.length == len(self.sequence.prefill_ids)


class Schedule(NamedTuple):
    """What the next step runs."""

    admitted: list[Sequence]
    prefill: list[Chunk]
    decode: list[Sequence]


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

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits an empty pool."""
        self.waiting.append(sequence)

    def schedule(self) -> Schedule:
        """Admit what fits and choose the next step's work; marks it as launched."""
        admitted = self._admit()
        stale = [s for s in self.running if self._is_stale(s)]
        for sequence in stale:
            self._restart(sequence)
        decode = [s for s in self.running if s not in stale and self._can_decode(s)]
        prefill = self._plan_prefill()
        for sequence in decode:
            sequence.launched += 1
        for chunk in prefill:
            chunk.sequence.prefilled += chunk.length
            chunk.sequence.launched += chunk.last
        return Schedule(admitted, prefill, decode)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out and free what it holds.

        Steps in flight may still write to its pages; whoever gets them next writes later on the same stream.
        """
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        self._free_slots.append(sequence.slot)

    def _admit(self) -> list[Sequence]:
        admitted = []
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            pages = self.pages.allocate(pages_for_tokens(sequence.capacity, self._page_size))
            if pages is None:
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
        if not self._can_decode(sequence):
            return False
        return sequence.length == self._reprefill_length and len(sequence.prefill_ids) < sequence.length

    def _restart(self, sequence: Sequence) -> None:
        """Prefill all of its tokens again, once the host has read the last of them; until then it waits."""
        if len(sequence.output_ids) == sequence.launched:
            sequence.prefill_ids = sequence.prompt_ids + tuple(sequence.output_ids)
            sequence.prefilled = 0

    def _plan_prefill(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self._token_budget
        for sequence in self.running:
            length = min(budget, len(sequence.prefill_ids) - sequence.prefilled)
            if length > 0:
                chunks.append(Chunk(sequence, sequence.prefilled, length))
                budget -= length
        return chunks
