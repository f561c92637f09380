"""The engine: a loaded model, its cache, and calls to generate with it."""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import torch

from hybridgen.arguments import (
    SCORES,
    ManyPrompts,
    OnePrompt,
    Sampling,
    check_keywords,
    end_streamer,
    returns_errors,
    scores_of,
    scoring_pairs,
)
from hybridgen.compilation.store.session import CompileCache, mode_of, preload
from hybridgen.config import EngineConfig, bar_disabled
from hybridgen.core import Completion, TokenEvent
from hybridgen.device.capture import CAPTURING
from hybridgen.display import html_table
from hybridgen.engine import hidden, upkeep
from hybridgen.engine.alternatives import merged
from hybridgen.engine.assembly import Parts, assemble
from hybridgen.engine.asynchronous import AsyncCalls
from hybridgen.engine.calls import run_requests, stream_requests
from hybridgen.engine.drafter import Opened, open_drafter
from hybridgen.engine.launched import Following, Sharing
from hybridgen.engine.loop import StepLoop
from hybridgen.engine.preflight import check_config, open_cache, resolve_config
from hybridgen.engine.report import engine_stats
from hybridgen.engine.requests import Request, make_requests, results
from hybridgen.errors import EngineError, SamplingError, described, shown
from hybridgen.execution import ModelRunner
from hybridgen.execution.warm_up import run_all_samplers
from hybridgen.loading import Checkpoint, LoadedModel
from hybridgen.parallel.launched import LaunchedRanks, Place, find_place, placed
from hybridgen.parallel.lead import Lead
from hybridgen.parallel.start import start as start_ranks
from hybridgen.parallel.weights import load_share
from hybridgen.telemetry.statistics import Counters, EngineStats
from hybridgen.telemetry.traffic import Traffic
from hybridgen.text.prompts import Prompts, split_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CLOSED = "this engine is closed; load a new one with Engine.load()"


