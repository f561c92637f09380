"""Builds what an engine runs on: the runner with its cache, its compiled, fused and recorded steps, and the loop."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from tqdm.auto import tqdm

from hybridgen.cache import CacheShape, PageAllocator, allocate_pages, pages_for_tokens, plan_pages
from hybridgen.config import EngineConfig, GraphOwner, Mode, ResolvedConfig, bar_disabled, parse_bytes
from hybridgen.engine.loop import StepLoop
from hybridgen.engine.scheduler import Scheduler
from hybridgen.engine.warm_start import Starter, Startup
from hybridgen.errors import CacheMissError, described
from hybridgen.execution import ModelRunner
from hybridgen.graphs.setup import GraphPlan, keys_at_start, use_graphs
from hybridgen.loading import Checkpoint
from hybridgen.models import BoundModel
from hybridgen.models.projections import has_hooks
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerPlan, plan_of, resolve
from hybridgen.telemetry.statistics import Counters
from hybridgen.telemetry.traffic import DecodeMeter, traffic_of

logger = logging.getLogger(__name__)


class Built(NamedTuple):
    """What an engine runs on."""

    runner: ModelRunner
    loop: StepLoop
    meter: DecodeMeter
    num_pages: int
    """Pages of the KV cache, the dummy page included."""
    cache_bytes: int


@dataclass(frozen=True)
class Builder:
    """Makes a loaded model ready to generate, phase by phase."""

    checkpoint: Checkpoint
    config: EngineConfig
    resolved: ResolvedConfig
    starter: Starter
    startup: Startup
    counters: Counters

    def build(self, bound: BoundModel, undo: ExitStack) -> Built:
        """Build everything. The model's device must be the current one.

        Args:
            undo: gets what frees the device again, so that a build that fails leaves nothing behind.
        """
        config, checkpoint, device = self.config, self.checkpoint, self.checkpoint.device
        starter, timed = self.starter, self.startup.timed
        plan = self.graph_plan(bound)
        with timed("artifacts"):
            units = starter.load_units() if self.resolved.mode.compiles else None
        runner = ModelRunner(
            bound,
            vocab_size=checkpoint.vocab_size,
            max_batch=config.max_batch,
            max_pages=pages_for_tokens(self.resolved.max_context, config.page_size),
            token_budget=self.resolved.token_budget,
            max_context=self.resolved.max_context,
            compile_backend=config.compile_backend if self.resolved.mode.compiles else None,
            units=units,
            offline=config.offline_compile,
            one_copy=config.metadata_copy,
            buffers=2 if config.double_buffer else 1,
            fall_back=self.counters.fall_back,
        )
        undo.callback(runner.close)
        with timed("allocate cache"):
            num_pages, cache_bytes = self._allocate_cache(bound, runner, plan)
        meter = DecodeMeter(traffic_of(bound, starter.read_ceiling(device)))
        fuses = self.resolved.mode is Mode.HYBRID and device.type == "cuda"
        if fuses:
            starter.fuse_decode(runner, bound, config, self.resolved.max_context)
        not_compiled = None
        if self.resolved.mode.compiles:
            with timed("compile"):
                not_compiled = self._compile(runner)
        if fuses:
            starter.choose_decode(runner, plan.settings().decode, compiled=not_compiled is None)
        if device.type == "cuda":
            with timed("tuning"):
                runner.exercise()
        use_graphs(runner, plan, not_compiled, self.counters)
        if plan.not_recorded is not None:
            self.counters.fall_back(plan.not_recorded)
        if plan.records and config.capture_at_start:
            with timed("capture"):
                self.capture(runner)
        scheduler = Scheduler(
            pages=PageAllocator(num_pages),
            page_size=config.page_size,
            max_batch=config.max_batch,
            token_budget=self.resolved.token_budget,
            reprefill_length=bound.reprefill_length,
        )
        run_ahead = int(device.type == "cuda") if config.run_ahead is None else config.run_ahead
        loop = StepLoop(
            runner,
            scheduler,
            self.counters,
            tokenizer=checkpoint.tokenizer,
            run_ahead=run_ahead,
            # Without graphs, a launch runs the model's Python code, which takes long.
            reads_first_tokens_first=not plan.settings().decode,
            meter=meter,
        )
        return Built(runner, loop, meter, num_pages, cache_bytes)

    def graph_plan(self, bound: BoundModel) -> GraphPlan:
        """The settings of the engine's graphs."""
        return GraphPlan(
            config=self.config,
            mode=self.resolved.mode,
            device=self.checkpoint.device,
            token_budget=self.resolved.token_budget,
            max_tokens=self.resolved.max_tokens,
            not_recorded=self._not_recorded(bound),
        )

    def _not_recorded(self, bound: BoundModel) -> str | None:
        """Why steps are not recorded in a mode that records them: a replay would not call the hooks of a module."""
        hooked = next((module for module in bound.model.modules() if has_hooks(module)), None)
        if hooked is None or not self.resolved.mode.records:
            return None
        return f"a {type(hooked).__name__} has hooks, which a replay does not call; steps are not recorded"

    def capture(self, runner: ModelRunner) -> None:
        """Record all buckets, for greedy decoding and for the sampling that a request gets by default."""
        checkpoint = self.checkpoint
        usual = resolve(SamplingParams(), checkpoint.generation_config, checkpoint.eos_token_ids, checkpoint.vocab_size)
        plans = dict.fromkeys((SamplerPlan(), plan_of(usual, checkpoint.vocab_size)))
        # Trees compile every kind of step, which takes seconds to minutes each.
        any_sampler = self.config.graphs is not GraphOwner.TREES
        keys = keys_at_start(runner.graphs.settings, plans, any_sampler=any_sampler)
        keys = self.starter.planned(runner, keys)
        disable = bar_disabled(self.config.progress)
        with tqdm(total=len(keys), desc="capture", unit="graph", delay=1, disable=disable) as bar:
            runner.capture(keys, bar.update)

    def _allocate_cache(self, bound: BoundModel, runner: ModelRunner, plan: GraphPlan) -> tuple[int, int]:
        """Size and allocate the KV cache; returns its pages and bytes."""
        config, device = self.config, self.checkpoint.device
        shape = CacheShape(bound.layer_shapes, config.page_size, self.checkpoint.dtype)
        runner.attach(allocate_pages(shape, 1, device))
        measure = config.kv_memory is None
        num_pages = plan_pages(
            shape,
            max_batch=config.max_batch,
            max_context=self.resolved.max_context,
            kv_memory=parse_bytes("kv_memory", config.kv_memory),
            device=device,
            activation_bytes=runner.measure_activations(plan.largest()) if measure else 0,
        )
        runner.attach(allocate_pages(shape, num_pages, device))
        return num_pages, num_pages * shape.page_bytes

    def _compile(self, runner: ModelRunner) -> str | None:
        """Compile before the first request. If that fails, steps run eagerly; it is counted and warned of.

        Returns:
            Why steps run eagerly, if they do.
        """
        try:
            disable = bar_disabled(self.config.progress)
            with tqdm(total=1, desc="compile", delay=1, leave=False, disable=disable) as bar:
                self.starter.compile(runner)
                bar.update()
        except CacheMissError:
            raise
        except Exception as error:
            logger.debug("compilation failed", exc_info=True)
            reason = f"compilation failed, steps run eagerly: {described(error)}"
            self.counters.fall_back(reason)
            runner.disable_compilation()
            return reason
        return None
