"""Prompts that are fed beside decode: who is held back, how many tokens a step takes, and that no token changes."""

from __future__ import annotations

import random
import warnings
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
from test_prefix_cache import poison

from hybridgen import Engine, SamplingParams
from hybridgen.cache import PageManager
from hybridgen.engine.mixing import RUN, Mixing
from hybridgen.engine.requests import Request
from hybridgen.engine.scheduler import Schedule, Scheduler
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.timings import feeds_faster

SETTINGS: dict[str, Any] = {
    "max_batch": 16,
    "page_size": 8,
    "token_budget": 64,
    "kv_memory": "16MiB",
    "max_context": 256,
    "device": "cpu",
    "mode": "eager",
    "progress": False,
}


def scheduler(slots: int = 8, *, shares: bool = False, **settings: Any) -> Scheduler:
    pages = PageManager(1001, 16, shares=shares)
    mixing = Mixing(pages, slots, **{"least_rows": 2, "least_room": 2} | settings)
    return Scheduler(pages=pages, max_batch=slots, token_budget=32, mixing=mixing)


def add(scheduler: Scheduler, *prompts: tuple[int, int], **fields: Any) -> list[Request]:
    """Requests of a list that is waited for, each of so many tokens for so many new ones."""
    requests = []
    for index, (length, new) in enumerate(prompts):
        sampling = {"max_new_tokens": new, "cache_salt": None, "prompt_logprobs": None}
        sampling |= {"penalizes": False, "reads_history": False, "has_own": False} | fields
        request = Request(array("i", range(1000 * index, 1000 * index + length)), SimpleNamespace(**sampling))  # type: ignore[arg-type]
        request.output = SimpleNamespace(token_ids=[])  # type: ignore[assignment]
        request.patient = True
        scheduler.add(request)
        requests.append(request)
    return requests


def fed(schedule: Schedule) -> list[tuple[Request, int, int, bool]]:
    return [
        (request, chunk.start, len(chunk.tokens), chunk.last)
        for request, chunk in zip(schedule.prefilled, schedule.plan.prefill, strict=True)
    ]


def test_who_ends_early_is_fed_in_the_rows_that_decode_leaves() -> None:
    one = scheduler(slots=8)
    a, b, c, d = add(one, (20, 100), (12, 100), (15, 30), (4, 20))
    first = one.schedule()
    assert fed(first) == [(a, 0, 20, True), (b, 0, 12, True)]
    assert not first.plan.together
    second = one.schedule()
    assert second.plan.together
    assert second.plan.decode == (a.slot, b.slot)
    assert fed(second) == [(c, 0, 6, False)]
    assert a.launched == 2
    assert fed(one.schedule()) == [(c, 6, 6, False)]
    third = one.schedule()
    assert fed(third) == [(c, 12, 3, True), (d, 0, 3, False)]
    last = one.schedule()
    assert last.plan.decode == (a.slot, b.slot, c.slot)
    assert fed(last) == [(d, 3, 1, True)]
    assert (a.launched, c.launched, d.launched) == (5, 2, 1)
    alone = one.schedule()
    assert alone.plan == ((), (), (a.slot, b.slot, c.slot, d.slot), False)
    assert one.schedule() is one.schedule()


@pytest.mark.parametrize(
    ("lengths", "fields"),
    [
        (((20, 100), (12, 100), (15, 90)), {}),  # it may generate nearly as much as the longest
        (((20, 100), (12, 100), (800, 30)), {}),  # each of its tokens would read many
        (((20, 100), (15, 30)), {}),  # too few rows decode
        (((20, 100), (12, 100), (15, 30)), {"penalizes": True}),
        (((20, 100), (12, 100), (15, 30)), {"reads_history": True}),
        (((20, 100), (12, 100), (15, 30)), {"has_own": True}),
    ],
)
def test_others_are_prefilled(lengths: tuple[tuple[int, int], ...], fields: dict[str, bool]) -> None:
    one = scheduler(slots=8)
    requests = add(one, *lengths, **fields)
    schedules = []
    while any(request.prefilled < len(request.prefill_ids) for request in requests):
        schedules.append(one.schedule())
        for request in one.running.copy():
            if request.launched == request.sampling.max_new_tokens:
                one.finish(request)
    assert not any(schedule.plan.together for schedule in schedules)


def test_nobody_is_held_back_while_others_wait_for_slots() -> None:
    one = scheduler(slots=4)
    requests = add(one, (16, 100), (16, 100), (20, 30), (20, 30), (4, 30))
    one.schedule()
    schedule = one.schedule()
    assert [request for request, *_ in fed(schedule)] == requests[2:4]
    assert not schedule.plan.together


def test_nobody_is_held_back_beside_a_request_whose_tokens_are_waited_for() -> None:
    one = scheduler(slots=8)
    requests = add(one, (20, 100), (12, 100), (15, 30))
    requests[0].patient = False
    one.schedule()
    schedule = one.schedule()
    assert not schedule.plan.together
    assert fed(schedule) == [(requests[2], 0, 15, True)]


