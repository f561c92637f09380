"""The engine: a loaded model, its cache, and calls to generate with it."""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from hybridgen.arguments import check_keywords
from hybridgen.compilation.store.session import CompileCache, mode_of, preload
from hybridgen.config import EngineConfig, bar_disabled
from hybridgen.device.capture import CAPTURING
from hybridgen.display import html_table
from hybridgen.engine import upkeep
from hybridgen.engine.assembly import Parts, assemble
from hybridgen.engine.asynchronous import AsyncCalls
from hybridgen.engine.calls import Calls
from hybridgen.engine.drafter import Opened, open_drafter
from hybridgen.engine.launched import Following, Sharing
from hybridgen.engine.loop import StepLoop
from hybridgen.engine.preflight import check_config, open_cache, resolve_config
from hybridgen.engine.report import engine_stats
from hybridgen.errors import EngineError
from hybridgen.execution import ModelRunner
from hybridgen.execution.warm_up import run_all_samplers
from hybridgen.loading import Checkpoint, LoadedModel
from hybridgen.parallel.launched import LaunchedRanks, Place, find_place, placed
from hybridgen.parallel.lead import Lead
from hybridgen.parallel.start import start as start_ranks
from hybridgen.parallel.weights import load_share
from hybridgen.telemetry.statistics import Counters, EngineStats
from hybridgen.telemetry.traffic import Traffic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Engine(Calls):
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

    def follow(self) -> None:
        """On a rank above 0: run what rank 0 calls, whatever that is, until it closes its engine.

        Raises:
            EngineError: this is rank 0, or the group has ended otherwise.
        """
        if not isinstance(self._together, Following):
            raise EngineError("follow() is for the ranks above 0 of a program that torchrun runs; rank 0 makes calls")
        self._together.follow()

    def exercise_samplers(self) -> None:
        """Run every kind of sampler once, so that the compile cache has its kernels. Not while requests run."""
        self.open_loop()
        if self._runner is not None:
            run_all_samplers(self._runner)

    def weights_changed(self) -> None:
        """Say that the model's weights have other values now: cached prefixes are forgotten, casts and repacked copies
        made anew, and results count it (`Completion.weights_version`). What is compiled and recorded stays. A live
        module does not need this: every call looks at it.

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
        """Count something that ran another way than asked for, and warn of it once. For code that runs requests in the
        engine's place, such as a server."""
        self._counters.fall_back(reason)

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


def _keep_plan(reference: weakref.ref[Engine]) -> None:
    """At the end of the process, for an engine that nobody closed: note for the next process what was recorded."""
    engine = reference()
    if engine is not None and engine._parts is not None and not engine.closed:
        engine._parts.keep_plan()
