"""Calls: what is asked for becomes requests; the loop gets them, and its steps are taken until they have ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, overload

import torch
from tqdm.auto import tqdm

from hybridgen.arguments import (
    SCORES,
    ManyPrompts,
    OnePrompt,
    Sampling,
    end_streamer,
    returns_errors,
    scores_of,
    scoring_pairs,
)
from hybridgen.config import EngineConfig
from hybridgen.core import Completion, TokenEvent
from hybridgen.engine import hidden
from hybridgen.engine.alternatives import merged
from hybridgen.engine.assembly import Parts
from hybridgen.engine.asynchronous import AsyncCalls
from hybridgen.engine.launched import Following, Sharing
from hybridgen.engine.loop import StepLoop
from hybridgen.engine.requests import Request, collect, make_requests, results
from hybridgen.errors import EngineError, Interrupted, SamplingError, described, shown
from hybridgen.execution import ModelRunner
from hybridgen.loading import Checkpoint
from hybridgen.telemetry.statistics import Counters
from hybridgen.text.prompts import Prompts, split_prompts

CLOSED = "this engine is closed; load a new one with Engine.load()"


def run_requests(
    loop: StepLoop, requests: list[Request], streamer: Any, end_call: Callable[[], None], no_bar: bool | None
) -> None:
    """Run requests to their end.

    Args:
        streamer: a Hugging Face streamer for the one request, or None.
        end_call: called when all have ended.
        no_bar: tqdm's `disable`.

    Raises:
        Interrupted: Ctrl-C; holds what was finished.
        EngineError: the engine was closed, or its device failed, before all had ended.
    """
    try:
        if streamer is None:
            loop.start(requests, patient=len(requests) > 1)
        else:
            loop.submit(requests)
            _attach_streamer(requests[0], streamer)
            loop.step()
        # The bar comes behind the first launch, since the device waits while it is made.
        with tqdm(total=len(requests), desc="generate", unit="request", delay=1, disable=no_bar) as bar:
            active = [request for request in requests if request.completion is None]
            while active:
                if not bar.disable:
                    bar.update(_complete(requests) - bar.n)
                loop.step()
                while active and active[-1].completion is not None:
                    active.pop()
            bar.update(len(requests) - bar.n)
        end_call()
    except KeyboardInterrupt:
        done = _complete(requests)
        loop.cancel(requests)
        raise Interrupted(
            f"interrupted with {done} of {len(requests)} requests finished; they are in .completions",
            collect(request for request in requests if request.completion is not None),
        ) from None
    except EngineError:
        if _complete(requests) < len(requests):
            raise  # else every request has ended, and its completion has the error
    finally:
        loop.cancel(requests)


def stream_requests(
    loop: StepLoop, requests: list[Request], refused: Mapping[int, Completion], end_call: Callable[[], None]
) -> Iterator[TokenEvent]:
    """Run requests, and yield each token as the host reads it. They are cancelled when the iterator is closed.

    Args:
        refused: completions of prompts that were refused, by their index.
        end_call: called when all have ended.
    """
    for index, completion in refused.items():
        yield TokenEvent(token_id=None, text="", index=index, completion=completion)
    try:
        loop.submit(requests, keep_events=True)
        active = list(requests)
        while active:
            for request in list(active):
                events = request.output.events
                while events:
                    event = events.popleft()
                    if event.completion is not None:
                        active.remove(request)
                    yield event
            # Other calls step the loop too, so that events may be there already.
            if active and not any(request.output.events for request in active):
                loop.step()
        end_call()
    finally:
        loop.cancel(requests)


def _complete(requests: list[Request]) -> int:
    return sum(request.completion is not None for request in requests)


def _attach_streamer(request: Request, streamer: Any) -> None:
    """Feed a Hugging Face streamer: the prompt's ids [1, P] first, then each token's id [1], on the CPU."""
    streamer.put(torch.tensor([request.prompt_ids], device="cpu"))
    request.output.listen(lambda token: streamer.put(torch.tensor([token], device="cpu")))


class Calls:
    """What callers ask of an engine: text, tokens as they come, scores, hidden states."""

    config: EngineConfig
    checkpoint: Checkpoint
    max_context: int
    _parts: Parts | None
    _runner: ModelRunner | None
    _loop: StepLoop | None
    _counters: Counters
    _no_bar: bool | None
    _num_pages: int
    _spares_call: bool
    _calls: AsyncCalls | None
    _together: Sharing | Following | None
    """What makes a call the same on all ranks, where torchrun started them."""

    @overload
    def generate(  # type: ignore[overload-overlap]  # a string is one prompt
        self,
        prompts: OnePrompt,
        sampling: Sampling = None,
        *,
        streamer: Any = None,
        errors: str = "raise",
        **fields: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: ManyPrompts,
        sampling: Sampling = None,
        *,
        streamer: Any = None,
        errors: str = "raise",
        **fields: Any,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Any,
        sampling: Sampling = None,
        *,
        streamer: Any = None,
        errors: str = "raise",
        **fields: Any,
    ) -> Any: ...

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        streamer: Any = None,
        errors: str = "raise",
        **fields: Any,
    ) -> Any:
        """Generate text for one prompt or a list of them.

        Args:
            prompts: a string, token ids (list or tensor), chat messages or `{"messages": ..., "tools": ...}`, or any
                number of those: a list, an array, a column of a table, a generator.
            sampling: for all prompts, or a list with one per prompt.
            streamer: a Hugging Face streamer (`put(ids)`, `end()`), for one prompt.
            errors: `"raise"`: a prompt that cannot be run is an error before anything runs. `"return"`: it becomes a
                completion with its error, and the others run.
            fields: single `SamplingParams` fields, for all prompts.

        Returns:
            A `Completion` for one prompt; for a list, a list of them in its order. A request of a list that failed
            has `finish_reason="error"`; the others are not affected.

        Raises:
            PromptError, SamplingError, TokenizerError: before anything runs.
            RequestError: the one prompt failed while it ran (not with `errors="return"`).
            Interrupted: Ctrl-C; holds what was finished.
        """
        if self._together is not None:
            return self._together.call(lambda: self._generate(prompts, sampling, streamer, errors, fields))
        return self._generate(prompts, sampling, streamer, errors, fields)

    def _generate(
        self, prompts: Prompts, sampling: Sampling, streamer: Any, errors: str, fields: dict[str, Any]
    ) -> Any:
        try:
            refused: dict[int, Completion] | None = {} if returns_errors(errors) else None
            items, single = split_prompts(prompts)
            requests = self.make_requests(items, sampling, fields, refused)
            if streamer is not None and len(requests) + len(refused or ()) != 1:
                raise SamplingError(f"streamer= takes one prompt with n=1, not {len(requests)} requests; use stream()")
            if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
                raise SamplingError(f"streamer={shown(streamer)} has no put() and end(); give a transformers streamer")
            if requests:
                self._run(requests, streamer)
        finally:
            end_streamer(streamer)
        return results(requests, single, refused)

    async def agenerate(
        self, prompts: Prompts, sampling: Sampling = None, *, errors: str = "raise", **fields: Any
    ) -> Any:
        """`generate()` for coroutines: any number of them share the batch. Cancelling the task cancels its requests."""
        return await self._async_calls().generate(prompts, sampling, errors, fields)

    def astream(
        self, prompts: Prompts, sampling: Sampling = None, *, errors: str = "raise", **fields: Any
    ) -> AsyncIterator[TokenEvent]:
        """`stream()` for coroutines. Arguments are checked by the first `anext()`; closing it (`aclose()`) cancels its
        requests."""
        return self._async_calls().stream(prompts, sampling, errors, fields)

    def _async_calls(self) -> AsyncCalls:
        loop = self.open_loop()
        if self._calls is None:
            self._calls = AsyncCalls(loop, self.make_requests, self._end_call)
        return self._calls

    def hidden_states(self, prompts: Prompts, layers: int | Iterable[int] = -1, *, pool: str | None = None) -> Any:
        """Hidden states of prompts, as transformers' `output_hidden_states` numbers them. Nothing is generated.

        Args:
            prompts: as for `generate()`: one, or a list.
            layers: which states, from 0 (what goes into the first layer) to the number of layers (what comes behind the
                last norm), or from the end with -1.
            pool: `mean` over the prompt's tokens (float32), its `last` token alone, or None for every token.

        Returns:
            A tensor [layers, tokens, hidden] on the CPU, or [layers, hidden] if pooled; for a list, a list of them.

        Raises:
            ConfigError, PromptError, TokenizerError: before anything runs.
            RequestError: a request failed while it ran.
        """
        wanted = hidden.wanted(layers, pool, len(self._open_parts().built.runner.bound.layers))
        items, single = split_prompts(prompts)
        requests = hidden.hidden_requests(items, wanted, self.checkpoint, self.max_context, self.cache_tokens)
        self._run(requests, None)
        states = [hidden.joined(request) for request in requests]
        return states[0] if single else states

    def score(self, prompts: Prompts, completions: Any = None, *, cache_salt: str | None = None) -> Any:
        """How likely the model finds each completion behind its prompt. Nothing is generated.

        Only the positions that tell scored tokens go through the model's head, in parts, so that memory does not grow
        with the length. What the prefix cache has of a prompt is not computed again, and pairs that differ in their
        last token alone are computed once.

        Args:
            prompts: as for `generate()`: one, or a list.
            completions: text or token ids, one for each prompt; a list of them for one prompt. A text is encoded
                together with its prompt. None scores every token of the prompts but the first.
            cache_salt: see `SamplingParams.cache_salt`.

        Returns:
            A `Score`; for a list of prompts or completions, a list of them in its order.

        Raises:
            PromptError, TokenizerError: before anything runs.
            RequestError: the one request failed while it ran.
            Interrupted: Ctrl-C; holds what was finished.
        """
        if self._together is not None:
            return scores_of(*self._together.call(lambda: self._score(prompts, completions, cache_salt)))
        return scores_of(*self._score(prompts, completions, cache_salt))

    def _score(self, prompts: Prompts, completions: Any, cache_salt: str | None) -> tuple[list[Completion], bool]:
        """The completions that tell the scores, and whether one is asked for."""
        pairs, single = scoring_pairs(
            split_prompts(prompts), None if completions is None else split_prompts(completions)
        )
        requests = merged(self.make_requests(pairs, replace(SCORES, cache_salt=cache_salt), {}))
        if requests:
            self._run(requests, None)
        found: list[Completion] = results(requests, False, None)
        return found, single

    def stream(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        errors: str = "raise",
        **fields: Any,
    ) -> Iterator[TokenEvent]:
        """Generate as `generate()` does, and yield each token as the host reads it.

        Arguments are checked at once; the requests start with the first `next()` and are cancelled when the iterator
        is closed. The last event of each request has its `completion`, with an `error` if it failed.
        """
        refused: dict[int, Completion] | None = {} if returns_errors(errors) else None
        items, _ = split_prompts(prompts)
        return self._stream(self.make_requests(items, sampling, fields, refused), refused or {})

    def _stream(self, requests: list[Request], refused: dict[int, Completion]) -> Iterator[TokenEvent]:
        yield from stream_requests(self.open_loop(), requests, refused, self._end_call)

    def make_requests(
        self, items: list[Any], sampling: Any, fields: dict[str, Any], refused: dict[int, Completion] | None = None
    ) -> list[Request]:
        """Check and encode prompts; see `hybridgen.engine.requests.make_requests`."""
        self.open_loop()
        return make_requests(items, sampling, fields, self.checkpoint, self.max_context, self.cache_tokens, refused)

    @property
    def cache_tokens(self) -> int:
        """Positions that the KV cache holds."""
        return (self._num_pages - 1) * self.config.page_size

    def _run(self, requests: list[Request], streamer: Any) -> None:
        """Run requests to their end."""
        run_requests(self.open_loop(), requests, streamer, self._end_call, self._no_bar)

    @property
    def rank(self) -> int:
        """Of its tensor-parallel group: above 0 only in a program that torchrun runs on every rank."""
        return self._together.rank if isinstance(self._together, Following) else 0

    def open_loop(self) -> StepLoop:
        """The loop, for callers that submit requests and take the steps alone, as a server does.

        Raises:
            EngineError: the engine is closed, or its device failed.
        """
        loop = self._loop  # another thread may close the engine
        if loop is None:
            if self.rank:
                raise EngineError(
                    f"this is rank {self.rank}: it makes generate() and score() calls with all ranks; everything else "
                    "is for rank 0, while the others are in follow()"
                )
            raise EngineError(CLOSED)
        loop.check()
        return loop

    def _open_parts(self) -> Parts:
        self.open_loop()
        parts = self._parts  # another thread may close the engine
        if parts is None:
            raise EngineError(CLOSED)
        return parts

    def idle(self) -> bool:
        """Record a graph that was missed often enough, if no request waits or runs; returns whether more are wanted.

        `generate()` and `stream()` do this once at the end of a call. A caller that takes the loop's steps alone, such
        as a server, calls it while there is nothing else to do.
        """
        loop, runner = self.open_loop(), self._runner
        return False if runner is None else loop.idle(runner.capture_pending)

    def record_missing(self) -> bool:
        """`idle()` for callers that must not fail with it: a failure is counted, and warned of once.

        Raises:
            EngineError: the engine is closed, or its device failed.
        """
        try:
            return self.idle()
        except EngineError:
            raise
        except Exception as error:
            self._counters.fall_back(f"recording while idle failed: {described(error)}")
            return False

    def _end_call(self) -> None:
        """After a call, whose results are complete: record a graph that it missed."""
        if self._spares_call:  # a process that makes one call would do it for nobody
            self._spares_call = False
            return
        with suppress(EngineError):  # closed meanwhile
            self.record_missing()
