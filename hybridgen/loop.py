"""The loop of steps: schedule, launch, read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, NamedTuple

import torch

from hybridgen.core import TokenLogprob
from hybridgen.errors import EngineError, RequestError
from hybridgen.execution import Counters, LaunchedStep, ModelRunner, PrefillChunk
from hybridgen.output import Response
from hybridgen.requests import Plan
from hybridgen.scheduler import Chunk, Scheduler, Sequence

logger = logging.getLogger(__name__)


class InFlight(NamedTuple):
    """A launched step and whose tokens it brings, by row."""

    step: LaunchedStep
    responses: list[Response]


class StepLoop:
    """Runs requests from submission to completion. Thread-safe: one step at a time."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        counters: Counters,
        *,
        tokenizer: Any,
        run_ahead: int,
        kind: tuple[str, str],
    ) -> None:
        self.scheduler = scheduler
        self.broken: EngineError | None = None
        """Set once the device failed; every later call gets it."""
        self._runner = runner
        self._counters = counters
        self._tokenizer = tokenizer
        self._run_ahead = run_ahead
        self._kind = kind
        self._responses: dict[Sequence, Response] = {}
        self._in_flight: list[InFlight] = []
        self._lock = threading.RLock()

    def submit(self, plans: list[Plan], *, keep_events: bool = False) -> list[Response]:
        """Queue requests; `step()` runs them."""
        with self._lock:
            responses = []
            for plan in plans:
                sequence = Sequence(plan.prompt_ids, plan.sampling)
                response = Response(sequence, self._tokenizer, plan.prompt, plan.choice)
                response.keep_events = keep_events
                self._responses[sequence] = response
                self.scheduler.add(sequence)
                responses.append(response)
            self._counters.requests["submitted"] += len(plans)
            return responses

    def cancel(self, responses: list[Response]) -> None:
        """End these responses where they are; complete ones stay as they are."""
        with self._lock:
            for response in responses:
                if response.completion is None:
                    response.cancel()
                    self._retire(response)

    def cancel_all(self) -> None:
        """End everything that waits or runs."""
        with self._lock:
            self.cancel(list(self._responses.values()))
            self._in_flight = []

    def step(self) -> None:
        """Launch the next prefill and decode calls, then read what earlier ones produced.

        With run-ahead, the tokens of the calls launched here are read in the next step, while its own calls run.

        Raises:
            EngineError: the device failed, now or before.
        """
        with self._lock:
            if self.broken is not None:
                raise self.broken
            try:
                earlier, self._in_flight = self._in_flight, []
                launched = self._launch()
                if self._run_ahead and launched:
                    self._in_flight = launched
                else:
                    earlier = earlier + launched
                for flight in earlier:
                    self._read(flight)
            except KeyboardInterrupt:
                # Tokens of an interrupted step may be lost, so that nobody who was in it can go on.
                self.cancel([self._responses[sequence] for sequence in list(self.scheduler.running)])
                raise

    def _launch(self) -> list[InFlight]:
        admitted, prefill, decode = self.scheduler.schedule()
        for sequence in admitted:
            self._runner.admit(sequence.slot, sequence.pages, sequence.sampling, sequence.prompt_ids)
        launched: list[InFlight] = []
        if prefill:
            self._launch_prefill(prefill, launched)
        if decode:
            self._launch_decode(decode, launched)
        return launched

    def _launch_prefill(self, chunks: list[Chunk], launched: list[InFlight]) -> None:
        try:
            step = self._runner.prefill([_describe(chunk) for chunk in chunks])
        except Exception as error:
            self._isolate(error, chunks, chunks[0].sequence, lambda work: self._launch_prefill(work, launched))
            return
        responses = [self._responses[chunk.sequence] for chunk in chunks]
        self._note("prefill", responses)
        self._counters.tokens["prompt"] += sum(chunk.length for chunk in chunks)
        if step is not None:
            last = [response for response, chunk in zip(responses, chunks, strict=True) if chunk.last]
            launched.append(InFlight(step, last))

    def _launch_decode(self, sequences: list[Sequence], launched: list[InFlight]) -> None:
        try:
            step = self._runner.decode(tuple(sequence.slot for sequence in sequences))
        except Exception as error:
            self._isolate(error, sequences, sequences[0], lambda work: self._launch_decode(work, launched))
            return
        responses = [self._responses[sequence] for sequence in sequences]
        self._note("decode", responses)
        launched.append(InFlight(step, responses))

    def _note(self, phase: str, responses: list[Response]) -> None:
        self._counters.steps[(phase, *self._kind)] += 1
        for response in responses:
            response.ran(phase, *self._kind)

    def _isolate(self, error: Exception, work: list[Any], first: Sequence, launch: Callable[[list[Any]], None]) -> None:
        """A call failed: run its requests one by one, so that only the one to blame fails."""
        if _is_fatal(error):
            self._break(error)
        if len(work) > 1:
            for item in work:
                launch([item])
            return
        logger.debug("a request failed", exc_info=error)
        response = self._responses[first]
        response.fail(RequestError(f"a step failed: {type(error).__name__}: {first_line(error)}"))
        self._retire(response)

    def _read(self, flight: InFlight) -> None:
        try:
            output = flight.step.read()
        except Exception as error:
            self._break(error)
        logprobs: Iterable[TokenLogprob | None] = output.logprobs or repeat(None, len(output.tokens))
        for response, token, logprob in zip(flight.responses, output.tokens, logprobs, strict=True):
            if response.completion is None:  # else it ended while this step was in flight
                self._deliver(response, token, logprob)

    def _deliver(self, response: Response, token: int, logprob: TokenLogprob | None) -> None:
        self._counters.tokens["generated"] += token >= 0
        try:
            response.push(token, logprob)
        except Exception as error:
            # A tokenizer or a streamer of the user's failed; the other requests of the step go on.
            logger.debug("a request failed", exc_info=error)
            response.fail(RequestError(f"its output could not be handled: {type(error).__name__}: {error}"))
        if response.completion is not None:
            self._retire(response)

    def _retire(self, response: Response) -> None:
        """Free what a completed request held."""
        if self._responses.pop(response.sequence, None) is None or response.completion is None:
            return
        self.scheduler.finish(response.sequence)
        self._counters.requests[str(response.completion.finish_reason)] += 1

    def _break(self, error: Exception) -> None:
        """The device failed for good: everybody gets an error, now and later."""
        self.broken = EngineError(f"the device failed: {first_line(error)}; load a new engine in a new process")
        self._in_flight = []
        for response in list(self._responses.values()):
            response.fail(self.broken)
            self._retire(response)
        raise self.broken from error


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


def _is_fatal(error: Exception) -> bool:
    """Whether the CUDA context is lost. Running out of memory is not fatal: a smaller call may fit."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for messages of one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
