"""The loop of steps: schedule, launch, read."""

from __future__ import annotations

import _signal
import logging
import threading
import time
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, NamedTuple, NoReturn

from hybridgen.core import FinishReason
from hybridgen.device.failures import is_fatal
from hybridgen.engine.handoff import TurnLock
from hybridgen.engine.output import Response, StepKind
from hybridgen.engine.requests import Plan
from hybridgen.engine.scheduler import Batch, Chunk, Scheduler, Sequence
from hybridgen.errors import EngineError, HybridgenError, RequestError, TokenizerError, described, first_line
from hybridgen.execution import LaunchedStep, ModelRunner
from hybridgen.execution.following import begin_call
from hybridgen.execution.fused_executors import inspect_fused
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.telemetry.statistics import Counters
from hybridgen.telemetry.traffic import DecodeMeter

logger = logging.getLogger(__name__)


class InFlight(NamedTuple):
    """A launched step and whose tokens it brings, by row."""

    step: LaunchedStep
    responses: list[Response]
    decoded_by: StepKind | None
    """How a decode step runs; None for a prefill."""
    positions: int = 0
    """Cached positions of a decode step's rows together."""


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
    ) -> None:
        """
        Args:
            run_ahead: calls that are launched before the last one's tokens are read, 0 or 1.
            reads_first_tokens_first: a prefill's tokens are read before the next call is launched, for where a launch
                takes the host long: else every first token would wait for it.
            meter: told of every decode step that was read.
        """
        self.scheduler = scheduler
        self._runner = runner
        self._counters = counters
        self._tokenizer = tokenizer
        self._run_ahead = run_ahead
        self._reads_first_tokens_first = reads_first_tokens_first
        self._responses: dict[Sequence, Response] = {}
        self._meter = meter
        self._batch: Batch | None = None
        self._positions = 0
        """Cached positions of that batch, together."""
        self._batch_responses: list[Response] = []
        """The responses of that batch, so that they are not looked up again in every step."""
        self._in_flight: list[InFlight] = []
        self._lock = TurnLock()
        self._stepping = False
        self._cancelled: list[Response] = []
        self._lost: list[Response] = []
        self._disturbed = False
        self._end: EngineError | None = None

    def submit(self, plans: list[Plan], responses: list[Response], *, keep_events: bool = False) -> None:
        """Queue requests, all or none, and put their responses into the caller's list; `step()` runs them.

        Raises:
            TokenizerError: the tokenizer fails on a prompt.
            EngineError: the loop is closed, its device failed, or the model's owner made another one of it.
        """
        with self._lock, interrupts_deferred():
            self.check()
            if not self._stepping:
                begin_call(self._runner)
            created = [self._respond(plan, keep_events) for plan in plans]
            responses += created
            for response in created:
                self._responses[response.sequence] = response
                self.scheduler.add(response.sequence)
            self._counters.requests["submitted"] += len(created)

    def cancel(self, responses: Iterable[Response]) -> None:
        """End these responses where they are; complete ones stay as they are."""
        with self._lock, interrupts_deferred():
            if self._stepping:  # from a callback, or the end of an abandoned stream: not in the middle of a step
                self._cancelled += responses
                return
            for response in responses:
                self._finish(response, FinishReason.CANCELLED)

    def close(self) -> None:
        """Fail everything that waits or runs, and every later call."""
        with self._lock, interrupts_deferred():
            self._end = self._end or EngineError("this engine was closed; load a new one with Engine.load()")
            self._in_flight = []
            for response in list(self._responses.values()):
                self._finish(response, FinishReason.ERROR, self._end)

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
                # Launched tokens may be lost, so that nobody who was running can go on. Whoever is interrupted
                # cancels its own requests first; the others fail.
                self._lost = [self._responses[s] for s in self.scheduler.running if s in self._responses]
                self._disturbed = True
                if not isinstance(error, Exception):
                    raise
                logger.debug("a step failed", exc_info=True)
                self._recover(f"a step failed: {described(error)}")
            finally:
                self._stepped()

    def idle(self, work: Callable[[], bool]) -> bool:
        """Do something on the device while no request needs it; false, and nothing done, while one waits or runs.

        Nothing is in flight then, and nobody can submit before `work` returns. What it returns is returned, what it
        raises is raised; the loop goes on after either. Ctrl-C waits until it is done.

        Raises:
            EngineError: the device failed on a step that was still in flight.
        """
        with self._lock, interrupts_deferred():
            if self._stepping or self._responses or self.ended:
                return False
            # With run-ahead, steps for requests that ended meanwhile can be left over.
            flights, self._in_flight = self._in_flight, []
            for flight in flights:
                self._read(flight)
            self._stepping = True  # whoever is told of what happens cannot start a step in the middle of it
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
        admitted, prefill, decode = self.scheduler.schedule()
        launched: list[InFlight] = []
        if admitted:
            failed = {sequence for sequence in admitted if not self._admit(sequence)}
            prefill = tuple(chunk for chunk in prefill if chunk.sequence not in failed)
        if prefill:
            self._launch_prefill(prefill, launched)
        if decode is not None:
            self._launch_decode(decode, launched)
        return launched

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence its slot on the device; False when that failed, and the sequence with it."""
        try:
            self._runner.admit(Admission(sequence.slot, sequence.pages, sequence.sampling, sequence.prompt_ids))
        except Exception as error:
            self._blame(sequence, error)
            return False
        return True

    def _launch_prefill(self, chunks: tuple[Chunk, ...], launched: list[InFlight]) -> None:
        try:
            step = self._runner.prefill([_describe(chunk) for chunk in chunks])
        except Exception as error:
            parts = [(chunk,) for chunk in chunks]
            self._isolate(error, chunks[0].sequence, parts, lambda part: self._launch_prefill(part, launched))
            return
        kind = ("prefill", step.kind, step.reason)
        self._counters.steps[kind] += 1
        self._counters.tokens["prompt"] += sum(chunk.length for chunk in chunks)
        responses = [self._responses[chunk.sequence] for chunk in chunks]
        for response in responses:
            response.prefilled(kind)
        if step.rows:
            last = [response for response, chunk in zip(responses, chunks, strict=True) if chunk.last]
            launched.append(InFlight(step, last, None))

    def _launch_decode(self, batch: Batch, launched: list[InFlight]) -> None:
        try:
            step = self._runner.decode(batch.slots)
        except Exception as error:
            parts = [Batch.of([sequence]) for sequence in batch.sequences]
            self._isolate(error, batch.sequences[0], parts, lambda part: self._launch_decode(part, launched))
            return
        if batch is not self._batch:
            self._batch, self._batch_responses = batch, [self._responses[s] for s in batch.sequences]
            self._positions = sum(sequence.length for sequence in batch.sequences)
        else:
            self._positions += len(batch.slots)
        kind = ("decode", step.kind, step.reason)
        self._counters.steps[kind] += 1
        launched.append(InFlight(step, self._batch_responses, kind, self._positions))

    def _isolate(self, error: Exception, first: Sequence, parts: list[Any], launch: Callable[[Any], None]) -> None:
        """A call failed: run its requests one by one, so that only the one to blame fails."""
        if len(parts) == 1 or is_fatal(error):
            self._blame(first, error)
            return
        for part in parts:
            launch(part)

    def _blame(self, sequence: Sequence, error: Exception) -> None:
        """Fail the one request whose work raised; everybody, if the device is lost."""
        if is_fatal(error):
            self._break(error)
        logger.debug("a request failed", exc_info=error)
        failure = RequestError(f"a step failed: {described(error)}")
        self._finish(self._responses[sequence], FinishReason.ERROR, failure)

    def _read(self, flight: InFlight) -> None:
        """Wait for a step and hand its tokens to their responses."""
        try:
            tokens, logprobs = flight.step.read()
        except Exception as error:
            self._break(error)
        now = time.perf_counter()
        if self._meter is not None:
            if flight.decoded_by is None:
                self._meter.pause()
            else:
                self._meter.step(len(tokens), flight.positions, now)
        why = inspect_fused(self._runner) if [-1] in tokens else None
        if why is not None:
            self._counters.fall_back(why)
        generated = 0
        rows = zip(flight.responses, tokens, logprobs or repeat(None, len(tokens)), strict=True)
        for response, accepted, its_logprobs in rows:
            if response.completion is not None:  # it ended while this step was in flight
                continue
            if why is not None and accepted[0] < 0:
                self._finish(response, FinishReason.ERROR, RequestError(f"{why}; run the prompt again"))
                continue
            try:
                for token, logprob in zip(accepted, its_logprobs or repeat(None), strict=False):
                    generated += token >= 0
                    response.push(token, logprob, now, flight.decoded_by)
                    if response.completion is not None:
                        break
            except Exception as error:
                # A tokenizer or a streamer of the user's failed; the other requests of the step go on.
                logger.debug("a request failed", exc_info=error)
                failure = RequestError(f"its output could not be handled: {described(error)}")
                self._finish(response, FinishReason.ERROR, failure)
            if response.completion is not None:
                self._release(response)
        self._counters.tokens["generated"] += generated
        if generated and self._counters.first_token is None:
            self._counters.first_token = now - flight.responses[0].submitted

    def _respond(self, plan: Plan, keep_events: bool) -> Response:
        try:
            return Response(
                Sequence(plan.prompt_ids, plan.sampling),
                self._tokenizer,
                plan.prompt,
                plan.choice,
                keep_events=keep_events,
                traffic=None if self._meter is None else self._meter.traffic,
            )
        except Exception as error:
            raise TokenizerError(
                f"the tokenizer failed on prompt {plan.prompt}: {described(error)}; pass another tokenizer="
            ) from error

    def _finish(self, response: Response, reason: FinishReason, error: HybridgenError | None = None) -> None:
        """End a response if it has not ended, and free what it held."""
        if response.completion is None:
            response.end(reason, error)
        self._release(response)

    def _release(self, response: Response) -> None:
        """Free what a completed request held; once is enough."""
        self.scheduler.finish(response.sequence)
        self._batch, self._batch_responses = None, []
        if self._responses.pop(response.sequence, None) is not None and response.completion is not None:
            self._counters.requests[str(response.completion.finish_reason)] += 1

    def _recover(self, why: str) -> None:
        """After a step that ended in the middle: make device and host agree, and fail whom it may have cost a token."""
        self._disturbed = False
        lost, self._lost = self._lost, []
        try:
            self._runner.recover()
        finally:
            for response in lost:
                if response.completion is None:
                    self._finish(response, FinishReason.ERROR, RequestError(why))

    def _break(self, error: Exception) -> NoReturn:
        """The device failed for good: everybody gets an error, now and later."""
        self._end = EngineError(f"the device failed: {first_line(error)}; load a new engine in a new process")
        self.close()
        raise self._end from error


def _describe(chunk: Chunk) -> PrefillChunk:
    sequence = chunk.sequence
    return PrefillChunk(
        slot=sequence.slot,
        tokens=sequence.prefill_ids[chunk.start : chunk.start + chunk.length],
        start=chunk.start,
        rope_length=len(sequence.prefill_ids),
        generated=len(sequence.prefill_ids) - len(sequence.prompt_ids),
        last=chunk.last,
    )


class interrupts_deferred:
    """Take a Ctrl-C that arrives inside at the end; a second one at once.

    Only the main thread gets signals; elsewhere, and where SIGINT has no Python handler, this does nothing.
    """

    # `_signal` is what the module `signal` wraps: it makes enums of its results, which takes longer than a whole step
    # of the loop.

    __slots__ = ("_handler", "_received")

    def __enter__(self) -> None:
        self._handler: Any = None
        self._received: list[tuple[int, Any]] = []
        if threading.current_thread() is not threading.main_thread():
            return
        handler = _signal.getsignal(_signal.SIGINT)
        if callable(handler) and not isinstance(getattr(handler, "__self__", None), interrupts_deferred):
            self._handler = handler
            _signal.signal(_signal.SIGINT, self._defer)

    def __exit__(self, *_: object) -> None:
        if self._handler is None:
            return
        _signal.signal(_signal.SIGINT, self._handler)
        if self._received:
            self._handler(*self._received[0])

    def _defer(self, number: int, frame: Any) -> None:
        self._received.append((number, frame))
        if len(self._received) > 1:
            self._handler(number, frame)
