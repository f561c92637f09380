"""Failures, interrupts, cancels and ends at awkward moments."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import shared_graphs
import torch
from transformers import AutoTokenizer

import hybridgen
from hybridgen import Engine, FinishReason, api
from hybridgen.cache import PageManager
from hybridgen.core import TokenLogprob
from hybridgen.demo import model_path
from hybridgen.engine.handoff import interrupts_deferred
from hybridgen.engine.loop import StepLoop
from hybridgen.engine.requests import Request, RequestState
from hybridgen.engine.scheduler import Scheduler
from hybridgen.execution.plan import Admission, PrefillChunk, StepOutput
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve
from hybridgen.telemetry.statistics import Counters

SETTINGS: dict[str, Any] = {"mode": "eager", "max_batch": 4, "page_size": 16, "token_budget": 96, "kv_memory": "16MiB"}
PROMPTS = families.prompts_of((5, 40, 17, 33))


@pytest.fixture(params=[0, 1])
def engine(request: pytest.FixtureRequest, llama_path: Path) -> Iterator[Engine]:
    with Engine.load(llama_path, run_ahead=request.param, **SETTINGS) as engine:
        yield engine
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.pages)


@pytest.fixture
def expected(engine: Engine) -> list[tuple[int, ...]]:
    return [out.token_ids for out in engine.generate(PROMPTS, max_new_tokens=8)]


def test_a_stream_keeps_events_that_another_call_produced(engine: Engine, expected: list) -> None:
    stream = engine.stream(PROMPTS[:2], max_new_tokens=8)
    events = [next(stream), next(stream)]
    engine.generate(PROMPTS[2], max_new_tokens=20)  # completes the stream's requests too
    events += stream
    for index in (0, 1):
        mine = [event for event in events if event.index == index]
        assert tuple(event.token_id for event in mine) == expected[index]
        assert mine[-1].completion.token_ids == expected[index]


def test_a_failed_admission_fails_one_request(engine: Engine, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    admit = engine._runner.admit

    def failing(*admissions: Admission) -> None:
        if any(tuple(admission.prompt_ids) == tuple(PROMPTS[1]) for admission in admissions):
            raise torch.OutOfMemoryError("no room for the penalties")
        admit(*admissions)

    monkeypatch.setattr(engine._runner, "admit", failing)
    outs = engine.generate(PROMPTS, max_new_tokens=8)
    assert [out.finish_reason is FinishReason.ERROR for out in outs] == [False, True, False, False]
    assert "no room for the penalties" in str(outs[1].error)
    assert [out.token_ids for i, out in enumerate(outs) if i != 1] == [expected[i] for i in (0, 2, 3)]


def test_a_defect_in_a_step_fails_what_runs_and_hangs_nobody(
    engine: Engine, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = engine._loop

    def launch() -> list:
        loop.scheduler.schedule()
        raise RuntimeError("a defect of ours")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_launch", launch)
        with pytest.raises(hybridgen.RequestError, match="a defect of ours"):
            engine.generate(PROMPTS[0], max_new_tokens=8)
    assert engine.generate(PROMPTS[0], max_new_tokens=8).token_ids == expected[0]


class Fussy:
    """A tokenizer's decode that fails on one id, again and again."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def decode(self, ids: Any, **_: Any) -> str:
        ids = [ids] if isinstance(ids, int) else list(ids)
        if self.bad in ids:
            raise ValueError(f"cannot decode {self.bad}")
        return "".join(chr(97 + i % 26) for i in ids)

    all_special_ids: tuple[int, ...] = ()


def test_a_tokenizer_that_fails_fails_one_request(engine: Engine, expected: list) -> None:
    elsewhere = {token for tokens in (*PROMPTS, *(expected[i] for i in (0, 2, 3))) for token in tokens}
    bad = next(token for token in expected[1] if token not in elsewhere)
    engine._loop._tokenizer = Fussy(bad)
    outs = engine.generate(PROMPTS, max_new_tokens=8)
    assert [out.finish_reason is FinishReason.ERROR for out in outs] == [False, True, False, False]
    assert [out.token_ids for i, out in enumerate(outs) if i != 1] == [expected[i] for i in (0, 2, 3)]
    assert len(outs[0].text) == 8


