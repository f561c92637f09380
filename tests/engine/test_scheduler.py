"""Admission, packing, chunks, what is freed, and steps that repeat."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from hybridgen.cache import PageAllocator, PageManager, RequestPages, pages_for_tokens
from hybridgen.engine.requests import Request, RequestState
from hybridgen.engine.scheduler import Schedule, Scheduler
from hybridgen.execution.plan import Admission, PrefillChunk, StepPlan


def make(
    num_pages: int = 101,
    max_batch: int = 4,
    budget: int = 32,
    reprefill: int | None = None,
    *,
    shares: bool = False,
    longest_first: bool = True,
    shortest_run: int = 1,
    whole_prompts: bool = False,
    ahead: int | None = None,
) -> Scheduler:
    return Scheduler(
        pages=PageManager(num_pages, 16, shares=shares),
        max_batch=max_batch,
        token_budget=budget,
        reprefill_length=reprefill,
        shortest_run=shortest_run,
        whole_prompts=whole_prompts,
        longest_first=longest_first,
        ahead=ahead,
    )


class Sampling(SimpleNamespace):
    """Unlike its base, this can be referenced weakly."""


def make_request(prompt: int, new: int = 8) -> Request:
    request = Request(array("i", range(prompt)), Sampling(max_new_tokens=new, cache_salt=None, prompt_logprobs=None))
    request.output = SimpleNamespace(token_ids=[])
    return request


def add(scheduler: Scheduler, *prompts: int, new: int = 8) -> list[Request]:
    requests = [make_request(prompt, new) for prompt in prompts]
    for request in requests:
        scheduler.add(request)
    return requests


def chunks_of(schedule: Schedule) -> list[tuple[Request, int, int, bool]]:
    rows = zip(schedule.prefilled, schedule.plan.prefill, strict=True)
    return [(request, chunk.start, len(chunk.tokens), chunk.last) for request, chunk in rows]


def decoded(schedule: Schedule) -> tuple[Request, ...]:
    """The requests of the decode call; their slots are the plan's."""
    if schedule.batch is None:
        assert schedule.plan.decode == ()
        return ()
    assert schedule.plan.decode is schedule.batch.slots
    assert schedule.batch.slots == tuple(request.slot for request in schedule.batch.requests)
    assert schedule.batch.positions == sum(request.length for request in schedule.batch.requests)
    return schedule.batch.requests


def test_packs_prompts_up_to_the_budget_in_order() -> None:
    scheduler = make(budget=32)
    a, b, c = add(scheduler, 10, 30, 5)
    assert chunks_of(scheduler.schedule()) == [(a, 0, 10, True), (b, 0, 22, False)]
    schedule = scheduler.schedule()
    assert chunks_of(schedule) == [(b, 22, 8, True), (c, 0, 5, True)]
    assert schedule.plan.prefill == (
        PrefillChunk(b.slot, b.prompt_ids[22:], 22, 30, 0, True),
        PrefillChunk(c.slot, c.prompt_ids, 0, 5, 0, True),
    )
    assert decoded(schedule) == (a,)


@pytest.mark.parametrize("budget", [3, 4, 5, 8])
def test_a_run_behind_the_first_has_two_tokens_at_least(budget: int) -> None:
    for lengths in itertools.product((1, 2, 3, 4, 5, 9), repeat=3):
        scheduler = make(budget=budget, shortest_run=2)
        requests = add(scheduler, *lengths)
        fed = dict.fromkeys(requests, 0)
        for _ in range(12):
            for request, start, length, _ in chunks_of(scheduler.schedule()):
                assert start == fed[request]
                assert length > (start > 0)
                fed[request] += length
        assert tuple(fed.values()) == lengths


def test_prompts_that_one_call_can_take_are_not_cut() -> None:
    scheduler = make(budget=8, whole_prompts=True)
    a, b, c, d = add(scheduler, 5, 6, 3, 19)
    calls = [chunks_of(scheduler.schedule()) for _ in range(5)]
    assert calls == [
        [(a, 0, 5, True), (c, 0, 3, True)],
        [(b, 0, 6, True), (d, 0, 2, False)],
        [(d, 2, 8, False)],
        [(d, 10, 8, False)],
        [(d, 18, 1, True)],
    ]


def test_a_request_decodes_until_its_tokens_are_launched() -> None:
    scheduler = make()
    (one,) = add(scheduler, 4, new=3)
    assert [decoded(scheduler.schedule()) for _ in range(5)] == [(), (one,), (one,), (), ()]
    assert one.launched == 3


