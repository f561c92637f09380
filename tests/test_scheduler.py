"""Admission, packing, chunks, and what is freed."""

from types import SimpleNamespace

import pytest

from hybridgen.kvcache import PageAllocator
from hybridgen.scheduler import Scheduler, Sequence


def make(num_pages: int = 101, max_batch: int = 4, budget: int = 32, reprefill: int | None = None) -> Scheduler:
    return Scheduler(
        pages=PageAllocator(num_pages),
        page_size=16,
        max_batch=max_batch,
        token_budget=budget,
        reprefill_length=reprefill,
    )


def sequence(prompt: int, new: int = 8) -> Sequence:
    return Sequence(tuple(range(prompt)), SimpleNamespace(max_new_tokens=new))


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
    assert plan.decode == [a]


def test_a_sequence_decodes_until_its_tokens_are_launched() -> None:
    scheduler = make()
    (one,) = add(scheduler, 4, new=3)
    decoded = [scheduler.schedule().decode for _ in range(5)]
    assert decoded == [[], [one], [one], [], []]
    assert one.launched == 3


def test_admits_in_order_and_only_what_fits() -> None:
    scheduler = make(num_pages=1 + 4)
    big, small = add(scheduler, 40, 8, new=8)  # 3 pages, 1 page
    huge, late = add(scheduler, 56, 8, new=8)  # 4 pages, 1 page: waits behind the huge one
    assert scheduler.schedule().admitted == [big, small]
    assert scheduler.schedule().admitted == []
    scheduler.finish(big)
    assert scheduler.schedule().admitted == []
    scheduler.finish(small)
    assert scheduler.schedule().admitted == [huge]
    scheduler.finish(huge)
    assert scheduler.schedule().admitted == [late]


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
    assert (plan.prefill, plan.decode) == ([], [])  # the host has not read token 2 yet
    one.output_ids.append(71)
    plan = scheduler.schedule()
    assert [(chunk.start, chunk.length, chunk.last) for chunk in plan.prefill] == [(0, 12, True)]
    assert one.prefill_ids == (*range(10), 70, 71)
    assert one.launched == 3
    assert scheduler.schedule().decode == [one]


def test_a_prompt_already_past_the_change_is_not_prefilled_again() -> None:
    scheduler = make(reprefill=12)
    (one,) = add(scheduler, 12, new=4)
    scheduler.schedule()
    assert scheduler.schedule().decode == [one]
