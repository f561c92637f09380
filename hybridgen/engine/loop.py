"""The loop of steps: schedule, launch, read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

from hybridgen.core import FinishReason
from hybridgen.device.failures import LostRanks, is_fatal
from hybridgen.engine.handoff import TurnLock, interrupts_deferred
from hybridgen.engine.output import RequestOutput, StepKind
from hybridgen.engine.reading import InFlight, Reader
from hybridgen.engine.requests import Batch, Request, RequestState
from hybridgen.engine.scheduler import Scheduler
from hybridgen.errors import EngineError, HybridgenError, RequestError, TokenizerError, described, first_line
from hybridgen.execution import LaunchedStep, ModelRunner
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.speculation.pace import choose, choose_or_pause
from hybridgen.telemetry.statistics import Counters
from hybridgen.telemetry.traffic import DecodeMeter

logger = logging.getLogger(__name__)


class StepLoop:
    """Runs requests from submission to completion.

    Thread-safe: one step at a time. Ctrl-C is taken between steps, so that no token is lost to it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        counters: Counters,
        *,
        tokenizer: Any,
        run_ahead: int,
        reads_first_tokens_first: bool = False,
        meter: DecodeMeter | None = None,
        before_call: Callable[..., bool] = lambda **_: False,
        look: Callable[[], bool] | None = None,
        drafter: str | None = None,
        most_checked: int | None = None,
    ) -> None:
        """
        Args:
            run_ahead: 1 launches the next step before the last one's tokens are read; 0 reads them first.
            reads_first_tokens_first: read a prefill's tokens before the next call is launched. For where a launch takes
                the host long: a first token does not wait for it then.
            meter: told of every decode step that was read.
            before_call: called before requests are queued, while no step runs; see `following.begin_call`.
            look: see `following.look`; None: `before_call` has to look by itself.
            drafter: who drafts in the runner's steps; None: nobody.
            most_checked: tokens of a step that checks drafts at most; None: any number.
        """
        self.scheduler = scheduler
        self._runner = runner
        self._counters = counters
        self._tokenizer = tokenizer
        self._run_ahead = run_ahead
        self._reads_first_tokens_first = reads_first_tokens_first
        self._meter = meter
        self._reader = Reader(runner, scheduler, counters, meter)
        self._before_call, self._look = before_call, look
        self._drafter = drafter
        self._most_checked = most_checked
        self._decoded_by: StepKind = ("decode", "", "")
        """How the last decode step ran. One object while that does not change, so that nobody compares strings."""
        self._in_flight: list[InFlight] = []
        self._lock = TurnLock()
        self._stepping = False
        self._cancelled: list[Request] = []
        """Cancelled inside a step; they end after it."""
        self._lost: list[Request] = []
        """Those that ran when a step was interrupted or failed, and may have lost a token."""
        self._disturbed = False
        """Whether that happened, and host and device were not made to agree again yet."""
        self._end: EngineError | None = None
        self._paused: EngineError | None = None
        self.weights_version = 0
        """How often `weights_changed()` was called."""

    def submit(self, requests: Sequence[Request], *, keep_events: bool = False, patient: bool = False) -> None:
        """Queue new requests, all or none; `step()` runs them.

        Args:
            keep_events: make an event for each of their tokens.
            patient: nobody waits for one of them before all have ended.

        Raises:
            TokenizerError: the tokenizer fails on a prompt.
            EngineError: the loop is closed, its device failed, or the model's owner made another one of it.
            ValueError: one was submitted before.
        """
        self._queue(requests, keep_events, patient, may_look_later=False)

    def start(self, requests: Sequence[Request], *, patient: bool = False) -> None:
        """`submit` them and take a `step`.

        The owner of a live module may have changed it. Where nothing else runs, the loop looks for that after the
        launch, while the device works.
        """
        with self._lock, interrupts_deferred():
            alone = self._run_ahead and self._look is not None and not (self.scheduler.busy or self._in_flight)
            looks = self._queue(requests, False, patient, may_look_later=bool(alone))
            self._take_step()
            if looks and self._look is not None and self._look():
                self._again(requests)

    def _again(self, requests: Sequence[Request]) -> None:
        """Nothing that was launched for these requests counts; they wait again. None of it was read."""
        self._in_flight = []
        self.scheduler.back([request for request in requests if request.state is RequestState.RUNNING])
        self.scheduler.pages.clear()
        for request in requests:
            if request.state is RequestState.WAITING:
                submitted, request.output = request.output.submitted, self._output(request, keep_events=False)
                request.output.submitted = submitted

    def _queue(self, requests: Sequence[Request], keep_events: bool, patient: bool, *, may_look_later: bool) -> bool:
        """See `submit`. Returns whether the model's owner is to be looked at once the next step is launched."""
        looks = False
        with self._lock, interrupts_deferred():
            self.check()
            if self._paused is not None:
                raise self._paused
            if any(request.state is not RequestState.NEW for request in requests):
                raise ValueError("a request can be submitted once; make a new one")
            if not self._stepping:
                looks = self._before_call(may_look_later=may_look_later)
            outputs = [self._output(request, keep_events) for request in requests]
            for request, output in zip(requests, outputs, strict=True):
                request.output, request.patient = output, patient
            for request in self.scheduler.in_order(requests, streamed=keep_events):
                self.scheduler.add(request)
            self._counters.requests["submitted"] += len(requests)
            truncated = sum(request.truncated for request in requests)
            if truncated:
                self._counters.tokens["truncated"] += truncated
        return looks

    def on_end(self, call: Callable[[Request], object]) -> None:
        """Call this with every request that ends from now on, inside the step or call that ends it."""
        self._reader.on_end = call

    def cancel(self, requests: Iterable[Request]) -> None:
        """End these requests where they are. Those that ended, or were never submitted, stay as they are."""
        with self._lock, interrupts_deferred():
            if self._stepping:  # called by a callback, or by the end of an abandoned stream
                self._cancelled += requests
                return
            for request in requests:
                self._finish(request, FinishReason.CANCELLED)

    def close(self) -> None:
        """Fail everything that waits or runs, and every later call."""
        with self._lock, interrupts_deferred():
            self._end = self._end or EngineError("this engine was closed; load a new one with Engine.load()")
            self._in_flight = []
            for request in [*self.scheduler.running, *self.scheduler.waiting]:
                self._finish(request, FinishReason.ERROR, self._end)

    def weights_changed(self) -> None:
        """The model's weights have other values from now on. Requests that run go on with them.

        Raises:
            EngineError: the loop has ended, or this was called from inside a step.
        """
        with self._lock, interrupts_deferred():
            self.check()
            if self._stepping:
                raise EngineError("weights_changed() was called from inside a step; call it between two calls")
            self._before_call()
            self.scheduler.pages.clear()
            self.weights_version += 1

    def pause(self, work: Callable[[], None], why: EngineError | None) -> None:
        """Do something to what requests need, while none waits or runs.

        Args:
            why: what later calls are refused with; None: they are taken again.

        Raises:
            EngineError: the loop has ended, or requests wait or run.
        """
        with self._lock, interrupts_deferred():
            self.check()
            if self._stepping or self.scheduler.busy:
                raise EngineError("requests wait or run; let them end first")
            flights, self._in_flight = self._in_flight, []
            for flight in flights:
                self._read(flight)
            work()
            self._paused = why

    @property
    def ended(self) -> bool:
        """Whether it was closed, or its device failed."""
        return self._end is not None

    def check(self) -> None:
        """Raise if the loop has ended.

        Raises:
            EngineError: it was closed, or its device failed.
        """
        if self._end is not None:
            raise self._end

    def step(self) -> None:
        """Launch the next prefill and decode calls, then read what earlier ones produced.

        With run-ahead, the tokens of the calls launched here are read in the next step, while its own calls run.

        Raises:
            EngineError: the loop has ended, or this was called from inside a step.
        """
        if not self._stepping:
            self._lock.give_way()
        self._take_step()

    def _take_step(self) -> None:
        with self._lock, interrupts_deferred():
            self.check()
            if self._stepping:
                raise EngineError(
                    "generate() was called from inside a step; do not call it from a streamer or tokenizer"
                )
            self._stepping = True
            try:
                if self._disturbed:
                    self._recover("a step that it was in was interrupted")
                self._step()
            except EngineError:
                raise
            except BaseException as error:
                # Tokens of the launched steps may be lost, so no running request can go on. The caller that was
                # interrupted cancels its own requests; those of other callers fail.
                self._lost = list(self.scheduler.running)
                self._disturbed = True
                if not isinstance(error, Exception):
                    raise
                logger.debug("a step failed", exc_info=True)
                self._recover(f"a step failed: {described(error)}")
            finally:
                self._stepped()

    def idle(self, work: Callable[[], bool]) -> bool:
        """Do something on the device while no request needs it. False, and nothing done, while one waits or runs.

        Nothing is in flight meanwhile, and nobody can submit before `work` returns. What it returns is returned, what
        it raises is raised; the loop goes on after either. Ctrl-C waits until it is done.

        Raises:
            EngineError: the device failed on a step that was still in flight.
        """
        with self._lock, interrupts_deferred():
            if self._stepping or self.scheduler.busy or self.ended:
                return False
            # With run-ahead, a step can still be in flight whose requests have all ended.
            flights, self._in_flight = self._in_flight, []
            for flight in flights:
                self._read(flight)
            self._stepping = True  # `work` may call the user's code, which must not start a step
            try:
                return work()
            finally:
                self._stepped()

    def _stepped(self) -> None:
        """The end of a step, or of work while idle: cancel what was cancelled inside it."""
        self._stepping = False
        if self._cancelled:
            cancelled, self._cancelled = self._cancelled, []
            self.cancel(cancelled)

    def _step(self) -> None:
        earlier, self._in_flight = self._in_flight, []
        if self._reads_first_tokens_first and any(flight.decoded_by is None for flight in earlier):
            for flight in earlier:
                self._read(flight)
            earlier = []
        launched = self._launch()
        if self._run_ahead and launched:
            self._in_flight = launched
        else:
            earlier = earlier + launched
        for flight in earlier:
            self._read(flight)

    def _launch(self) -> list[InFlight]:
        plan, admitted, prefilled, batch = self.scheduler.schedule()
        launched: list[InFlight] = []
        if admitted:
            self._admit(list(zip(admitted, plan.admit, strict=True)))
        if prefilled:
            # A request whose admission failed has ended, and one that shares pages with it waits again.
            parts = [
                (request, chunk)
                for request, chunk in zip(prefilled, plan.prefill, strict=True)
                if request.state is RequestState.RUNNING
            ]
            if parts and plan.together and batch is not None and self._launch_together(batch, parts, launched):
                return launched
            if parts:
                self._launch_prefill(parts, launched)
        if batch is not None:
            self._launch_decode(batch.requests, plan.decode, batch.positions, launched)
        return launched

    def _admit(self, parts: list[tuple[Request, Admission]]) -> None:
        """Give requests their slots on the device; one with which that fails ends."""
        try:
            self._runner.admit(*(admission for _, admission in parts))
        except Exception as error:
            if self._can_isolate(parts, error):
                for part in parts:
                    if part[0].state is RequestState.RUNNING:  # it counts on none that failed
                        self._admit([part])
            else:
                self._blame(parts[0][0], error)

    def _launch_prefill(self, parts: list[tuple[Request, PrefillChunk]], launched: list[InFlight]) -> None:
        try:
            step = self._runner.prefill([chunk for _, chunk in parts])
        except Exception as error:
            if self._can_isolate(parts, error):
                for part in parts:
                    if part[0].state is RequestState.RUNNING:  # it counts on none that failed
                        self._launch_prefill([part], launched)
            else:
                self._blame(parts[0][0], error)
            return
        kind = ("prefill", step.kind, step.reason)
        self._counters.steps[kind] += 1
        self._fed(parts, kind)
        if step.rows or step.scores is not None or step.hidden is not None:
            launched.append(InFlight(step, [request for request, chunk in parts if chunk.last], None, parts=parts))

    def _launch_together(
        self, batch: Batch, parts: list[tuple[Request, PrefillChunk]], launched: list[InFlight]
    ) -> bool:
        """Launch a decode step that feeds these parts of prompts too; False if it failed, and is to be run as two."""
        count = len(batch.requests)
        try:
            step = self._runner.decode_beside(batch.slots, [chunk for _, chunk in parts])
        except Exception as error:
            if is_fatal(error):
                self._break(error)
            logger.debug("prompts could not be fed beside decode", exc_info=True)
            return False
        kind = ("decode", step.kind, f"{step.reason}, prompts beside")
        self._counters.steps[kind] += 1
        self._fed(parts, kind)
        launched.append(InFlight(step.part(slice(count)), batch.requests, kind, batch.positions))
        ended = [request for request, chunk in parts if chunk.last]
        if ended:
            launched.append(InFlight(step.part(slice(count, None)), ended, None))
        return True

    def _fed(self, parts: Sequence[tuple[Request, PrefillChunk]], kind: StepKind) -> None:
        """Note that a step feeds these parts of prompts."""
        self._counters.tokens["prompt"] += sum(len(chunk.tokens) for _, chunk in parts)
        for request, chunk in parts:
            self.scheduler.prefill_launched(request, chunk)
            request.output.prefilled(kind)
            cached = request.pages.cached
            if cached and chunk.start == cached:
                request.output.cached_tokens = cached
                self._counters.tokens["cached"] += cached

    def _launch_decode(
        self, requests: Sequence[Request], slots: tuple[int, ...], positions: int, launched: list[InFlight]
    ) -> None:
        try:
            if self._drafter is None:
                step, quiet = self._runner.decode(slots), False
            else:
                step, quiet = self._decode_drafts(requests, slots)
        except Exception as error:
            if self._can_isolate(requests, error):
                for request in requests:
                    self._launch_decode((request,), (request.slot,), request.length, launched)
            else:
                self._blame(requests[0], error)
            return
        kind = self._decoded_by
        if kind[1] != step.kind or kind[2] != step.reason:
            kind = self._decoded_by = ("decode", step.kind, step.reason)
        self._counters.steps[kind] += 1
        launched.append(InFlight(step, requests, kind, positions, (), quiet))

    def _decode_drafts(self, requests: Sequence[Request], slots: tuple[int, ...]) -> tuple[LaunchedStep, bool]:
        """Launch a decode step that checks as many drafts of each row as are worth it; and whether drafting paused."""
        rows = [request.pace for request in requests if request.pace is not None]
        runner, drafting = self._runner, self._runner.drafting
        if drafting is None or not drafting.can_pause:
            chosen = choose(rows, partial(runner.decode_seconds, slots), self._most_checked)
            return runner.decode(slots, chosen), False
        if drafting.failure is not None:  # recorded steps would still draft, for nothing
            return runner.decode(slots, quiet=True), True
        kind = choose_or_pause(
            rows,
            drafting.most,
            lambda kind: runner.decode_seconds(slots, kind.query_len, quiet=kind.quiet),
            self._most_checked,
        )
        return runner.decode(slots, kind.query_len, quiet=kind.quiet), kind.quiet

    def _can_isolate(self, rows: Sequence[Any], error: Exception) -> bool:
        """Whether to run the rows of a failed call one by one, so that only the one to blame fails."""
        return len(rows) > 1 and not is_fatal(error)

    def _blame(self, request: Request, error: Exception) -> None:
        """Fail the one request whose work raised; everybody, if the device is lost."""
        if is_fatal(error):
            self._break(error)
        logger.debug("a request failed", exc_info=error)
        self._finish(request, FinishReason.ERROR, RequestError(f"a step failed: {described(error)}"))

    def _read(self, flight: InFlight) -> None:
        """Wait for a step and hand what it brings to its requests."""
        try:
            brought = self._reader.fetch(flight)
        except Exception as error:
            self._break(error)
        self._reader.hand_out(flight, brought)

    def _output(self, request: Request, keep_events: bool) -> RequestOutput:
        try:
            return RequestOutput(
                request.prompt_ids,
                request.sampling,
                self._tokenizer,
                request.index,
                request.choice,
                scored_from=request.scored_from,
                weights_version=self.weights_version,
                keep_events=keep_events,
                traffic=None if self._meter is None else self._meter.traffic,
                prompt=request.prompt,
                truncated=request.truncated,
            )
        except Exception as error:
            raise TokenizerError(
                f"the tokenizer failed on prompt {request.index}: {described(error)}; pass another tokenizer="
            ) from error

    def _finish(self, request: Request, reason: FinishReason, error: HybridgenError | None = None) -> None:
        """End a submitted request if it has not ended, and free what it held."""
        if request.state is RequestState.NEW:
            return
        if request.output.completion is None:
            request.output.end(reason, error)
        self._reader.release(request)

    def _recover(self, why: str) -> None:
        """After a step that ended in the middle: make device and host agree, and fail the requests that may have lost
        a token."""
        self._disturbed = False
        lost, self._lost = self._lost, []
        try:
            self._runner.recover()
        finally:
            for request in lost:
                if request.completion is None:
                    self._finish(request, FinishReason.ERROR, RequestError(why))

    def _break(self, error: Exception) -> NoReturn:
        """The device failed for good: everybody gets an error, now and later."""
        if isinstance(error, LostRanks):
            self._end = EngineError(str(error))
        else:
            self._end = EngineError(f"the device failed: {first_line(error)}; load a new engine in a new process")
        self.close()
        raise self._end from error