def test_admits_in_order_and_only_what_fits() -> None:
    scheduler = make(num_pages=1 + 4, ahead=1000)
    big, small = add(scheduler, 40, 8, new=8)  # 3 pages, 1 page
    huge, late = add(scheduler, 56, 8, new=8)  # 4 pages, 1 page: waits behind the huge one
    assert scheduler.schedule().admitted == (big, small)
    assert scheduler.schedule().admitted == ()
    scheduler.finish(big)
    assert scheduler.schedule().admitted == ()
    scheduler.finish(small)
    assert scheduler.schedule().admitted == (huge,)
    scheduler.finish(huge)
    assert scheduler.schedule().admitted == (late,)


def test_admits_as_much_as_a_prefill_call_has_room_for() -> None:
    scheduler = make(budget=32)
    a, b, c, d = add(scheduler, 20, 20, 70, 5, new=1)
    assert scheduler.schedule().admitted == (a, b)  # 8 of b are left for the next call
    schedule = scheduler.schedule()
    assert schedule.admitted == (c,)
    assert chunks_of(schedule) == [(b, 12, 8, True), (c, 0, 24, False)]
    assert scheduler.schedule().admitted == ()
    assert chunks_of(scheduler.schedule()) == [(c, 56, 14, True), (d, 0, 5, True)]
    scheduler = make(budget=32, whole_prompts=True)
    a, b, c, d = add(scheduler, 20, 20, 12, 20)
    schedule = scheduler.schedule()
    assert schedule.admitted == (a, b, c, d)
    assert chunks_of(schedule) == [(a, 0, 20, True), (c, 0, 12, True)]


def test_prefills_come_first_where_nobody_waits_for_single_tokens() -> None:
    scheduler = make(budget=32)
    requests = add(scheduler, 20, 20, 20)
    for request in requests:
        request.patient = True
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [len(decoded(each)) for each in (first, second)] == [0, 0]
    assert len(second.prefilled) == 2
    assert requests[0].launched == 1
    assert decoded(scheduler.schedule()) == tuple(requests)
    assert requests[0].launched == 2
    (one,) = add(scheduler, 20, new=1)  # it ends with its prefill, and others like it may come
    one.patient = True
    assert decoded(scheduler.schedule()) == tuple(requests)
    scheduler.finish(one)
    (one,) = add(scheduler, 20)  # somebody waits for this one's tokens, so the others go on beside its prefill
    schedule = scheduler.schedule()
    assert schedule.prefilled == (one,)
    assert decoded(schedule) == tuple(requests)


def test_finishing_frees_slot_and_pages_once() -> None:
    scheduler = make(max_batch=2)
    a, b, c = add(scheduler, 20, 20, 20)
    scheduler.schedule()
    assert {a.slot, b.slot} == {0, 1}
    scheduler.finish(a)
    scheduler.finish(a)
    scheduler.schedule()
    assert c.slot == a.slot
    scheduler.finish(b)
    scheduler.finish(c)
    assert scheduler.pages.free == scheduler.pages.capacity


def test_a_waiting_request_can_be_cancelled() -> None:
    scheduler = make(max_batch=1)
    _, waiting = add(scheduler, 8, 8)
    scheduler.schedule()
    scheduler.finish(waiting)
    assert not scheduler.waiting
    with pytest.raises(ValueError, match="deque"):
        scheduler.waiting.remove(waiting)


def test_a_request_is_prefilled_again_when_its_rotary_table_changes() -> None:
    scheduler = make(reprefill=12)
    (one,) = add(scheduler, 10, new=6)
    scheduler.schedule()  # prefill launches token 1: length 11
    scheduler.schedule()  # decode launches token 2: length 12
    assert one.length == 12
    one.output.token_ids.append(70)
    assert scheduler.schedule() == Schedule(StepPlan())  # the host has not read token 2 yet
    one.output.token_ids.append(71)
    schedule = scheduler.schedule()
    assert chunks_of(schedule) == [(one, 0, 12, True)]
    assert schedule.plan.prefill[0].generated == 2
    assert one.prefill_ids.tolist() == [*range(10), 70, 71]
    assert one.launched == 3
    assert decoded(scheduler.schedule()) == (one,)


