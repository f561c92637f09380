"""Admission, packing, chunks, what is freed, and steps that repeat."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from hybridgen.cache import PageAllocator, pages_for_tokens
from hybridgen.engine.scheduler import Batch, Schedule, Scheduler, Sequence


def make(num_pages: int = 101, max_batch: int = 4, budget: int = 32, reprefill: int | None = None) -> Scheduler:
    return Scheduler(
        pages=PageAllocator(num_pages),
        page_size=16,
        max_batch=max_batch,
        token_budget=budget,
        reprefill_length=reprefill,
    )


class Sampling(SimpleNamespace):
    """Unlike its base, this can be referenced weakly."""


def sequence(prompt: int, new: int = 8) -> Sequence:
    return Sequence(tuple(range(prompt)), Sampling(max_new_tokens=new))


def add(scheduler: Scheduler, *prompts: int, new: int = 8) -> list[Sequence]:
    sequences = [sequence(prompt, new) for prompt in prompts]
    for one in sequences:
        scheduler.add(one)
    return sequences


def test_packs_prompts_up_to_the_budget_in_order() -> None:
    scheduler = make(budget=32)
    a, b, c = add(scheduler, 10, 30, 5)
    plan = scheduler.schedule()
    assert [(chunk.sequence, chunk.start, chunk.length, chunk.last) for chunk in plan.prefill] == [
        (a, 0, 10, True),
        (b, 0, 22, False),
    ]
    plan = scheduler.schedule()
    assert [(chunk.sequence, chunk.start, chunk.length, chunk.last) for chunk in plan.prefill] == [
        (b, 22, 8, True),
        (c, 0, 5, True),
    ]
    assert plan.decode == Batch((a,), (a.slot,))


def test_a_sequence_decodes_until_its_tokens_are_launched() -> None:
    scheduler = make()
    (one,) = add(scheduler, 4, new=3)
    decoded = [scheduler.schedule().decode for _ in range(5)]
    assert decoded == [None, Batch((one,), (0,)), Batch((one,), (0,)), None, None]
    assert one.launched == 3


def test_admits_in_order_and_only_what_fits() -> None:
    scheduler = make(num_pages=1 + 4)
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


def test_a_waiting_sequence_can_be_cancelled() -> None:
    scheduler = make(max_batch=1)
    _, waiting = add(scheduler, 8, 8)
    scheduler.schedule()
    scheduler.finish(waiting)
    assert not scheduler.waiting
    with pytest.raises(ValueError, match="deque"):
        scheduler.waiting.remove(waiting)


def test_a_sequence_is_prefilled_again_when_its_rotary_table_changes() -> None:
    scheduler = make(reprefill=12)
    (one,) = add(scheduler, 10, new=6)
    scheduler.schedule()  # prefill launches token 1: length 11
    scheduler.schedule()  # decode launches token 2: length 12
    assert one.length == 12
    one.output_ids.append(70)
    plan = scheduler.schedule()
    assert plan == ((), (), None)  # the host has not read token 2 yet
    one.output_ids.append(71)
    plan = scheduler.schedule()
    assert [(chunk.start, chunk.length, chunk.last) for chunk in plan.prefill] == [(0, 12, True)]
    assert one.prefill_ids == (*range(10), 70, 71)
    assert one.launched == 3
    assert scheduler.schedule().decode.sequences == (one,)


def test_a_prompt_already_past_the_change_is_not_prefilled_again() -> None:
    scheduler = make(reprefill=12)
    (one,) = add(scheduler, 12, new=4)
    scheduler.schedule()
    assert scheduler.schedule().decode.sequences == (one,)


class CountingPages(PageAllocator):
    """Counts how often pages are asked for."""

    asked = 0

    def allocate(self, count: int) -> list[int] | None:
        self.asked += 1
        return super().allocate(count)


def test_a_batch_is_one_object_while_it_stays_the_same() -> None:
    scheduler = make()
    a, b = add(scheduler, 4, 4, new=20)
    scheduler.schedule()
    batch = scheduler.schedule().decode
    assert batch == Batch((a, b), (a.slot, b.slot))
    for _ in range(5):
        assert scheduler.schedule() == ((), (), batch)
        assert scheduler.schedule().decode is batch
    assert (a.launched, b.launched) == (12, 12)
    (c,) = add(scheduler, 4, new=20)
    plan = scheduler.schedule()
    assert plan.admitted == (c,)
    assert plan.decode is batch  # c is in its prefill
    joined = scheduler.schedule().decode
    assert joined.sequences == (a, b, c)
    scheduler.finish(b)
    assert scheduler.schedule().decode.sequences == (a, c)
    assert (a.launched, b.launched, c.launched) == (15, 14, 3)


def test_a_request_that_does_not_fit_waits_without_asking_again() -> None:
    scheduler = make(num_pages=1 + 4, max_batch=8)
    scheduler.pages = pages = CountingPages(1 + 4)
    running, big, small = add(scheduler, 4, 56, 8, new=8)  # 1 page, 4 pages, 1 page behind them
    scheduler.schedule()
    batch = scheduler.schedule().decode
    asked = pages.asked
    add(scheduler, 4)
    assert scheduler.schedule().decode is batch
    assert pages.asked == asked
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
        while self.waiting and self.free_slots:
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


def described(plan: Schedule, names: dict[Sequence, int]) -> tuple[list, list, list]:
    rows = () if plan.decode is None else zip(plan.decode.sequences, plan.decode.slots, strict=True)
    return (
        [names[one] for one in plan.admitted],
        [(names[chunk.sequence], chunk.start, chunk.length) for chunk in plan.prefill],
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
    names: dict[Sequence, int] = {}
    live: dict[int, Sequence] = {}
    in_flight: list[list[Sequence]] = []
    before: Batch | None = None
    repeated = 0
    for _ in range(300):
        while rng.random() < arrivals:
            name, one = len(names), sequence(rng.randint(1, 40), rng.randint(1, 40))
            names[one] = name
            live[name] = one
            scheduler.add(one)
            model.add(name, len(one.prompt_ids), one.sampling.max_new_tokens)
        plan = scheduler.schedule()
        assert described(plan, names) == model.step()
        expected = {one.name: (one.launched, one.slot, one.pages) for one in model.running}
        assert {names[one]: (one.launched, one.slot, one.pages) for one in scheduler.running} == expected
        assert [names[one] for one in scheduler.waiting] == [one.name for one in model.waiting]
        if plan.decode is not None and plan.decode == before:
            assert plan.decode is before
            repeated += 1
        before = plan.decode
        rows = [chunk.sequence for chunk in plan.prefill if chunk.last]
        in_flight.append(rows + list(plan.decode.sequences if plan.decode else ()))
        done = {one for one in live.values() if rng.random() < 0.01}
        for one in in_flight.pop(0) if len(in_flight) > lag else ():
            if not one.finished:
                one.output_ids.append(1)
                next(m for m in model.running if m.name == names[one]).read += 1
                if len(one.output_ids) == one.sampling.max_new_tokens:
                    done.add(one)
        for one in sorted(done, key=names.__getitem__):
            launched = one.launched
            scheduler.finish(one)
            assert one.launched == launched
            model.finish(names[one])
            del live[names[one]]
    assert repeated