def test_who_shares_pages_is_prefilled() -> None:
    one = scheduler(slots=8, shares=True)
    a, b, c = add(one, (40, 100), (12, 100), (20, 30))
    (d,) = add(one, (40, 20))  # begins as the first does
    prefilled = []
    while not (schedule := one.schedule()).plan.together:
        prefilled += schedule.prefilled
    assert d.pages.cached == 32
    assert set(prefilled) == {a, b, d}
    assert [request for request, *_ in fed(schedule)] == [c]
    assert set(schedule.batch.requests) == {a, b, d}  # type: ignore[union-attr]


def test_a_step_takes_no_more_of_a_prompt_than_may_be_written_in_it() -> None:
    one = scheduler(slots=256)
    add(one, (4, 500), (4, 500))
    (long,) = add(one, (300, 50))
    one.schedule()
    assert fed(one.schedule()) == [(long, 0, RUN, False)]


def test_attention_waits_for_all_that_a_step_writes() -> None:
    """It reads what lies more than a tile before a row's last tile while the step's keys may still be written."""
    streamed = pytest.importorskip("hybridgen.kernels.attention.streamed")
    assert RUN <= streamed.BLOCK


def test_without_room_decode_goes_on_alone() -> None:
    one = scheduler(slots=4, least_room=2)
    a, b, c = add(one, (8, 100), (8, 100), (8, 100))
    (held,) = add(one, (5, 20))
    one.schedule()
    schedule = one.schedule()
    assert schedule.plan == ((), (), (a.slot, b.slot, c.slot), False)
    one.finish(c)
    assert fed(one.schedule()) == [(held, 0, 2, False)]


def test_where_it_is_not_faster_prompts_are_prefilled() -> None:
    one = scheduler(slots=8, worth=lambda rows, room: rows != 2 or room != 6)
    requests = add(one, (20, 100), (12, 100), (15, 30))
    one.schedule()
    schedule = one.schedule()
    assert not schedule.plan.together
    assert fed(schedule) == [(requests[2], 0, 15, True)]