def test_a_prompt_already_past_the_change_is_not_prefilled_again() -> None:
    scheduler = make(reprefill=12)
    (one,) = add(scheduler, 12, new=4)
    scheduler.schedule()
    assert decoded(scheduler.schedule()) == (one,)


class CountingPages(PageManager):
    """Counts how often pages are asked for."""

    calls = 0

    def admit(self, *args: Any) -> RequestPages | None:
        self.calls += 1
        return super().admit(*args)


def test_a_step_that_brought_more_tokens_moves_lengths_and_the_end() -> None:
    scheduler = make()
    a, b = add(scheduler, 4, 4, new=9)
    scheduler.schedule()
    schedule = scheduler.schedule()
    assert (a.launched, b.launched) == (2, 2)
    scheduler.accept(a, 4)  # the step that was launched brought four tokens
    assert (a.launched, a.length, b.launched) == (5, 9, 2)
    assert decoded(schedule) == (a, b)  # with the positions of both
    for _ in range(4):
        assert scheduler.schedule() is schedule
    assert (a.launched, b.launched) == (9, 6)
    assert decoded(scheduler.schedule()) == (b,)
    scheduler.accept(b, 3)
    assert b.launched == 9
    assert decoded(scheduler.schedule()) == ()
    assert (a.launched, b.launched) == (9, 9)


def test_a_request_that_jumps_over_the_change_of_its_rotary_table_is_prefilled_again() -> None:
    scheduler = make(reprefill=12)
    (one,) = add(scheduler, 10, new=9)
    scheduler.schedule()
    scheduler.schedule()
    scheduler.accept(one, 3)
    assert one.length == 14
    one.output.token_ids += [70, 71, 72, 73]
    assert chunks_of(scheduler.schedule()) == [(one, 0, 14, True)]
    assert decoded(scheduler.schedule()) == (one,)


def test_a_batch_is_one_object_while_it_stays_the_same() -> None:
    scheduler = make()
    a, b = add(scheduler, 4, 4, new=20)
    scheduler.schedule()
    schedule = scheduler.schedule()
    assert decoded(schedule) == (a, b)
    for _ in range(5):
        assert scheduler.schedule() is schedule
        assert decoded(schedule) == (a, b)
    assert (a.launched, b.launched) == (7, 7)
    (c,) = add(scheduler, 4, new=20)
    joining = scheduler.schedule()
    assert joining.admitted == (c,)
    assert joining.plan.admit == (Admission(c.slot, c.pages.table, c.sampling, c.prompt_ids),)
    assert joining.plan.decode is schedule.plan.decode  # c is in its prefill
    assert decoded(scheduler.schedule()) == (a, b, c)
    scheduler.finish(b)
    assert decoded(scheduler.schedule()) == (a, c)
    assert (a.launched, b.launched, c.launched) == (10, 9, 3)


def test_a_request_that_does_not_fit_waits_without_asking_again() -> None:
    scheduler = make(num_pages=1 + 4, max_batch=8)
    scheduler.pages = pages = CountingPages(1 + 4, 16, shares=False)
    running, big, small = add(scheduler, 4, 56, 8, new=8)  # 1 page, 4 pages, 1 page behind them
    scheduler.schedule()
    schedule = scheduler.schedule()
    calls = pages.calls
    add(scheduler, 4)
    assert scheduler.schedule() is schedule
    assert pages.calls == calls
    scheduler.finish(big)  # the one that waited first gives up: who is behind it fits
    assert scheduler.schedule().admitted[0] is small
    assert running.launched == 4


def test_a_batch_whose_requests_ended_is_not_kept() -> None:
    scheduler = make()
    (one,) = add(scheduler, 4, new=9)
    for _ in range(3):
        scheduler.schedule()
    scheduler.finish(one)
    assert one.launched == 3
    gone = weakref.ref(one.sampling)
    del one
    gc.collect()
    assert gone() is None


