"""Builds what an engine runs on: the runner with its cache, its compiled, fused and recorded steps, and the loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from hybridgen.cache import KVScales, allocate, pages_for_tokens, plan_pages, total_bytes
from hybridgen.compilation.layers import switched_off
from hybridgen.compilation.steps import CompiledSteps
from hybridgen.config import EQUAL_BITS_ROWS, EngineConfig, GraphOwner, Mode, ResolvedConfig, bar_disabled, parse_bytes
from hybridgen.engine.drafter import LoadedDrafter
from hybridgen.engine.loop import StepLoop
from hybridgen.engine.mixing import Mixing, always_worth, cannot_mix
from hybridgen.engine.preflight import cannot_draft_for
from hybridgen.engine.scheduling import make_pages, make_scheduler, why_not_shared
from hybridgen.engine.warm_start import Starter, Startup
from hybridgen.errors import CacheMissError, ConfigError, described
from hybridgen.execution import ModelRunner, warm_up
from hybridgen.execution.drafting import Drafter, take
from hybridgen.execution.following import begin_call, look
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import Recorder
from hybridgen.graphs.setup import GraphSetup, keys_at_start
from hybridgen.loading import Checkpoint
from hybridgen.models import BoundModel
from hybridgen.models.ends import use_own_ends, use_short_ends
from hybridgen.models.gated import make_gated_classes, use_gated_op, use_own_gate
from hybridgen.models.mixtures import make_classes as make_mixture_classes
from hybridgen.models.mixtures import use_mixture_op, use_own_mixture
from hybridgen.models.rotating import make_classes, use_one_op, use_own_rotation
from hybridgen.models.twin import Twin
from hybridgen.parallel.lead import Lead, LeadRunner
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerPlan, plan_of, resolve
from hybridgen.speculation import refusal
from hybridgen.speculation.ngram import NgramDrafter
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
    prefix_state: str
    """`on`, or why requests share no pages."""
    spares_first_call: bool
    """See `GraphSetup`."""


@dataclass(frozen=True)
class Builder:
    """Makes a loaded model ready to generate, phase by phase."""

    checkpoint: Checkpoint
    config: EngineConfig
    resolved: ResolvedConfig
    starter: Starter
    startup: Startup
    counters: Counters
    kv_scales: Mapping[str, KVScales] = field(default_factory=dict)
    """Of cached keys and values, by the names of attention modules."""
    lead: Lead | None = None
    """The group, where other processes have parts of the model."""

    def build(
        self, bound: BoundModel, undo: ExitStack, twin: Twin[Any] | None, drafter: LoadedDrafter | None = None
    ) -> Built:
        """Build everything. The model's device must be the current one.

        Args:
            twin: whose tree the bound model is, for a live module.
            undo: gets what frees the device again, so that a build that fails leaves nothing behind.
            drafter: the model that drafts; None: none does.
        """
        config, checkpoint, device = self.config, self.checkpoint, self.checkpoint.device
        self._check_runs(bound)
        starter, timed = self.starter, self.startup.timed
        plan = self.graph_plan(bound)
        with timed("artifacts"):
            compiles_layers = self.resolved.mode.compiles and not plan.compiles_steps
            rotates = compiles_layers and self._rotates_in_one_op()
            if rotates:
                make_classes(bound)
                make_gated_classes(bound)
                make_mixture_classes(bound)
            keeps_units = compiles_layers and self.lead is None and switched_off() is None
            units = starter.load_units() if keeps_units else None
            steps = starter.find_steps(config.offline_compile) if plan.compiles_steps else None
        kind = ModelRunner if self.lead is None else partial(LeadRunner, lead=self.lead)
        runner = kind(
            bound,
            vocab_size=checkpoint.vocab_size,
            max_batch=self.resolved.slots,
            max_pages=pages_for_tokens(self.resolved.max_context, config.page_size),
            token_budget=self.resolved.token_budget,
            max_context=self.resolved.max_context,
            compile_backend=config.compile_backend if compiles_layers else None,
            units=units,
            offline=config.offline_compile,
            query_len=self.resolved.query_len,
            drafter=self._drafter(bound, drafter, undo),
            one_copy=config.metadata_copy,
            buffers=2 if config.double_buffer else 1,
            fall_back=self.counters.fall_back,
            twin=twin,
        )
        undo.callback(runner.close)
        twins = [each for each in (twin, None if drafter is None else drafter.twin) if each is not None]
        if drafter is not None:
            runner.following.drafters_twin = drafter.twin
        with timed("allocate cache"):
            num_pages, cache_bytes = self._allocate_cache(bound, runner, plan, drafter)
        if rotates:
            self._use_ops(bound, runner, undo)
        meter = DecodeMeter(traffic_of(bound, runner.states, starter.read_ceiling(device)))
        fuses = fuses_decode(self.resolved.mode, device)
        if fuses and isinstance(runner, LeadRunner):
            starter.fuse_decode(runner, bound, config, self.resolved.max_context, runner.begin_fusing)
        elif fuses:
            runner.following.fuse_again = partial(starter.fuse_decode, runner, bound, config, self.resolved.max_context)
            runner.following.fuse_again()
        if drafter is not None and self.resolved.mode.compiles and device.type == "cuda" and self.lead is None:
            with torch.inference_mode():
                starter.fuse_drafter(runner, drafter.drafter, config, self.resolved.max_context)
        not_compiled = None
        if compiles_layers:
            with timed("compile"):
                not_compiled = self._compile(runner)
        if fuses and not config.equal_bits:
            sizes, recorder = plan.settings().decode, partial(self._recorder_of_all_ranks, runner, plan)
            starter.choose_decode(runner, sizes, compiled=not_compiled is None, recorder=recorder)
        if device.type == "cuda":
            with timed("tuning"):
                if self.lead is None and not (config.equal_bits or plan.compiles_steps):
                    measured, buckets = self.starter.measured(), plan.settings()
                    warm_up.choose_products(runner, sorted({*buckets.decode, *buckets.prefill}), measured)
                    self.starter.keep_measured(measured)
                warm_up.run_all_sizes(runner)
        self.use_graphs(runner, plan, not_compiled, steps)
        if twin is None:  # hooks that the model's own code put there; a twin has none while it is built
            begin_call(runner)
        if plan.spares_first_call:
            self.want_planned(runner, plan)
        elif plan.records and config.capture_at_start:
            with timed("capture"):
                self.capture(runner, plan)
        prefix_state = why_not_shared(config, self.resolved, bound, runner.states) or "on"
        reaches = [bound.reach] if drafter is None else [bound.reach, drafter.drafter.reach]
        pages = make_pages(config, self.resolved, num_pages, reaches, shares=prefix_state == "on")
        scheduler = make_scheduler(config, self.resolved, bound, runner, pages)
        if config.mixed_steps:
            why = cannot_mix(bound, whole=plan.compiles_steps, ranks=self.lead is not None, drafts=drafter is not None)
            if why is None:
                worth = runner.feeds_faster_beside if device.type == "cuda" else always_worth
                scheduler.mixing = Mixing(pages, config.max_batch, worth=worth)
            else:
                self.counters.fall_back(f"prompts are not fed beside decode: {why}")
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
            before_call=partial(
                begin_call,
                runner,
                check=None if self.lead is None else self.lead.begin,
                forget=pages.clear if twins else None,
            ),
            look=partial(look, runner) if twins and self.lead is None else None,
            drafter=None if runner.drafting is None else runner.drafting.name,
            most_checked=EQUAL_BITS_ROWS if config.equal_bits else None,
        )
        return Built(runner, loop, meter, num_pages, cache_bytes, prefix_state, plan.spares_first_call)

    def _use_ops(self, bound: BoundModel, runner: ModelRunner, undo: ExitStack) -> None:
        """Have modules run by ops of ours where these compute the same, and are no slower where that is tried."""
        metadata, fall_back = runner.steps.metadata, self.counters.fall_back
        undo.callback(use_own_rotation, bound)
        use_one_op(bound, self.resolved.max_context, fall_back)
        undo.callback(use_own_gate, bound)
        measured = self.starter.measured()
        with self.startup.timed("tuning"):
            gated = use_gated_op(bound, metadata, self.resolved.token_budget, fall_back, measured)
            self.starter.note_choice("gate and up of prefill", gated.slower)
        undo.callback(use_own_mixture, bound)
        with self.startup.timed("tuning"):
            mixtures = use_mixture_op(bound, metadata, fall_back, measured)
            self.starter.note_choice("mixtures of one token", mixtures.slower)
        self.starter.keep_measured(measured)
        undo.callback(use_own_ends, bound)
        use_short_ends(bound, metadata, self.resolved.max_context)

    def _recorder_of_all_ranks(self, runner: ModelRunner, plan: GraphSetup) -> Recorder | None:
        """Who records decode steps where all ranks have to; None where there is one process."""
        found = None if self.lead is None else self.lead.recorder(plan.recorder(runner.steps))
        return None if found is None else found(GraphKey.decode(1, None), False)

    def use_graphs(
        self,
        runner: ModelRunner,
        plan: GraphSetup,
        not_compiled: str | None,
        steps: CompiledSteps | None = None,
    ) -> None:
        """Record steps as the plan says.

        Args:
            not_compiled: why a mode that compiles does not.
            steps: those that are kept, where steps are compiled whole.
        """
        recorder = plan.recorder(runner.steps, steps)
        runner.use_graphs(
            plan.settings(),
            recorder=recorder if self.lead is None else self.lead.recorder(recorder),
            why_plain=not_compiled or f"mode {plan.mode}",
            note=", layers not compiled" if not_compiled else "",
            counters=self.counters,
            notify=self.config.on_graph_event,
            check_addresses=self.config.check_addresses,
            validates=self.config.validate and plan.records,
        )

    def graph_plan(self, bound: BoundModel) -> GraphSetup:
        """What decides about the engine's graphs."""
        return GraphSetup(
            config=self.config,
            mode=self.resolved.mode,
            device=self.checkpoint.device,
            token_budget=self.resolved.token_budget,
            max_tokens=self.resolved.max_tokens,
            query_len=self.resolved.query_len,
            no_prefill=_no_prefill(bound),
            layer_weights=_numbers(bound.layers[len(bound.layers) // 2]) if bound.layers else 0,
        )

    def capture(self, runner: ModelRunner, plan: GraphSetup) -> None:
        """Record all buckets, for greedy decoding and for the sampling that a request gets by default.

        Of steps that are compiled whole, those that the compile cache has; others are compiled behind, or here where
        nothing is recorded later.

        Raises:
            CacheMissError: `offline_compile=True`, and a compiled step is not there.
        """
        keys = self._planned(runner, plan)
        disable = bar_disabled(self.config.progress)
        if keys:  # a bar starts a thread, disabled or not
            with tqdm(total=len(keys), desc="capture", unit="graph", delay=1, disable=disable) as bar:
                runner.capture(keys, bar.update)
        if plan.compiles_steps:
            self.starter.check_steps()

    def want_planned(self, runner: ModelRunner, plan: GraphSetup) -> None:
        """Have the steps that a start would load be loaded between calls."""
        for key in self._planned(runner, plan):
            runner.graphs.want(key, self.config.capture_after)

    def _planned(self, runner: ModelRunner, plan: GraphSetup) -> list[GraphKey]:
        """What a start records."""
        checkpoint = self.checkpoint
        usual = resolve(SamplingParams(), checkpoint.generation_config, checkpoint.eos_token_ids, checkpoint.vocab_size)
        plans = {SamplerPlan(): None}
        if not plan.compiles_steps:  # each takes half a minute: one that ends at the logits serves all other samplers
            plans[plan_of(usual, checkpoint.vocab_size)] = None
        # Trees compile every kind of step, which takes seconds to minutes each.
        any_sampler = self.config.graphs is not GraphOwner.TREES
        keys = keys_at_start(
            runner.graphs.settings,
            plans,
            any_sampler=any_sampler,
            query_lens=runner.query_lens,
            quiet=runner.drafting is not None and runner.drafting.can_pause,
        )
        return self.starter.planned(runner, keys, only_kept=plan.compiles_steps)

    def _check_runs(self, bound: BoundModel) -> None:
        least = 2 * bound.shortest_run - 1  # so that neither a run nor what it leaves has to be shorter
        if self.resolved.token_budget < least:
            raise ConfigError(
                f"token_budget={self.resolved.token_budget}, and layers of this model keep a state that needs prompts "
                f"in runs of {bound.shortest_run} tokens or more; give token_budget={least} or more"
            )

    def _allocate_cache(
        self, bound: BoundModel, runner: ModelRunner, plan: GraphSetup, drafter: LoadedDrafter | None
    ) -> tuple[int, int]:
        """Size and allocate the KV cache; returns its pages and bytes. A page has room for both models."""
        config, device = self.config, self.checkpoint.device
        dtype = self.checkpoint.dtype if config.kv_dtype is None else torch.float8_e4m3fn
        own, slots = bound.layer_states(config.page_size, dtype, self.kv_scales), self.resolved.slots + 1
        states = own if drafter is None else (*own, *drafter.drafter.states)

        def allocated(pages: int) -> None:
            allocate(states, pages, slots, device)
            runner.attach(own)
            if drafter is not None:
                drafter.drafter.attach(runner.state.block_table.tensor, self.resolved.slots * self.resolved.query_len)

        allocated(1)
        measure = config.kv_memory is None
        num_pages = plan_pages(
            states,
            page_size=config.page_size,
            max_batch=config.max_batch,
            slots=slots,
            max_context=self.resolved.max_context,
            kv_memory=parse_bytes("kv_memory", config.kv_memory),
            device=device,
            activation_bytes=warm_up.measure_activations(runner, plan.largest()) if measure else 0,
        )
        allocated(num_pages)
        return num_pages, total_bytes(states, num_pages, slots)

    def _rotates_in_one_op(self) -> bool:
        """Whether attention modules are looked at for `use_one_op`. Not those of a model that is cut, whose parts would
        have to run their forwards together."""
        return self.checkpoint.device.type == "cuda" and self.lead is None

    def _cuts_last_layer(self) -> bool:
        """Whether long prefills may cut their last layer. Not where a prompt's keys have to be the same bits with and
        without somebody who drafts, for whom it is not cut; nor on several ranks, which would have to agree; nor where
        one compiled step is for all sizes (`graphs="trees"`), so that nothing in it may depend on how many tokens."""
        one_for_all = self.config.graphs is GraphOwner.TREES
        return self._rotates_in_one_op() and not self.config.equal_bits and not one_for_all

    def _drafter(self, bound: BoundModel, model: LoadedDrafter | None, undo: ExitStack) -> Drafter | None:
        """Who drafts, if anybody.

        Raises:
            ConfigError: drafts cannot be checked on this model.
            EngineError: another engine has the drafter.
        """
        wanted = self.config.speculation
        if not self.config.drafts:
            return None
        why = refusal(bound, self.resolved.max_context, self.config.page_size, self.checkpoint.dtype)
        if why is not None:
            raise cannot_draft_for(self.config, why)
        if model is not None:
            return model.drafter
        if wanted == "ngram":
            return NgramDrafter()
        own = cast(Drafter, wanted)
        undo.callback(take(own))
        return own

    def _compile(self, runner: ModelRunner) -> str | None:
        """Compile before the first request. If that fails, steps run eagerly; it is counted and warned of.

        Returns:
            Why steps run eagerly, if they do.
        """
        switch = switched_off()
        if switch is not None:
            reason = f"nothing is compiled, steps run eagerly: {switch}"
            self.counters.fall_back(reason)
            runner.disable_compilation()
            return reason
        try:
            disable = bar_disabled(self.config.progress)
            with tqdm(total=1, desc="compile", delay=1, leave=False, disable=disable) as bar:
                self.starter.compile(runner, cuts=self._cuts_last_layer())
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


def fuses_decode(mode: Mode, device: torch.device) -> bool:
    """Whether fused executors are built."""
    return mode is Mode.HYBRID and device.type == "cuda"


def _numbers(layer: nn.Module) -> int:
    """Numbers in the weights of a layer. Integers of quantised ones are taken for packed, two in a byte."""
    weights = (*layer.parameters(), *layer.buffers())
    return sum(weight.numel() if weight.is_floating_point() else 2 * weight.nbytes for weight in weights)


def _no_prefill(bound: BoundModel) -> str:
    """Why no prefill of a model is recorded; empty if nothing keeps it from that."""
    # Each prefill has other runs, and the host goes through them.
    return "layers that keep a state take prompts one by one" if bound.mixers else ""