def test_submission_is_all_or_nothing(engine: Engine) -> None:
    engine._loop._tokenizer = Fussy(PROMPTS[1][-1])
    with pytest.raises(hybridgen.TokenizerError, match="prompt 1"):
        engine.generate(PROMPTS, max_new_tokens=8)


class Streamer:
    def __init__(self, fail_at: int = -1) -> None:
        self.calls: list[Any] = []
        self.fail_at = fail_at
        self.inside: Any = None

    def put(self, ids: torch.Tensor) -> None:
        if len(self.calls) == self.fail_at:
            raise OSError("the pipe is gone")
        self.calls.append(ids.tolist())
        if self.inside is not None and len(self.calls) > 1:
            self.inside()

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize(("fail_at", "error"), [(0, OSError), (2, hybridgen.RequestError)])
def test_a_streamer_that_fails_leaves_nothing_behind(engine: Engine, fail_at: int, error: type[Exception]) -> None:
    streamer = Streamer(fail_at)
    with pytest.raises(error, match="the pipe is gone"):
        engine.generate(PROMPTS[0], max_new_tokens=8, streamer=streamer)
    assert streamer.calls[-1] == "end"


def test_something_that_is_no_streamer(engine: Engine) -> None:
    with pytest.raises(hybridgen.SamplingError, match="put"):
        engine.generate(PROMPTS[0], streamer=object())


def test_generating_from_inside_a_step_is_refused(engine: Engine, expected: list) -> None:
    streamer = Streamer()
    streamer.inside = lambda: engine.generate(PROMPTS[1], max_new_tokens=2)
    with pytest.raises(hybridgen.RequestError, match="inside a step"):
        engine.generate(PROMPTS[0], max_new_tokens=8, streamer=streamer)
    assert engine.generate(PROMPTS[0], max_new_tokens=8).token_ids == expected[0]