@dataclass(eq=False)
class Model:
    """The scheduler without any memory of the step before: it looks at everybody in every step."""

    pages: PageAllocator
    free_slots: list[int]
    budget: int
    reprefill: int | None
    waiting: list[SimpleNamespace] = field(default_factory=list)
    running: list[SimpleNamespace] = field(default_factory=list)

    def add(self, name: int, prompt: int, new: int) -> None:
        self.waiting.append(
            SimpleNamespace(
                name=name, prompt=prompt, new=new, feed=prompt, fed=0, launched=0, read=0, pages=[], slot=-1
            )
        )

    def step(self) -> tuple[list, list, list]:
        """Names admitted; (name, start, length) of each chunk; (name, slot) of each row of the decode call."""
        admitted, decode, prefill = [], [], []
        while self.waiting and self.free_slots and sum(one.feed - one.fed for one in self.running) < self.budget:
            first = self.waiting[0]
            pages = self.pages.allocate(pages_for_tokens(first.prompt + first.new, 16))
            if pages is None:
                break
            first.pages, first.slot = pages, self.free_slots.pop()
            self.running.append(self.waiting.pop(0))
            admitted.append(first.name)
        for one in self.running:
            length = one.prompt + one.launched
            if one.fed < one.feed or one.launched == one.new:
                continue
            if length == self.reprefill and one.feed < length:
                if one.read == one.launched:
                    one.feed, one.fed = length, 0
            else:
                decode.append((one.name, one.slot))
                one.launched += 1
        budget = self.budget
        for one in self.running:
            count = min(budget, one.feed - one.fed)
            if count:
                prefill.append((one.name, one.fed, count))
                one.fed += count
                one.launched += one.fed == one.feed
                budget -= count
        return admitted, prefill, decode

    def finish(self, name: int) -> None:
        self.waiting = [one for one in self.waiting if one.name != name]
        for one in [one for one in self.running if one.name == name]:
            self.running.remove(one)
            self.pages.release(one.pages)
            self.free_slots.append(one.slot)


def described(schedule: Schedule, names: dict[Request, int]) -> tuple[list, list, list]:
    rows = zip(decoded(schedule), schedule.plan.decode, strict=True)
    return (
        [names[one] for one in schedule.admitted],
        [(names[one], start, length) for one, start, length, _ in chunks_of(schedule)],
        [(names[one], slot) for one, slot in rows],
    )


@pytest.mark.parametrize("seed", range(60))
def test_it_schedules_as_a_model_without_memory(seed: int) -> None:
    """Random arrivals, ends, limits, slots, pages and budgets; the host reads one step late or at once."""
    rng = random.Random(seed)
    max_batch, num_pages, budget = rng.randint(1, 6), rng.randint(6, 20), rng.choice([5, 16, 40])
    reprefill = rng.choice([None, 12, 20])
    scheduler = make(num_pages, max_batch, budget, reprefill)
    model = Model(PageAllocator(num_pages), list(range(max_batch - 1, -1, -1)), budget, reprefill)
    arrivals, lag = rng.choice([0.02, 0.1, 0.5]), rng.randint(0, 1)
    names: dict[Request, int] = {}
    live: dict[int, Request] = {}
    in_flight: list[list[Request]] = []
    before: tuple[Request, ...] = ()
    slots: tuple[int, ...] = ()
    repeated = 0
    for _ in range(300):
        while rng.random() < arrivals:
            name, one = len(names), make_request(rng.randint(1, 40), rng.randint(1, 40))
            names[one] = name
            live[name] = one
            scheduler.add(one)
            model.add(name, len(one.prompt_ids), one.sampling.max_new_tokens)
        schedule = scheduler.schedule()
        assert described(schedule, names) == model.step()
        expected = {one.name: (one.launched, one.slot, one.pages) for one in model.running}
        assert {names[one]: (one.launched, one.slot, one.pages.table) for one in scheduler.running} == expected
        assert [names[one] for one in scheduler.waiting] == [one.name for one in model.waiting]
        if schedule.batch is not None and schedule.batch.requests == before:
            assert schedule.plan.decode is slots
            repeated += 1
        before, slots = decoded(schedule), schedule.plan.decode
        in_flight.append([one for one, _, _, last in chunks_of(schedule) if last] + list(before))
        done = {one for one in live.values() if rng.random() < 0.01}
        for one in in_flight.pop(0) if len(in_flight) > lag else ():
            if one.state is not RequestState.FINISHED:
                one.output.token_ids.append(1)
                next(m for m in model.running if m.name == names[one]).read += 1
                if len(one.output.token_ids) == one.sampling.max_new_tokens:
                    done.add(one)
        for one in sorted(done, key=names.__getitem__):
            launched = one.launched
            scheduler.finish(one)
            assert one.launched == launched
            model.finish(names[one])
            del live[names[one]]
    assert repeated