class Engine:
    """Generates text with one model on one device.

    Use it as a context manager, or call `close()`. A live module that was handed in stays as it is all the while: the
    engine works on a twin of it, and each call sees what became of its weights and hooks. Calls from several threads
    are safe; they share the batch.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        loaded: LoadedModel,
        config: EngineConfig,
        cache: CompileCache | None = None,
        lead: Lead | None = None,
        drafter: Opened | None = None,
    ) -> None:
        """Build an engine around a loaded model; most callers want `Engine.load()`.

        Args:
            cache: what `open_cache()` gave before the weights were read; None opens it here.
            lead: the group of processes that have the model's other parts, which ends with the engine.
            drafter: what `open_drafter()` gave before the weights were read; None opens it here, if there is one.
        """
        self.config = config
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        resolved = check_config(checkpoint, config)
        self.max_context = resolved.max_context
        """The longest prompt plus output, in tokens."""
        self.mode = resolved.mode
        """How steps run: `config.mode`, with `auto` decided."""
        self._counters = Counters()
        self._no_bar = bar_disabled(config.progress)
        self._parts: Parts | None = None
        self._runner: ModelRunner | None = None
        self._loop: StepLoop | None = None
        self._calls: AsyncCalls | None = None
        self._together: Sharing | Following | None = None
        """What makes a call the same on all ranks, where torchrun started them."""
        if lead is not None and isinstance(lead.ranks, LaunchedRanks):
            self._together = Sharing(lead, lead.ranks)
        # Undone in reverse order by close(), and also when the engine is dropped without it.
        undo = ExitStack()
        self._undo = weakref.finalize(self, undo.close)
        self._undo.atexit = False
        if lead is not None:
            undo.callback(lead.close)
        try:
            self.cache = open_cache(checkpoint, config) if cache is None else cache
            """The engine's entry of the compile cache: documents, kernels, compiled units."""
            undo.callback(self.cache.close)
            parts = assemble(checkpoint, loaded, config, resolved, self.cache, self._counters, undo, lead, drafter)
            built = parts.built
            self._parts, self._runner, self._loop, self._meter = parts, built.runner, built.loop, built.meter
            self._num_pages, self._spares_call = built.num_pages, built.spares_first_call
            if config.adapter is not None:
                with parts.startup.timed("adapter"):
                    self.set_adapter(config.adapter)
            self.cache.end_start()
            atexit.register(_keep_plan, weakref.ref(self))
        except BaseException:
            self.close()
            raise
        logger.info("%s is ready on %s in mode %s", checkpoint.name, checkpoint.device, self.mode)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | PreTrainedModel | None = None,
        config: EngineConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **fields: Any,
    ) -> Engine:
        """Load a model and make it ready to generate.

        Args:
            model: a local path, a hub id, a live `PreTrainedModel`, or None for the demo model.
            config: how to load and run it; `fields` set single fields of it.
            tokenizer: for a live model that brings none, or instead of the checkpoint's.

        Raises:
            ConfigError, LoadError, DeviceError, EngineError: see `hybridgen.errors`.
        """
        check_keywords(fields, EngineConfig.field_names())
        config = placed(EngineConfig.of(config, fields))
        checkpoint = Checkpoint.open(model, config, tokenizer=tokenizer)
        check_config(checkpoint, config)
        return cls.start(checkpoint, config)

    @classmethod
    def start(cls, checkpoint: Checkpoint, config: EngineConfig) -> Engine:
        """Read an opened checkpoint's weights and make it ready to generate.

        Raises:
            LoadError, DeviceError, EngineError, CacheMissError: see `hybridgen.errors`.
        """
        place = find_place(config.tensor_parallel)
        if place is not None and place.rank:
            return cls._follow(checkpoint, config, place)
        drafter = open_drafter(checkpoint, config, resolve_config(checkpoint, config))
        cache = open_cache(checkpoint, config)
        try:
            device_type = checkpoint.device.type
            wait = preload(cache, config, mode_of(checkpoint, config), device_type)
            lead = start_ranks(checkpoint, config, resolve_config(checkpoint, config), place)
            if lead is None:
                loaded = checkpoint.load()
                wait()
                return cls(checkpoint, loaded, config, cache, drafter=drafter)
            try:
                with lead.together():
                    loaded = load_share(checkpoint, lead.group)
                return cls(checkpoint, loaded, config, cache, lead=lead)
            except BaseException:
                lead.close()
                raise
        except BaseException:
            cache.close()
            raise

    @classmethod
    def _follow(cls, checkpoint: Checkpoint, config: EngineConfig, place: Place) -> Engine:
        """The engine of a rank above 0 where torchrun started all ranks: it has no loop of its own."""
        engine = cls.__new__(cls)
        engine.config, engine.checkpoint, engine.tokenizer = config, checkpoint, checkpoint.tokenizer
        resolved = check_config(checkpoint, config)
        engine.max_context, engine.mode = resolved.max_context, resolved.mode
        engine._counters, engine._no_bar, engine._num_pages, engine._spares_call = Counters(), True, 1, False
        engine._parts = engine._runner = engine._loop = engine._calls = None
        engine._together = Following(place, checkpoint, config)
        engine._undo = weakref.finalize(engine, engine._together.close)
        engine._undo.atexit = False
        return engine

    @property
    def rank(self) -> int:
        """Of its tensor-parallel group: above 0 only in a program that torchrun runs on every rank."""
        return self._together.rank if isinstance(self._together, Following) else 0

    def follow(self) -> None:
        """On a rank above 0: run what rank 0 calls, whatever that is, until it closes its engine.

        Raises:
            EngineError: this is rank 0, or the group has ended otherwise.
        """
        if not isinstance(self._together, Following):
            raise EngineError("follow() is for the ranks above 0 of a program that torchrun runs; rank 0 makes calls")
        self._together.follow()

    def idle(self) -> bool:
        """Record a graph that was missed often enough, if no request waits or runs; returns whether more are wanted.

        `generate()` and `stream()` do this once at the end of a call. A caller that takes the loop's steps alone, such
        as a server, calls it while there is nothing else to do.
        """
        loop, runner = self.open_loop(), self._runner
        return False if runner is None else loop.idle(runner.capture_pending)

    def exercise_samplers(self) -> None:
        """Run every kind of sampler once, so that the compile cache has its kernels. Not while requests run."""
        self.open_loop()
        if self._runner is not None:
            run_all_samplers(self._runner)

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

    def weights_changed(self) -> None:
        """Say that the model's weights have other values now: cached prefixes are forgotten, casts and repacked copies
        made anew, and results count it (`Completion.weights_version`). What is compiled and recorded stays. A live
        module need not be followed so: every call looks for itself.

        Raises:
            EngineError: the engine is closed, or this was called from inside a step.
        """
        self.open_loop().weights_changed()

    @property
    def adapter(self) -> str | None:
        """The path or id of the adapter that is merged into the weights; None: none is."""
        adapters = None if self._parts is None else self._parts.adapters
        return None if adapters is None else adapters.current

    def set_adapter(self, adapter: str | os.PathLike[str] | None) -> None:
        """Merge another PEFT adapter into the weights in place of the present one; None takes it out, exactly.

        Nothing is compiled or recorded again, because the weights stay where they are. Cached prefixes are forgotten,
        and `Completion.weights_version` counts it.

        Raises:
            ConfigError: it cannot be read, or does not fit the model (which then has none); or the model is a live
                module, whose owner merges adapters.
            UnsupportedModelError: it works outside of the weights, or changes a weight that is tied to another.
            EngineError: the engine is closed, or requests wait or run.
        """
        upkeep.set_adapter(self._open_parts(), adapter)

    def release_cache(self) -> None:
        """Give the KV cache's memory back to torch's allocator, for others in this process. Calls are refused until
        `resume()`. Releasing twice is fine.

        Raises:
            EngineError: the engine is closed, or requests wait or run.
            ConfigError: it has `tensor_parallel`.
        """
        upkeep.release(self._open_parts())

    def resume(self) -> None:
        """Take the KV cache's memory again, after `release_cache()`. Where it lies elsewhere than before, recordings
        are made anew; else they are kept. Without a release it does nothing.

        Raises:
            EngineError: the engine is closed.
            OutOfMemoryError: there is too little memory now; free some and call it again.
        """
        upkeep.resume(self._open_parts())

    def fall_back(self, reason: str) -> None:
        """Count something that ran another way than asked for; warned of once. For those who call in its place."""
        self._counters.fall_back(reason)

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

    def stats(self) -> EngineStats:
        """What the engine has done and holds; `print()` shows it as a table."""
        return engine_stats(self._open_parts())

    @property
    def traffic(self) -> Traffic:
        """What a decode step reads, and how fast the device can."""
        return self._meter.traffic

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.mode} on {self.checkpoint.device}"
        return f"<Engine {self.checkpoint.name}: {state}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the statistics."""
        return html_table([("engine", repr(self))]) if self.closed else self.stats()._repr_html_()

    @property
    def closed(self) -> bool:
        """Whether it can no longer generate: `close()` was called, or its device failed."""
        loop = self._loop
        return loop is None or loop.ended

    def close(self) -> None:
        """End what runs with an error, and free the cache.

        Closing twice is fine.
        """
        loop, self._loop = self._loop, None
        if loop is not None:
            try:
                if self._parts is not None and not loop.ended:
                    self._parts.keep_plan()
            finally:
                loop.close()
        self._runner = self._parts = None  # both hold models
        self._undo()
        if self.checkpoint.device.type == "cuda":
            del loop
            with CAPTURING:
                torch.cuda.empty_cache()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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


def _keep_plan(reference: weakref.ref[Engine]) -> None:
    """At the end of the process, for an engine that nobody closed: note for the next process what was recorded."""
    engine = reference()
    if engine is not None and engine._parts is not None and not engine.closed:
        engine._parts.keep_plan()