def test_recorded_steps_say_what_is_faster() -> None:
    prefill = {GraphKey.prefill(512, 1, None): 512 * 20e-6, GraphKey.prefill(2048, 64, None): 2048 * 20e-6}
    decode = {GraphKey.decode(size, None): 5e-3 + size * 10e-6 for size in (64, 128, 256)}
    assert feeds_faster(prefill | decode, 100, 156)
    assert not feeds_faster(prefill | {key: 2 * took for key, took in decode.items()}, 100, 128)
    assert not feeds_faster(decode, 100, 128)
    assert not feeds_faster(prefill | decode, 200, 100)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("mixing"), num_hidden_layers=2)


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_tokens_are_those_of_prefill_calls(path: Path, prefix_cache: bool, run_ahead: int) -> None:
    """Greedy and drawn, with equal prompts and prompts that begin alike; several calls of one engine."""
    draw = random.Random(0)
    prompts = families.prompts_of([draw.randint(1, 100) for _ in range(13)])
    prompts += [prompts[3], prompts[3][:50] + prompts[4]]
    params = [
        SamplingParams(max_new_tokens=draw.choice((3, 9, 20, 50, 60)), temperature=i % 2, seed=i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    settings = SETTINGS | {"prefix_cache": prefix_cache, "run_ahead": run_ahead}
    with Engine.load(path, **settings) as engine:
        expected = [out.token_ids for out in engine.generate(prompts, params)]
    with Engine.load(path, mixed_steps=True, **settings) as engine:
        loop = engine._loop
        assert loop.scheduler.mixing is not None
        loop.scheduler.mixing = Mixing(loop.scheduler.pages, 16, least_rows=2, least_room=1)
        for _ in range(2):
            outs = engine.generate(prompts, params)
            assert [out.token_ids for out in outs] == expected
            assert [len(out.token_ids) for out in outs] == [each.max_new_tokens for each in params]
        steps = engine.stats().steps
        assert sum(count for (*_, reason), count in steps.items() if "prompts beside" in reason) > 10
        assert loop.scheduler.pages.free == loop.scheduler.pages.capacity
        beside = [step for out in outs for step in out.steps if "prompts beside" in step.reason]
        assert beside


@pytest.mark.parametrize("mode", ["jit", "graph", "hybrid"])
def test_the_tokens_of_other_modes(path: Path, mode: str) -> None:
    """Where decode steps are compiled whole, prompts are prefilled, which is told."""
    prompts = families.prompts_of([30, 31, 70, 20, 21, 22])
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True) for new in (30, 30, 30, 5, 6, 7)]
    with Engine.load(path, **SETTINGS) as engine:
        expected = [out.token_ids for out in engine.generate(prompts, params)]
    settings = SETTINGS | {"mode": mode, "compile_backend": "eager", "mixed_steps": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        engine = Engine.load(path, **settings)
    with engine:
        scheduler = engine._loop.scheduler
        mixes = scheduler.mixing is not None
        if mixes:
            scheduler.mixing = Mixing(scheduler.pages, 16, least_rows=2, least_room=1)
        for _ in range(2):
            assert [out.token_ids for out in engine.generate(prompts, params)] == expected
            scheduler.pages.clear()
        stats = engine.stats()
        assert mixes is any("prompts beside" in reason for *_, reason in stats.steps)
        assert mixes is not any("prompts are not fed beside decode" in reason for reason in stats.fallbacks)


def test_requests_that_are_cancelled_leave_the_others_as_they_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them while their prompts are fed. Pages hold NaN until they are written."""
    draw = random.Random(2)
    prompts = families.prompts_of([draw.randint(1, 100) for _ in range(15)])
    params = [SamplingParams(max_new_tokens=draw.choice((3, 9, 20, 50, 60)), ignore_eos=True) for _ in prompts]
    with Engine.load(path, mixed_steps=True, **SETTINGS) as engine:
        poison(engine, monkeypatch)
        loop = engine._loop
        loop.scheduler.mixing = None
        expected = [out.token_ids for out in engine.generate(prompts, params)]
        loop.scheduler.mixing = Mixing(loop.scheduler.pages, 16, least_rows=2, least_room=1)
        for seed in range(4):
            loop.scheduler.pages.clear()
            draw = random.Random(seed)
            requests = engine.make_requests(prompts, params, {})
            loop.submit(requests, patient=True)
            cancelled: list[Request] = []
            while any(request.completion is None for request in requests):
                loop.step()
                feeding = [
                    request for request in loop.scheduler.running if 0 < request.prefilled < len(request.prompt_ids)
                ]
                if len(cancelled) < 5 and draw.random() < 0.3:
                    cancelled.append(draw.choice(feeding or loop.scheduler.running or requests))
                    loop.cancel(cancelled[-1:])
            for request, tokens in zip(requests, expected, strict=True):
                assert request.completion.error is None
                found = request.completion.token_ids
                assert found == tokens[: len(found)]
                assert len(found) == len(tokens) or request in cancelled
            assert loop.scheduler.pages.free == loop.scheduler.pages.capacity


def test_a_step_that_fails_is_run_as_two(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = families.prompts_of([30, 31, 32, 20, 21, 22])
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True) for new in (30, 30, 30, 5, 6, 7)]
    with Engine.load(path, mixed_steps=True, **SETTINGS) as engine:
        loop = engine._loop
        expected = [out.token_ids for out in engine.generate(prompts, params)]
        loop.scheduler.pages.clear()
        loop.scheduler.mixing = Mixing(loop.scheduler.pages, 16, least_rows=2, least_room=1)
        calls = []

        def fail(*args: Any) -> None:
            calls.append(args)
            raise RuntimeError("no")

        monkeypatch.setattr(loop._runner, "decode_beside", fail)
        outs = engine.generate(prompts, params)
    assert calls
    assert [out.error for out in outs] == [None] * len(prompts)
    assert [out.token_ids for out in outs] == expected


def test_logprobs_come_with_their_rows(path: Path) -> None:
    prompts = families.prompts_of([30, 31, 32, 20, 21, 22])
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True, logprobs=2) for new in (30, 30, 30, 5, 6, 7)]
    with Engine.load(path, mixed_steps=True, prefix_cache=False, **SETTINGS) as engine:
        loop = engine._loop
        expected = engine.generate(prompts, params)
        loop.scheduler.mixing = Mixing(loop.scheduler.pages, 16, least_rows=2, least_room=1)
        outs = engine.generate(prompts, params)
        assert any("prompts beside" in reason for *_, reason in engine.stats().steps)
    for out, other in zip(outs, expected, strict=True):
        assert out.token_ids == other.token_ids
        assert [each.logprob for each in out.logprobs] == pytest.approx(
            [each.logprob for each in other.logprobs], abs=1e-4
        )


def test_tokens_of_prompts_that_leave_no_line_are_refused(path: Path) -> None:
    from hybridgen.execution.plan import PrefillChunk

    with Engine.load(path, **SETTINGS | {"max_batch": 4}) as engine:
        steps = engine._loop._runner.steps
        chunk = PrefillChunk(slot=2, tokens=(1, 2, 3), start=0, rope_length=3, generated=0, last=True)
        with pytest.raises(ValueError, match="2 rows leave no room for 3 tokens"):
            steps.stage_together((0, 1), [chunk])


def test_models_whose_layers_keep_a_state_mix_nothing(tmp_path: Path) -> None:
    with (
        pytest.warns(RuntimeWarning, match="not fed beside decode"),
        Engine.load(families.write("qwen3_5_text", tmp_path), mixed_steps=True, **SETTINGS) as engine,
    ):
        assert engine._loop.scheduler.mixing is None