def test_equal_prompts_are_prefilled_in_one_call_and_fed_once() -> None:
    scheduler = make(budget=64, shares=True)
    a, b, c = add(scheduler, 40, 40, 8)
    schedule = scheduler.schedule()
    assert chunks_of(schedule) == [(a, 0, 40, True), (b, 32, 8, True), (c, 0, 8, True)]
    assert b.pages.table[:2] == a.pages.table[:2]
    for request, chunk in zip(schedule.prefilled, schedule.plan.prefill, strict=True):
        scheduler.prefill_launched(request, chunk)
    scheduler.finish(a, fed=range(100, 107))
    (again,) = add(scheduler, 40)
    scheduler.schedule()
    assert again.pages.cached == 32
    for request in (b, c, again):
        scheduler.finish(request)
    assert scheduler.pages.free == scheduler.pages.capacity


def test_who_shares_what_was_not_written_waits_again_in_its_place() -> None:
    scheduler = make(budget=16, shares=True, ahead=1000)
    a, b, c, d, e = add(scheduler, 40, 40, 50, 8, 8)
    assert scheduler.schedule().admitted == (a, b, c, d)
    scheduler.finish(a)  # nothing of it was launched
    assert list(scheduler.waiting) == [b, c, e]
    assert [request.state for request in (a, b, c)] == [RequestState.FINISHED, *[RequestState.WAITING] * 2]
    assert scheduler.schedule().admitted == (b, c, e)
    assert (b.prefilled, c.pages.cached, b.launched) == (8, 32, 0)
    for request in (b, c, d, e):
        scheduler.finish(request)
    assert scheduler.pages.free == scheduler.pages.capacity


def test_requests_whose_launches_do_not_count_wait_again_in_front() -> None:
    scheduler = make(budget=64, shares=True, max_batch=3)
    a, b, c, d = add(scheduler, 40, 40, 20, 8)
    assert scheduler.schedule().admitted == (a, b, c)
    for request in (a, b, c):
        scheduler.pages.launched(request.pages, request.prefilled)
    scheduler.back([a, b, c])
    assert list(scheduler.waiting) == [a, b, c, d]
    scheduler.pages.clear()
    assert scheduler.pages.free == scheduler.pages.capacity
    again = scheduler.schedule()
    assert again.admitted == (a, b, c)
    assert [chunk.start for chunk in again.plan.prefill] == [0, 32, 16]  # the others share what a is to write
    for request in (a, b, c, d):
        scheduler.finish(request)
    assert scheduler.pages.free == scheduler.pages.capacity


def queued(scheduler: Scheduler, requests: list[Request], *, streamed: bool = False) -> list[int]:
    return [requests.index(request) for request in scheduler.in_order(requests, streamed=streamed)]


def test_the_longest_outputs_of_a_list_start_first() -> None:
    scheduler = make(shares=True)
    requests = [make_request(4, new) for new in (3, 9, 3, 12, 9)]
    assert queued(scheduler, requests) == [3, 1, 4, 0, 2]
    assert queued(scheduler, requests, streamed=True) == [0, 1, 2, 3, 4]
    assert queued(make(longest_first=False), requests) == [0, 1, 2, 3, 4]
    assert queued(make(shares=False), requests) == [3, 1, 4, 0, 2]


def test_requests_that_share_pages_stay_together_however_long_their_outputs_are() -> None:
    requests = [make_request(17, new) for new in (2, 5, 9, 7)]
    for index, prompt in ((1, [7] * 20), (3, [8] * 20)):
        requests[index].prompt_ids = array("i", prompt)
    assert queued(make(shares=True), requests) == [0, 2, 3, 1]
    assert queued(make(shares=True), requests, streamed=True) == [0, 2, 1, 3]
    assert queued(make(shares=False), requests) == [2, 3, 1, 0]


def test_a_list_takes_fewer_steps_with_its_longest_outputs_first() -> None:
    def steps(longest_first: bool) -> int:
        scheduler = make(max_batch=4, num_pages=1000, longest_first=longest_first)
        requests = [make_request(4, new) for new in (5, 5, 5, 5, 9, 9, 5, 5, 40)]
        for one in scheduler.in_order(requests, streamed=False):
            scheduler.add(one)
        count = 0
        while scheduler.busy:
            scheduler.schedule()
            count += 1
            for one in [each for each in scheduler.running if each.launched == each.sampling.max_new_tokens]:
                scheduler.finish(one)
        return count

    assert steps(True) == 40
    assert steps(False) > 48
