"""Reads launched steps: what they bring is handed to its requests, and what these held is freed when they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from hybridgen.core import FinishReason, TokenLogprob
from hybridgen.engine.output import StepKind
from hybridgen.engine.requests import Request
from hybridgen.engine.scheduler import Scheduler
from hybridgen.errors import RequestError
from hybridgen.execution import LaunchedStep, ModelRunner
from hybridgen.execution.fused_executors import inspect_fused
from hybridgen.execution.plan import DraftCounts, PrefillChunk, StepOutput
from hybridgen.execution.ring import StepPart
from hybridgen.speculation.pace import RowPace
from hybridgen.telemetry.statistics import Counters
from hybridgen.telemetry.traffic import DecodeMeter


class InFlight(NamedTuple):
    """A launched step, and the requests whose tokens it brings, by row."""

    step: LaunchedStep | StepPart
    requests: Sequence[Request]
    decoded_by: StepKind | None
    """How a decode step runs; None for a prefill."""
    positions: int = 0
    """Cached positions of a decode step's rows together."""
    parts: Sequence[tuple[Request, PrefillChunk]] = ()
    """What a prefill fed."""
    quiet: bool = False
    """Whether nobody drafted in a decode step, though somebody could."""


class Reader:
    """Hands what launched steps bring to their requests, in the order in which they were launched."""

    def __init__(
        self, runner: ModelRunner, scheduler: Scheduler, counters: Counters, meter: DecodeMeter | None
    ) -> None:
        """`meter`: told of every decode step that was read."""
        self._runner = runner
        self._scheduler = scheduler
        self._counters = counters
        self._meter = meter
        self.on_end: Callable[[Request], object] = lambda request: None
        """Called with each request that ends."""

    def fetch(self, flight: InFlight) -> StepOutput:
        """Wait for a step, and return what it brings; scores and hidden states are handed out at once."""
        if flight.step.scores is not None:
            scored = [(request, len(chunk.targets)) for request, chunk in flight.parts if chunk.targets]
            self._take_scores(scored, flight.step.scores.read())
        if flight.step.hidden is not None:
            asked = [(request, chunk) for request, chunk in flight.parts if chunk.hidden]
            self._take_hidden(asked, flight.step.hidden.read())
        return flight.step.read()

    def hand_out(self, flight: InFlight, brought: StepOutput) -> None:
        """Hand the tokens of a step to its requests, and end those that are complete."""
        tokens, logprobs, drafts = brought
        now = time.perf_counter()
        if self._meter is not None:
            if flight.decoded_by is None:
                self._meter.pause()
            else:
                self._meter.step(len(tokens), flight.positions, now)
        generated = 0
        unchosen: list[Request] = []
        decoded_by, plain, none = flight.decoded_by, logprobs is None and drafts is None, (None,) * len(tokens)
        rows = zip(flight.requests, tokens, logprobs or none, drafts or none, strict=True)
        for request, accepted, its_logprobs, its_drafts in rows:
            output = request.output
            if plain and output.plain and output.take_plain(accepted, now, decoded_by):
                generated += 1
                continue
            if output.completion is not None:  # it ended while this step was in flight
                continue
            if its_drafts is not None:
                output.drafted_tokens += its_drafts.checked
            taken = output.take(accepted, its_logprobs, now, decoded_by)
            generated += taken
            if its_drafts is not None:
                self._count_drafts(request, its_drafts, taken, flight)
            if output.completion is not None:
                self.release(request)
            elif taken != len(accepted):
                unchosen.append(request)
            elif taken != 1:
                self._scheduler.accept(request, taken)
        if unchosen:
            self._end_unchosen(unchosen)
        self._counters.tokens["generated"] += generated
        if generated and self._counters.first_token is None:
            self._counters.first_token = now - flight.requests[0].output.submitted

    def _count_drafts(self, request: Request, drafts: DraftCounts, taken: int, flight: InFlight) -> None:
        """Note what became of a row's drafts in a step that brought it `taken` tokens."""
        if request.pace is None:
            request.pace = RowPace()
        request.pace.read(drafts.checked, max(taken - 1, 0), drafts.made, quiet=flight.quiet)
        if flight.decoded_by is not None:
            counted = self._counters.drafts
            counted["rows"] += 1
            counted["tokens"] += taken
            counted["checked"] += drafts.checked
            counted["accepted"] += max(taken - 1, 0)
        drafting = self._runner.drafting
        if drafts.dropped and drafting is not None:
            self._counters.fall_back(f"the drafter {drafting.name} gave {drafting.wrong}; they are dropped")

    def _take_scores(self, parts: Sequence[tuple[Request, int]], scores: Sequence[Sequence[TokenLogprob]]) -> None:
        """Hand the log-probabilities of prompts to their requests: of so many tokens, then of their alternatives."""
        for (request, own), found in zip(parts, scores, strict=True):
            if request.output.completion is not None:
                continue
            self._counters.tokens["scored"] += len(found)
            request.output.other_scores += found[own:]
            request.output.take_scores(found[:own])
            if request.output.completion is not None:
                self.release(request)

    def _take_hidden(self, parts: Sequence[tuple[Request, PrefillChunk]], states: Sequence[Tensor]) -> None:
        """Hand hidden states to the requests that asked for them."""
        for (request, chunk), found in zip(parts, states, strict=True):
            if request.output.completion is None:
                request.output.states.append(found)
                if chunk.start + len(chunk.tokens) == len(request.prefill_ids):
                    request.output.end(FinishReason.LENGTH)
                    self.release(request)

    def _end_unchosen(self, requests: list[Request]) -> None:
        """Fail the requests for which a step had nothing to choose. A fused step that was given up can be the cause."""
        why = inspect_fused(self._runner)
        if why is not None:
            self._counters.fall_back(why)
        for request in requests:
            failure = request.sampling.has_own and self._runner.sampler.failure(request.slot)
            if failure:
                request.output.end(FinishReason.ERROR, RequestError(failure))
            else:
                request.output.end_unchosen(why)
            self.release(request)

    def release(self, request: Request) -> None:
        """Free what a completed request held, and count how it ended; once."""
        completion = request.output.completion
        # The last token was chosen and not fed.
        normal = completion is not None and completion.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        fed = request.output.token_ids[:-1] if normal else ()
        if self._scheduler.finish(request, fed) and completion is not None:
            self._counters.requests[str(completion.finish_reason)] += 1
            self.on_end(request)
