"""Which requests run in the next step.

First come, first served; the requests of one list in the order of `Scheduler.in_order`. A request is admitted when a
slot is free and the pool has pages for its whole prompt and output, so a running request is never stopped for want of
memory; pages that hold its first tokens already are shared (`cache.pages`). It also waits until a prefill call has
room for it, so that the host admits the next requests while the device runs the calls before. Each step has at most one
prefill call, with prompts packed up to the token budget and long ones in chunks, and one decode call of all requests
that are past their prompt. Of a list that is wanted as a whole, all prompts are prefilled before the first decode step:
decode steps in between would have few rows.

Most steps decode the same requests as the step before. The scheduler counts how many more of them there will be, and
returns the same `Schedule` that often without looking at any request.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Hashable, Sequence
from itertools import chain, groupby
from typing import NamedTuple

from hybridgen.cache import NO_PAGES, PageManager, in_order
from hybridgen.engine.mixing import RUN, Mixing
from hybridgen.engine.requests import Batch, Request, RequestState
from hybridgen.execution.plan import Admission, PrefillChunk, StepPlan


class Schedule(NamedTuple):
    """What the next step runs, and the requests that it is for."""

    plan: StepPlan
    """Plain values for the runner."""
    admitted: tuple[Request, ...] = ()
    """The requests of `plan.admit`, in its order."""
    prefilled: tuple[Request, ...] = ()
    """The requests of `plan.prefill`, in its order."""
    batch: Batch | None = None
    """The requests of `plan.decode`."""


class Scheduler:
    """Holds waiting and running requests, slots and pages."""

    def __init__(
        self,
        *,
        pages: PageManager,
        max_batch: int,
        token_budget: int,
        score_budget: int = 1024,
        shortest_run: int = 1,
        whole_prompts: bool = False,
        reprefill_length: int | None = None,
        longest_first: bool = True,
        ahead: int | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        """
        Args:
            max_batch: slots.
            token_budget: tokens of a prefill call at most.
            score_budget: tokens that a prefill call tells the log-probabilities of at most.
            shortest_run: tokens of a prefill at least that goes on where an earlier call ended; at most 2, and then
                `token_budget` is at least 3.
            whole_prompts: whether a prefill that one call can take is not cut for the room that others leave in it.
            reprefill_length: a request that reaches this length is prefilled again, see `BoundModel`.
            longest_first: whether `in_order` puts requests first that may generate the most.
            ahead: no request is admitted while as many tokens of others wait for a prefill call. None: those of a call.
            mixing: which prompts are fed beside decode; None: none is.
        """
        self.pages = pages
        self._longest_first = longest_first
        self._token_budget = token_budget
        self._score_budget = score_budget
        self._shortest_run = shortest_run
        self._whole_prompts = whole_prompts
        # Where prompts are not cut, a prompt that does not fit a call lets a shorter one behind it go first.
        self._ahead = token_budget * (2 if whole_prompts else 1) if ahead is None else ahead
        self._reprefill_length = reprefill_length
        self.mixing = mixing
        self._free_slots = list(range(max_batch - 1, -1, -1))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._blocked = False
        """The first waiting request does not fit, and will not before something is freed."""
        self._batch: Batch | None = None
        self._batch_alone = Schedule(StepPlan())
        """The schedule of a step that decodes this batch and does nothing else."""
        self._steady = 0
        """How many of the next steps have that schedule, unless a request that may fit comes or one ends."""

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.running or self.waiting)

    def in_order(self, requests: Sequence[Request], *, streamed: bool) -> list[Request]:
        """The requests of a call in the order in which to queue them.

        Those that share pages are next to each other. Among these groups and all others, those that may generate the
        most come first: at the end, the device then has many short requests left rather than a few long ones (Graham
        1969, "Bounds on multiprocessing timing anomalies"). Not where tokens are waited for one by one.

        Args:
            streamed: whether somebody waits for each token.
        """
        if len(requests) < 2:
            return list(requests)
        if self.pages.shares:
            prompts = [(request.sampling.cache_salt, request.prompt_ids) for request in requests]
            requests = [requests[index] for index in in_order(prompts, self.pages.page_size)]
        if streamed or not self._longest_first:
            return list(requests)
        groups = [list(group) for _, group in groupby(requests, self._beginning)]
        groups.sort(key=lambda group: -max(request.sampling.max_new_tokens for request in group))
        return list(chain.from_iterable(groups))

    def _beginning(self, request: Request) -> Hashable:
        """What requests have in common that may share pages; a request that can share none has only itself."""
        size = self.pages.page_size
        if not self.pages.shares or len(request.prompt_ids) <= size:
            return request
        return request.sampling.cache_salt, request.prompt_ids[:size].tobytes()

    def add(self, request: Request) -> None:
        """Queue a new request. The caller has checked that it fits an empty pool."""
        request.state = RequestState.WAITING
        self.waiting.append(request)
        if not self._blocked:
            self._steady = 0

    def schedule(self) -> Schedule:
        """Admit what fits and choose the next step's work; counts it as launched."""
        if self._steady and self._batch is not None:
            self._steady -= 1
            self._batch.steps += 1
            return self._batch_alone
        admitted = self._admit()
        ready = [request for request in self.running if self._can_decode(request)]
        stale = [request for request in ready if self._is_stale(request)]
        for request in stale:
            self._restart(request)
        self._regroup([request for request in ready if request not in stale] if stale else ready)
        prefilled, chunks, together = self._plan_prompts()
        # Requests that end with their prefill give their slots to others: decode could wait for a whole list of them.
        waits = bool(chunks) and not together and all(request.patient for request in self.running)
        waits = waits and all(request.sampling.max_new_tokens > 1 for request in prefilled)
        if self._batch is not None and not waits:
            self._batch.steps += 1
            if not chunks and not stale:
                self._steady = min(map(self._steps_left, self._batch.requests))
            if not chunks and not admitted:
                return self._batch_alone
        admissions = tuple(
            Admission(request.slot, request.pages.table, request.sampling, request.prompt_ids) for request in admitted
        )
        batch = None if waits else self._batch
        plan = StepPlan(admissions, tuple(chunks), () if batch is None else batch.slots, together)
        return Schedule(plan, tuple(admitted), tuple(prefilled), batch)

    def accept(self, request: Request, count: int) -> None:
        """A launched step of this request brought `count` tokens, which may end it sooner."""
        request.accept(count)
        self._steady = 0

    def prefill_launched(self, request: Request, chunk: PrefillChunk) -> None:
        """A prefill call with this part of the request was launched."""
        self.pages.launched(request.pages, chunk.start + len(chunk.tokens))

    def finish(self, request: Request, fed: Sequence[int] = ()) -> bool:
        """Take a request out and free what it holds; False if that was done before.

        Steps in flight may still write to its pages, behind the tokens in `fed`; whoever gets those pages next writes
        later on the same stream.

        Args:
            fed: generated tokens that were fed, where others may share their pages.
        """
        if request.state in (RequestState.NEW, RequestState.FINISHED):
            return False
        waited = request.state is RequestState.WAITING
        request.state = RequestState.FINISHED
        self._blocked = False
        self._steady = 0
        if waited:
            self.waiting.remove(request)
            return True
        if fed:
            self.pages.keep(request.pages, request.prompt_ids + array("i", fed), request.sampling.cache_salt)
        self._take_out(request)
        return True

    def back(self, requests: Sequence[Request]) -> None:
        """Have running requests wait again, in front of all others: what was launched for them does not count."""
        for request in reversed(requests):
            if request.state is RequestState.RUNNING:  # it waits already if it shares pages with one before
                self._take_out(request)
                request.back()
                self.waiting.appendleft(request)
        self._blocked = False
        self._steady = 0

    def _take_out(self, request: Request) -> None:
        """Free a running request's slot and pages. Those that count on what it has not written wait again."""
        self.running.remove(request)
        if self._batch is not None and request in self._batch.requests:
            # The batch holds its requests in memory, and there may be no next step that would replace it.
            self._regroup([])
        pages, request.pages = request.pages, NO_PAGES
        waits = self.pages.release(pages)
        self._free_slots.append(request.slot)
        if waits:
            for other in reversed([other for other in self.running if self.pages.awaits(other.pages, pages)]):
                self._take_out(other)
                other.back()
                self.waiting.appendleft(other)

    def _admit(self) -> list[Request]:
        admitted: list[Request] = []
        if not self.waiting or self._blocked:
            return admitted
        held = self._held()
        room = self._ahead - sum(
            len(request.prefill_ids) - request.prefilled for request in self.running if request not in held
        )
        while self.waiting and not self._blocked and room > 0:
            request = self.waiting[0]
            pages = None
            if self._free_slots:
                salt = request.sampling.cache_salt
                pages = self.pages.admit(request.prefill_ids, request.capacity, salt, request.shareable)
            if pages is None:
                self._blocked = True
                break
            self.waiting.popleft()
            request.admitted(self._free_slots.pop(), pages)
            self.running.append(request)
            admitted.append(request)
            room -= len(request.prefill_ids) - request.prefilled
        return admitted

    def _can_decode(self, request: Request) -> bool:
        return request.prefilled == len(request.prefill_ids) and request.launched < request.sampling.max_new_tokens

    def _is_stale(self, request: Request) -> bool:
        """Whether its cached keys went stale with this length, so that it is prefilled again (longrope)."""
        most = self._reprefill_length
        return most is not None and len(request.prefill_ids) < most <= request.length

    def _restart(self, request: Request) -> None:
        """Prefill all of its tokens again, once the host has read the last of them; until then it waits."""
        read = request.output.token_ids
        if len(read) == request.launched:
            request.restart(read)

    def _regroup(self, requests: list[Request]) -> None:
        """Make these the batch, unless they are."""
        before = () if self._batch is None else self._batch.requests
        if tuple(requests) == before:
            return
        for request in before:
            request.leave()
        self._batch = batch = Batch.of(requests) if requests else None
        self._batch_alone = Schedule(StepPlan(decode=() if batch is None else batch.slots), batch=batch)
        if batch is not None:
            for request in requests:
                request.join(batch)

    def _steps_left(self, request: Request) -> int:
        """How many more steps it decodes before it ends by its limit or its cached keys go stale."""
        left = request.sampling.max_new_tokens - request.launched
        most = self._reprefill_length
        if most is None or len(request.prefill_ids) >= most:
            return left
        return min(left, most - request.length)

    def _run(self, budget: int, start: int, left: int) -> int:
        """How many of the tokens that are left of a prefill behind `start` to feed; 0: rather in a later call."""
        if self._whole_prompts and budget < left <= self._token_budget:
            return 0
        return self._part(budget, start, left)

    def _part(self, budget: int, start: int, left: int) -> int:
        """The same, where a prompt may be cut anyway."""
        length = min(budget, left)
        if self._shortest_run > 1 and left > 1:
            length -= left - length == 1  # the last one would come alone
            return 0 if start and length == 1 else length
        return length

    def _held(self) -> list[Request]:
        """Requests whose prompts are fed beside decode, if that is worth while."""
        return [] if self.mixing is None else self.mixing.held(self.running, len(self.waiting))

    def _plan_prompts(self) -> tuple[list[Request], list[PrefillChunk], bool]:
        """The next parts of unfinished prefills, whose they are, and whether they are fed in the decode step itself.

        Those that are held back come when no others are left.
        """
        held = self._held()
        if held:
            found = self._plan_prefill([request for request in self.running if request not in held])
            if found[0]:
                return *found, False
            rows = 0 if self._batch is None else len(self._batch.slots)
            room = None if self.mixing is None else self.mixing.room(rows)
            if room is not None:
                found = self._plan_beside(held, room)
                return *found, bool(found[0])
        return *self._plan_prefill(self.running), False

    def _plan_beside(self, held: Sequence[Request], room: int) -> tuple[list[Request], list[PrefillChunk]]:
        """The next parts of prompts that are held back, as far as there is room in a decode step."""
        requests: list[Request] = []
        chunks: list[PrefillChunk] = []
        for request in held:
            length = min(RUN, room, len(request.prefill_ids) - request.prefilled)
            if length <= 0:
                break
            chunks.append(_chunk(request, length))
            requests.append(request)
            room -= length
        return requests, chunks

    def _plan_prefill(self, of: Sequence[Request]) -> tuple[list[Request], list[PrefillChunk]]:
        """The next parts of all unfinished prefills, as far as the token budget goes, and whose they are."""
        requests: list[Request] = []
        chunks: list[PrefillChunk] = []
        budget, scores = self._token_budget, self._score_budget
        for request in of:
            ids, start = request.prefill_ids, request.prefilled
            length = self._run(budget, start, len(ids) - start)
            if length <= 0:
                continue
            targets, others = request.targets(length), request.other_targets(length)
            alone = length == 1 and scores == self._score_budget
            if len(targets) + len(others) > scores and not alone:
                # Those behind it may hold pages that it is to write, so that none of them comes before its rest. Its
                # alternatives come with its last token.
                if self._whole_prompts and chunks:
                    break
                most = min(request.unscored + scores, length - 1) if others else request.unscored + scores
                length = budget = self._part(most, start, len(ids) - start)
                targets, others = request.targets(length), request.other_targets(length)
                if not length:
                    break
            chunks.append(_chunk(request, length, targets, others))
            requests.append(request)
            budget -= length
            scores -= len(targets) + len(others)
        return requests, chunks


def _chunk(request: Request, length: int, targets: Sequence[int] = (), others: Sequence[int] = ()) -> PrefillChunk:
    """The next `length` tokens of a request's prefill, which count as launched from now on."""
    ids, start = request.prefill_ids, request.prefilled
    return PrefillChunk(
        slot=request.slot,
        tokens=ids[start : start + length],
        start=start,
        rope_length=max(len(ids), len(request.prompt_ids)),
        generated=max(0, len(ids) - len(request.prompt_ids)),
        last=request.advance(length),
        targets=targets,
        others=others,
        likely=request.sampling.prompt_logprobs or 0,
        hidden=request.hidden,
    )