def test_a_stream_dropped_inside_a_step_is_cancelled_after_it(
    engine: Engine, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [engine.stream(PROMPTS[1], max_new_tokens=100)]
    next(streams[0])
    decode = engine._runner.decode

    def dropping(slots: tuple[int, ...]) -> Any:
        streams.clear()
        gc.collect()
        return decode(slots)

    monkeypatch.setattr(engine._runner, "decode", dropping)
    assert engine.generate(PROMPTS[0], max_new_tokens=8).token_ids == expected[0]


def test_closing_while_another_thread_generates(llama_path: Path) -> None:
    engine = Engine.load(llama_path, **SETTINGS)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            engine.generate(PROMPTS[0], max_new_tokens=400)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while engine.stats().tokens.get("generated", 0) < 3:
        time.sleep(0.001)
    engine.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert isinstance(errors[0], hybridgen.EngineError)


def test_a_lost_device_fails_everybody_and_the_next_call_loads_again(
    llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hybridgen.generate(llama_path, PROMPTS[0], max_new_tokens=4, **SETTINGS)
    engine = api._engines[next(iter(api._engines))].engine

    def lost(slots: tuple[int, ...]) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(engine._runner, "decode", lost)
    outs = hybridgen.generate(llama_path, PROMPTS[:2], max_new_tokens=4, **SETTINGS)
    assert all(isinstance(out.error, hybridgen.EngineError) for out in outs)
    assert engine.closed
    with pytest.raises(hybridgen.EngineError, match="illegal memory access"):
        engine.generate(PROMPTS[0])
    again = hybridgen.generate(llama_path, PROMPTS[0], max_new_tokens=4, **SETTINGS)
    assert again.token_ids == expected.token_ids


def test_a_submission_that_comes_after_the_end_is_refused(llama_path: Path) -> None:
    engine = Engine.load(llama_path, **SETTINGS)
    loop, requests = engine.open_loop(), engine.make_requests([PROMPTS[0]], None, {"max_new_tokens": 2})
    engine.close()
    with pytest.raises(hybridgen.EngineError, match="closed"):
        loop.submit(requests)


def test_others_fail_when_a_step_is_interrupted(
    engine: Engine, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt that gets into a step costs its caller's requests, and the others are told."""
    stream = engine.stream(PROMPTS[1], max_new_tokens=50)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "decode", lambda slots: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(hybridgen.Interrupted) as caught:
            engine.generate(PROMPTS[0], max_new_tokens=8)
    assert caught.value.completions[0].finish_reason is FinishReason.CANCELLED
    last = list(stream)[-1].completion
    assert last.finish_reason is FinishReason.ERROR
    assert "interrupted" in str(last.error)
    assert engine.generate(PROMPTS[0], max_new_tokens=8).token_ids == expected[0]


def test_ctrl_c_is_taken_between_steps(engine: Engine, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = engine.stream(PROMPTS[1], max_new_tokens=8)
    first = next(stream)
    decode = engine._runner.decode

    def interrupted(slots: tuple[int, ...]) -> Any:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGINT)
        return decode(slots)

    monkeypatch.setattr(engine._runner, "decode", interrupted)
    with pytest.raises(hybridgen.Interrupted):
        engine.generate(PROMPTS[0], max_new_tokens=8)
    assert (first.token_id, *(event.token_id for event in stream)) == expected[1]  # it lost nothing


def test_interrupts_are_deferred_once_and_the_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred(), interrupts_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the second is taken at once
        reached.append(2)
    assert reached == [1]


# ------------------------------------------------------------------ the loop alone


class StubRunner:
    """Counts each request's tokens upwards from 100 times its slot."""

    def __init__(self) -> None:
        self.next: dict[int, int] = {}
        self.decoded: list[tuple[int, ...]] = []
        self.reads = self.prefills = 0
        self.fails: Any = lambda slots: False
        self.accepts: Any = lambda row: 1
        self.logprobs = False

    def admit(self, *admissions: Admission) -> None:
        self.next |= {admission.slot: 100 * admission.slot for admission in admissions}

    def recover(self) -> None:
        """Nothing here can be out of step."""

    def prefill(self, chunks: list[PrefillChunk]) -> Any:
        self.prefills += 1
        return self._launch(tuple(chunk.slot for chunk in chunks if chunk.last))

    def decode(self, slots: tuple[int, ...]) -> Any:
        self.decoded.append(slots)
        if self.fails(slots):
            raise RuntimeError("injected")
        return self._launch(slots)

    def _launch(self, slots: tuple[int, ...]) -> Any:
        tokens = []
        for row, slot in enumerate(slots):
            count = self.accepts(row)
            tokens.append([self.next[slot] + i for i in range(count)])
            self.next[slot] += count

        def read() -> StepOutput:
            assert tokens, "a step without rows is not read"
            self.reads += 1
            if not self.logprobs:
                return StepOutput(tokens, None)
            return StepOutput(tokens, [[TokenLogprob(token, -1.0) for token in row] for row in tokens])

        return SimpleNamespace(kind="stub", reason="none", scores=None, hidden=None, rows=len(tokens), read=read)


def stub_loop(
    run_ahead: int = 1, tokenizer: Any = None, budget: int = 16, **options: Any
) -> tuple[StepLoop, StubRunner]:
    runner = StubRunner()
    scheduler = Scheduler(pages=PageManager(100, 16), max_batch=4, token_budget=budget)
    return StepLoop(runner, scheduler, Counters(), tokenizer=tokenizer, run_ahead=run_ahead, **options), runner


def start(loop: StepLoop, count: int, prompt: int = 3, **fields: Any) -> list[Request]:
    requests = [new_request(index, prompt, **fields) for index in range(count)]
    loop.submit(requests)
    return requests


def new_request(index: int, prompt: int = 3, **fields: Any) -> Request:
    return Request(array("i", range(prompt)), resolve(SamplingParams(**fields), None, None, 1000), index)


def finish(loop: StepLoop, requests: list[Request]) -> None:
    while any(request.completion is None for request in requests):
        loop.step()


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_tokens_steps_and_counts(run_ahead: int) -> None:
    loop, runner = stub_loop(run_ahead)
    requests = start(loop, 3, max_new_tokens=6)
    requests += start(loop, 1, prompt=40, max_new_tokens=4)  # in four chunks; only the last samples
    finish(loop, requests)
    for index, request in enumerate(requests):
        count = 6 if index < 3 else 4
        assert request.completion.token_ids == tuple(100 * index + i for i in range(count))
        steps = {(step.phase, step.kind, step.reason): step.count for step in request.completion.steps}
        prefills = 1 if index < 3 else 4
        assert steps == {("prefill", "stub", "none"): prefills, ("decode", "stub", "none"): count - 1}
        assert request.launched == count
    assert loop._counters.tokens == {"prompt": 49, "generated": 22}
    assert loop._counters.steps["decode", "stub", "none"] == len(runner.decoded)


@pytest.mark.parametrize(("run_ahead", "changed"), [(0, True), (1, False), (1, True)])
def test_a_step_before_the_owner_was_looked_at_counts_only_if_nothing_changed(run_ahead: int, changed: bool) -> None:
    looks: list[int] = []
    runner: Any = None

    def look() -> bool:
        looks.append(runner.prefills)
        return changed

    loop, runner = stub_loop(run_ahead, before_call=lambda may_look_later: may_look_later, look=look)
    requests = [new_request(index, max_new_tokens=4) for index in range(2)]
    loop.start(requests)
    assert looks == [1] * run_ahead
    if run_ahead and changed:
        assert [request.state for request in requests] == [RequestState.WAITING] * 2
        assert not runner.reads
    others = [new_request(2, max_new_tokens=4)]
    loop.start(others)  # not alone: `before_call` looks
    finish(loop, requests + others)
    assert looks == [1] * run_ahead
    assert runner.prefills == 2  # one of them for all three, where the first does not count
    for request in requests + others:
        assert request.completion.token_ids == tuple(100 * request.index + i for i in range(4))
        assert [(step.phase, step.count) for step in request.completion.steps] == [("prefill", 1), ("decode", 3)]


def test_what_the_owner_made_impossible_is_told_behind_the_launch() -> None:
    def look() -> bool:
        raise hybridgen.EngineError("the modules are other ones")

    loop, _ = stub_loop(before_call=lambda may_look_later: may_look_later, look=look)
    requests = [new_request(index, max_new_tokens=4) for index in range(2)]
    with pytest.raises(hybridgen.EngineError, match="other ones"):
        loop.start(requests)
    loop.cancel(requests)
    assert loop.scheduler.pages.free == loop.scheduler.pages.capacity
    loop._look = lambda: False
    later = [new_request(5, max_new_tokens=2)]
    loop.start(later)
    finish(loop, later)
    assert len(later[0].completion.token_ids) == 2


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_steps_that_bring_several_tokens(run_ahead: int) -> None:
    """As a step with drafts does: rows get one to three tokens each, and requests end inside a step."""
    loop, runner = stub_loop(run_ahead)
    runner.accepts = lambda row: 1 + (row + len(runner.decoded)) % 3
    limits = (4, 9, 15)
    requests = [request for limit in limits for request in start(loop, 1, max_new_tokens=limit)]
    requests += start(loop, 1, max_new_tokens=20, stop_token_ids=[307])
    while loop.scheduler.busy:
        loop.step()
        for request in loop.scheduler.running:
            in_flight = sum(request in flight.requests for flight in loop._in_flight)
            assert request.launched == len(request.output.token_ids) + in_flight
    for slot, count in enumerate((*limits, 8)):
        assert requests[slot].completion.token_ids == tuple(range(100 * slot, 100 * slot + count))
    assert loop._counters.tokens["generated"] == sum(limits) + 8
    steps = [sum(s.count for s in one.completion.steps if s.phase == "decode") for one in requests]
    assert max(steps) < 14
    assert len(runner.decoded) <= max(steps) + run_ahead


def test_logprobs_of_several_tokens() -> None:
    loop, runner = stub_loop()
    runner.accepts, runner.logprobs = (lambda row: 2), True
    requests = start(loop, 2, max_new_tokens=5, logprobs=0)
    finish(loop, requests)
    for request in requests:
        assert [entry.token_id for entry in request.completion.logprobs] == list(request.completion.token_ids)


def test_a_request_is_submitted_once() -> None:
    loop, _ = stub_loop()
    requests = start(loop, 1, max_new_tokens=2)
    fresh = Request(array("i", [1]), requests[0].sampling)
    with pytest.raises(ValueError, match="submitted once"):
        loop.submit([fresh, *requests])
    assert len(loop.scheduler.waiting) == 1  # all or none
    loop.cancel([fresh])  # was never submitted: nothing to end
    assert fresh.completion is None
    finish(loop, requests)
    assert loop._counters.requests == {"submitted": 1, "length": 1}


@pytest.mark.parametrize("first", [True, False])
def test_a_first_token_need_not_wait_for_the_next_launch(first: bool) -> None:
    """Where launches take long, a prefill is read before the decode call is launched; later steps run ahead."""
    loop, runner = stub_loop(reads_first_tokens_first=first)
    (request,) = start(loop, 1, max_new_tokens=5)
    decode, when_decoded = runner.decode, []

    def noted(slots: tuple[int, ...]) -> Any:
        when_decoded.append(len(request.output.token_ids))
        return decode(slots)

    runner.decode = noted
    finish(loop, [request])
    assert request.completion.token_ids == tuple(range(5))
    # Tokens that the host had at each launch.
    assert when_decoded == ([1, 1, 2, 3] if first else [0, 1, 2, 3])


def test_the_runner_gets_the_same_slots_object_while_the_batch_is_the_same() -> None:
    loop, runner = stub_loop()
    finish(loop, start(loop, 2, max_new_tokens=20))
    assert len(runner.decoded) == 19
    assert len({id(slots) for slots in runner.decoded}) == 1


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_failed_call_counts_its_tokens_once(run_ahead: int) -> None:
    loop, runner = stub_loop(run_ahead)
    requests = start(loop, 3, max_new_tokens=8)
    runner.fails = lambda slots: len(slots) > 1 or slots == (1,)
    for _ in range(3):
        loop.step()
    runner.fails = lambda slots: False
    good = [requests[0], requests[2]]
    for request in good:
        assert request.completion is None
        assert request.launched == 3
        assert len(request.output.token_ids) == 3 - run_ahead
    finish(loop, requests)
    assert "injected" in str(requests[1].completion.error)
    for slot, request in zip((0, 2), good, strict=True):
        assert request.completion.token_ids == tuple(range(100 * slot, 100 * slot + 8))
        assert request.launched == 8
        assert sum(step.count for step in request.completion.steps) == 8


def test_decoding_at_the_end_that_fails_fails_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    loop, _ = stub_loop(tokenizer=tokenizer)
    requests = start(loop, 2, max_new_tokens=5)

    def failing(token_ids: Any = ()) -> str:
        raise ValueError("cannot decode")

    monkeypatch.setattr(requests[0].output._detokenizer, "flush", failing)
    finish(loop, requests)
    bad, good = (request.completion for request in requests)
    assert isinstance(bad.error, hybridgen.RequestError)
    assert "its output could not be handled: ValueError: cannot decode" in str(bad.error)
    assert (bad.token_ids, bad.text) == (tuple(range(5)), "")
    assert good.text == tokenizer.decode(good.token_ids)
    assert loop._counters.requests == {"submitted": 2, "error": 1, "length": 1}


def test_the_text_of_who_ended_is_decoded_while_the_next_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that decoding it delays no launch: the step behind the one that ended it is launched before it is read."""
    loop, runner = stub_loop(run_ahead=1, tokenizer=AutoTokenizer.from_pretrained(model_path()))
    short, long = start(loop, 1, max_new_tokens=4) + start(loop, 1, max_new_tokens=9)
    flush, launches = short.output._detokenizer.flush, []

    def noted(*args: Any) -> str:
        launches.append((len(runner.decoded), len(short.output.token_ids)))
        return flush(*args)

    monkeypatch.setattr(short.output._detokenizer, "flush", noted)
    finish(loop, [short, long])
    # The prefill brought one token and three decode steps the others; a fourth was launched before the third was read.
    assert launches == [(4, 4)]


def test_idle_work_runs_only_while_nobody_needs_the_device() -> None:
    loop, runner = stub_loop()
    calls: list[int] = []

    def work() -> bool:
        calls.append(runner.reads)
        return True

    assert loop.idle(work)
    requests = start(loop, 1, max_new_tokens=20, stop_token_ids=[4])
    assert not loop.idle(work)  # waiting
    loop.step()
    assert not loop.idle(work)  # running
    requests[0].output.listen(lambda token: calls.append(-1 if loop.idle(work) else -2))
    finish(loop, requests)
    assert runner.reads < 1 + len(runner.decoded)  # a step is in flight that nobody waits for
    assert loop.idle(work)
    assert calls == [0, *[-2] * 5, 1 + len(runner.decoded)]
    assert not loop.idle(lambda: False)


def test_idle_work_that_fails_leaves_the_loop_as_it_was() -> None:
    loop, _ = stub_loop()

    def failing() -> bool:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        loop.idle(failing)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(loop._lock._lock.acquire(timeout=5)))
    thread.start()
    thread.join()
    assert taken == [True]  # the lock was free
    loop, _ = stub_loop()
    with pytest.raises(ValueError, match="no room"):
        loop.idle(failing)
    finish(loop, start(loop, 1, max_new_tokens=3))
    loop.close()
    assert not loop.idle(failing)


def test_idle_work_is_not_interrupted() -> None:
    loop, _ = stub_loop()
    reached = []

    def work() -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        return True

    with pytest.raises(KeyboardInterrupt):
        loop.idle(work)
    assert reached == [1]


def test_requests_that_ended_are_not_kept() -> None:
    loop, _ = stub_loop(run_ahead=0)
    requests = start(loop, 2, max_new_tokens=5)
    watched = weakref.ref(requests[0])
    finish(loop, requests)
    del requests
    gc.collect()
    assert watched() is None


# ------------------------------------------------------------------ what a live model keeps, and what is freed


@pytest.mark.parametrize("fields", [{"kv_memory": 10}, {"max_context": 10**6}])
def test_a_failed_build_leaves_the_model_as_it_was(fields: dict[str, Any]) -> None:
    model = families.build("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = families.reference(model, PROMPTS[0], 4)[0]
    for _ in range(2):
        with pytest.raises(hybridgen.HybridgenError):
            Engine.load(model, **SETTINGS | fields)
    assert families.reference(model, PROMPTS[0], 4)[0] == expected
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_an_engine_that_is_dropped_is_freed_although_its_live_model_stays() -> None:
    model = families.build("llama")
    engine = Engine.load(model, **SETTINGS | {"mode": "jit", "compile_backend": "eager"})
    engine.generate(PROMPTS[0], max_new_tokens=2)
    site = engine._runner.bound.sites[0]
    watched = [weakref.ref(site.module), weakref.ref(site.module._hybridgen.keys)]
    del engine, site
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


def test_closing_frees_weights_and_cache(llama_path: Path) -> None:
    engine = Engine.load(llama_path, **SETTINGS)
    engine.generate(PROMPTS[0], max_new_tokens=2)
    site = engine._runner.bound.sites[0]
    watched = [weakref.ref(site.module), weakref.ref(site.module._hybridgen.keys)]
    del site
    engine.close()
    gc.collect()
    assert [reference() for reference in watched] == [None, None]
    assert engine.closed


def test_another_engines_compilation_is_not_a_late_one(llama_path: Path) -> None:
    shared_graphs.forget()
    jit = SETTINGS | {"mode": "jit", "compile_backend": "eager"}
    with Engine.load(llama_path, **jit) as first:
        stream = first.stream(PROMPTS[0], max_new_tokens=8)
        next(stream)
        with Engine.load(llama_path, **jit) as second:
            assert second.stats().compiled == 3
        list(stream)
        assert first.stats().late_compiles == 0


def test_text_prompts_of_the_demo_model_survive_all_this() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    with Engine.load(None, tokenizer=tokenizer, **SETTINGS) as engine:
        outs = engine.generate(["import os", "class A:"], max_new_tokens=12)
        assert all(out.text for out in outs)
