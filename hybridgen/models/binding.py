"""A model whose attention runs on our cache: `bind()` puts it where `models.sites` found that it attends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hybridgen.cache import (
    KeyValueState,
    KVScales,
    LayerPages,
    LayerShape,
    LayerState,
    PagedKV,
    PagedState,
    SharedKV,
    SlotState,
)
from hybridgen.cache.paged_latent import PagedLatent
from hybridgen.errors import CheckpointError, EngineError, UnsupportedModelError
from hybridgen.kernels.attention.ops import make_schedule
from hybridgen.models.attention import ATTENTION_NAME, KVFactors, LayerBinding, Phase, RunEnds, StepMetadata
from hybridgen.models.counting import counts_tokens, use_own_numbers, use_positions
from hybridgen.models.experts import ExpertsBinding, ExpertsSite, find_experts, use_op, use_own_code
from hybridgen.models.few_rows import RowsBinding, RowsSite, find_rows, use_own_product, use_rows_of
from hybridgen.models.interface import AttentionNames
from hybridgen.models.latent import LatentBinding, check_unwatched, use_expansion, use_latents
from hybridgen.models.layer_inputs import LayerInputs
from hybridgen.models.mixers import MixerBinding, MixerSite, use_own_cache, use_slots
from hybridgen.models.probe import ProbedCall, kind_of
from hybridgen.models.rope import PerTokenRope, replace_length_dependent_rope, restore_rope
from hybridgen.models.routers import RouterBinding, RouterSite, find_routers, use_own_choice, use_route
from hybridgen.models.sites import AttentionSite, check_class_forward, find_sites
from hybridgen.models.visibility import Visibility
from hybridgen.models.weights import ModuleWeights, WeightProvider

_CONTEXT = 4096
"""Positions up to which masks are read where neither the caller nor the config says how many."""


@dataclass(eq=False)
class BoundModel:
    """A model whose attention runs on a paged cache, until `release()`."""

    model: PreTrainedModel
    sites: tuple[AttentionSite, ...]
    logits_dtype: torch.dtype
    """Of what `forward()` returns; some models compute their logits in float32 whatever their weights are."""
    weights: WeightProvider
    """Gives the weights of the model's projections by their modules' names."""
    layers: tuple[nn.Module, ...]
    """The decoder layers, in order."""
    mixers: tuple[MixerSite, ...]
    """What keeps a state of one size for each request: convolutions and recurrences."""
    _attention: AttentionNames
    _slots: SlotState | None = None
    _ropes: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    _schedules: tuple[tuple[LayerBinding, int], ...] = ()
    """Of the layers that share an attention schedule the first, and its query heads."""
    latents: tuple[nn.Module, ...] = field(init=False)
    """The attention modules that cache latents."""
    counting: tuple[nn.Module, ...] = field(init=False)
    """The attention modules that number a call's tokens."""
    _noted: LayerInputs | None = None
    """What goes into some layers; None: nobody reads it."""
    experts: tuple[ExpertsSite, ...] = ()
    """The modules of experts that decode by the op of `kernels.linear.experts`."""
    routers: tuple[RouterSite, ...] = ()
    """The routers that choose by the op of `kernels.linear.route` in decode."""
    around: tuple[nn.Module, ...] = field(init=False)
    """The modules outside of the decoder layers."""
    rows: tuple[RowsSite, ...] = ()
    """The projections that multiply by the op of `kernels.step.linear` in decode."""
    tables: dict[str, torch.Tensor] = field(default_factory=dict)
    """What steps read beside the model's parameters and buffers, by name: it must not move."""
    vocab_size: int = 0
    """Ids that the model takes. A head may have rows of the first of them alone (Apertus 1.5)."""

    def __post_init__(self) -> None:
        self.latents = tuple(site.module for site in self.sites if site.latent is not None)
        self.counting = tuple(site.module for site in self.sites if counts_tokens(site.module))
        inside = {module for layer in self.layers for module in layer.modules()}
        self.around = tuple(module for module in self.model.modules() if module not in inside)

    def layer_states(
        self, page_size: int, dtype: torch.dtype, scales: Mapping[str, KVScales] | None = None
    ) -> tuple[LayerState, ...]:
        """What the layers keep between steps, as the probe saw it; not allocated yet.

        Pages of each layer that attends come first (`PagedState`), then one `SlotState` of all layers that
        have a state by slot, if any.

        Args:
            dtype: of pages.
            scales: of keys and values in pages of 8 bits, by the names of attention modules.

        Raises:
            CheckpointError: scales are for another number of heads.
        """
        pages: list[PagedState] = []
        names = {module: name for name, module in self.model.named_modules()} if scales else {}
        for site in self.sites:
            if site.latent is not None:
                pages.append(PagedLatent(site.latent, page_size, dtype))
            elif site.producer is None:
                name = names.get(site.module, "")
                found = (scales or {}).get(name)
                if found is not None:
                    _check_scales(name, found, site.shape.num_kv_heads)
                pages.append(PagedKV(site.shape, page_size, dtype, found))
            else:
                pages.append(SharedKV(cast(KeyValueState, pages[site.producer])))
        return (*pages, SlotState([mixer.shapes for mixer in self.mixers])) if self.mixers else tuple(pages)

    @property
    def reach(self) -> int | None:
        """Positions that a query sees at most in any layer; None where a layer sees all of them."""
        reaches = [site.sees.reach for site in self.sites]
        return max(reaches) if reaches and all(reaches) else None

    @property
    def shortest_run(self) -> int:
        """Tokens at least of a prompt's runs behind its first.

        A mixer computes a token that comes alone as it does in decode. Mamba 2 limits its time step in runs only
        (`time_step_limit`, `time_step_min`), so that a prompt's last token would get another state than in one run.
        """
        return 2 if any(mixer.continues and mixer.shapes.recurrent for mixer in self.mixers) else 1

    @property
    def continues_runs(self) -> bool:
        """Whether every layer takes a later run of a prompt at once; some take it token by token (`models.mixers`)."""
        return all(mixer.continues for mixer in self.mixers)

    @property
    def reprefill_length(self) -> int | None:
        """The length at which a request must be prefilled again, because its rotary table changes (longrope)."""
        lengths = {rope.switch_length for _, _, rope in self._replaced() if rope.switch_length is not None}
        return min(lengths) if lengths else None

    @property
    def fixed_keys_context(self) -> int | None:
        """Up to this length of a request, a key depends on its tokens and its position alone; None: always.

        Beyond it, `dynamic` and `longrope` rotary tables go by the whole request's length.
        """
        return min((rope.limit for _, _, rope in self._replaced()), default=None)

    def _replaced(self) -> list[tuple[nn.Module, str, PerTokenRope]]:
        return [(parent, name, getattr(parent, name)) for parent, name, _ in self._ropes]

    def attach(self, states: Sequence[LayerState], step: StepMetadata, rows: int) -> None:
        """Give every attention module and mixer its layer's state, which is allocated, and the step's metadata.

        Args:
            states: what `layer_states()` gave.
            rows: tokens of a decode step at most.
        """
        first: dict[tuple[int, LayerShape, Visibility], LayerBinding] = {}
        for site, state in zip(self.sites, paged(states), strict=True):
            if isinstance(state, PagedLatent):
                site.module._hybridgen = LatentBinding(state.latents, step)  # type: ignore[assignment]
                continue
            pages = cast(KeyValueState, state).pages
            kind = site.query_heads, site.shape, site.sees
            if kind in first:
                schedule = first[kind].schedule
            else:
                limits = site.sees.window, site.sees.chunk
                schedule = make_schedule(*pages, step.block_table, site.query_heads, rows, *limits)
            factors = _factors(cast(KeyValueState, state).scales, site, pages.keys.device)
            binding = LayerBinding(*pages, step, site.sees, schedule, site.producer is not None, factors)
            first.setdefault(kind, binding)
            site.module._hybridgen = binding  # type: ignore[assignment]
        self._schedules = tuple((binding, query_heads) for (query_heads, _, _), binding in first.items())
        self._slots = next((state for state in states if isinstance(state, SlotState)), None)
        for mixer, tensors in zip(self.mixers, self._slots.mixers if self._slots else (), strict=True):
            mixer.module._hybridgen = MixerBinding(tensors, step, mixer.continues)  # type: ignore[assignment]
        for expert in self.experts:
            expert.module._hybridgen = ExpertsBinding(expert.form, step)  # type: ignore[assignment]
        for router in self.routers:
            router.module._hybridgen = RouterBinding(router.form, router.chosen, step)  # type: ignore[assignment]
        for projection in self.rows:
            projection.module._hybridgen = RowsBinding(step)  # type: ignore[assignment]
        for _, _, rope in self._replaced():
            rope.step = step

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the layers.

        Raises:
            UnsupportedModelError: the decoder has none that is called `norm`.
        """
        found = getattr(self.model.get_decoder(), "norm", None)
        if not isinstance(found, nn.Module):
            raise UnsupportedModelError(f"the decoder of a {kind_of(self.model)} has no final norm that is called norm")
        return found

    def note_inputs(self, layers: Sequence[int]) -> None:
        """From now on keep what goes into these layers, until `take_inputs()`; behind the last: into the final norm."""
        count = len(self.layers)
        modules = [self.layers[layer] if layer < count else self.final_norm for layer in layers]
        self._noted = LayerInputs(modules) if layers else None

    def take_inputs(self) -> tuple[torch.Tensor | None, ...]:
        """What went into these layers in the last `forward()`, [T, hidden] each; None: a layer was not called."""
        return () if self._noted is None else self._noted.take()

    def forward(self, input_ids: torch.Tensor, step: StepMetadata, keep: torch.Tensor | None) -> torch.Tensor:
        """Logits of a step.

        Args:
            input_ids: int64 [T], packed.
            keep: int64 [K], the tokens whose logits are wanted; None for all that the last layer gives (`step.ends`).

        Returns:
            [K, vocab_size] in `logits_dtype`; -inf for ids that the model takes and its head cannot give.
        """
        if self.latents and not torch.compiler.is_compiling():
            check_unwatched(self.latents)
        if step.phase is Phase.DECODE:
            for binding, query_heads in self._schedules:
                binding.write_schedule(query_heads)
        elif step.ends is not None:
            self._schedule_last(step, step.ends)
        if self._slots is not None:
            slots = step.slots if step.phase is Phase.DECODE or step.fed is None else step.fed
            step.state_places = self._slots.places(slots)
        with nullcontext() if self._noted is None else self._noted.listening():
            output = self.model(
                input_ids=input_ids[None],
                position_ids=step.positions[None],
                use_cache=False,
                # An int above 0 is not the same thing in every model; a tensor and 0 are.
                logits_to_keep=0 if keep is None else keep,
            )
        logits = output.logits[0]
        lacking = self.vocab_size - logits.shape[-1]
        return nn.functional.pad(logits, (0, lacking), value=-torch.inf) if lacking > 0 else logits

    @property
    def can_end(self) -> bool:
        """Whether the last layer can go on with some of a prefill's tokens, as if they were decoded: it keeps keys and
        values, by one module that attends, and nothing else."""
        if self.mixers or not self.sites or self.length_dependent:
            return False
        inside = set(self.layers[-1].modules())
        attending = [site.module for site in self.sites if site.module in inside]
        binding = vars(self.sites[-1].module).get("_hybridgen")
        if not isinstance(binding, LayerBinding) or binding.reads_only:
            return False
        return attending == [self.sites[-1].module]

    def _schedule_last(self, step: StepMetadata, ends: RunEnds) -> None:
        """Schedule what the last layer attends to in a prefill with ends."""
        last = cast(LayerBinding, self.sites[-1].module._hybridgen)
        with step.at(ends):
            for binding, query_heads in self._schedules:
                if binding.schedule is last.schedule:
                    binding.write_schedule(query_heads)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What steps leave for their own layers alone, by name: the attention schedules. And what they only read."""
        schedules = {f"attention schedule {i}": binding.schedule for i, (binding, _) in enumerate(self._schedules)}
        return schedules | self.tables

    @property
    def length_dependent(self) -> bool:
        """Whether rotary tables depend on the lengths of requests."""
        return bool(self._ropes)

    @contextmanager
    def attending_by(self, name: str) -> Iterator[None]:
        """Inside, the model's modules look up their attention function by another name."""
        self._attention.set(name)
        try:
            yield
        finally:
            self._attention.set(ATTENTION_NAME)

    @contextmanager
    def original_attention(self) -> Iterator[None]:
        """Inside, the model attends as it did before `bind()`, without a cache."""
        self._attention.restore()
        self._use_own()
        try:
            yield
        finally:
            self._use_states()
            self._attention.set(ATTENTION_NAME)

    def use_experts(self, serves: Callable[[ExpertsSite], bool]) -> None:
        """From now on, experts whose code computes what our op does decode by that. Call it before `attach()`.

        Args:
            serves: asked of each module that it is right to use the op for on its device.
        """
        self.experts = tuple(site for site in find_experts(self.model) if serves(site))
        self._use_states()

    def use_routers(self, serves: Callable[[RouterSite], bool]) -> None:
        """From now on, routers whose code computes what our op does choose by that in decode. Call it before
        `attach()`.

        Args:
            serves: asked of each module that it is right to use the op for on its device.
        """
        self.routers = tuple(site for site in find_routers(self.model) if serves(site))
        self._use_states()

    def use_few_rows(self, allowed: Callable[[torch.Tensor, torch.Tensor | None], bool]) -> None:
        """From now on, projections multiply a few rows by our op in decode. Call it before `attach()`.

        Args:
            allowed: asked of each weight and bias that it may be used for.
        """
        self.rows = tuple(find_rows(self.model, allowed))
        self._use_states()

    def _use_states(self) -> None:
        """Mixers, modules with latents, experts and routers go by their bindings."""
        for mixer in self.mixers:
            use_slots(mixer.module, mixer.alike)
        for module in self.latents:
            use_latents(module)
        for module in self.counting:
            use_positions(module)
        for site in self.experts:
            use_op(site)
        for router in self.routers:
            use_route(router)
        for projection in self.rows:
            use_rows_of(projection)

    def check_forwards(self) -> None:
        """Raise unless modules that run with the engine's states or positions have the forward of their class still.

        Raises:
            UnsupportedModelError: the owner of a live module replaced one.
        """
        modules = [*(mixer.module for mixer in self.mixers), *self.counting]
        if any("forward" in vars(module) for module in modules):
            check_class_forward({module: name for name, module in self.model.named_modules()}, modules)

    def _use_own(self) -> None:
        for mixer in self.mixers:
            use_own_cache(mixer.module)
        for module in self.latents:
            use_expansion(module)
        for module in self.counting:
            use_own_numbers(module)
        for site in self.experts:
            use_own_code(site)
        for router in self.routers:
            use_own_choice(router)
        for projection in self.rows:
            use_own_product(projection)

    def release(self) -> None:
        """Put everything back as it was before `bind()`."""
        modules = [site.module for site in self.sites] + [mixer.module for mixer in self.mixers]
        modules += [site.module for site in self.experts] + [site.module for site in self.routers]
        modules += [site.module for site in self.rows]
        for module in modules:
            vars(module).pop("_hybridgen", None)
        self._use_own()
        self._slots = None
        self._schedules = ()
        restore_rope(self._ropes)
        self._ropes.clear()
        self._attention.restore()
        vars(self.model).pop("_hybridgen_bound", None)


def _check_scales(name: str, scales: KVScales, heads: int) -> None:
    for each in scales:
        if each.numel() not in (1, heads):
            raise CheckpointError(
                f"{name} has {each.numel()} scales of keys or values in its checkpoint, and {heads} key/value heads; "
                "give a checkpoint with one for a layer or one for a head, or leave kv_dtype out"
            )


def _factors(scales: KVScales | None, site: AttentionSite, device: torch.device) -> KVFactors | None:
    """What a layer multiplies by; None where all scales are 1."""
    if scales is None or all(bool((each == 1).all()) for each in scales):
        return None
    heads = site.shape.num_kv_heads
    keys, values = (each.to(device, torch.float32).flatten().expand(heads) for each in scales)
    group = site.query_heads // heads

    def of_queries(each: torch.Tensor) -> torch.Tensor:
        return each.repeat_interleave(group)[:, None]

    return KVFactors(of_queries(keys), 1 / keys[:, None], 1 / values[:, None], of_queries(values))


def paged(states: Sequence[LayerState]) -> tuple[PagedState, ...]:
    """Of what `layer_states()` gave, the states that attention reads, one for each site."""
    return tuple(cast(PagedState, state) for state in states if not isinstance(state, SlotState))


def key_value_pages(states: Sequence[LayerState]) -> tuple[LayerPages, ...]:
    """Of what `layer_states()` gave, the pages of keys and values."""
    kinds = (PagedLatent, SlotState)
    return tuple(cast(KeyValueState, state).pages for state in states if not isinstance(state, kinds))


def check_free(model: PreTrainedModel) -> None:
    """Raise if another engine has the model.

    Raises:
        EngineError: it does.
    """
    if "_hybridgen_bound" in vars(model):
        raise EngineError(
            f"this {type(model).__name__} is in use by another engine; close that one first (`engine.close()` or "
            "`hybridgen.unload()`)"
        )


def bind(model: PreTrainedModel, context: int | None = None, calls: tuple[ProbedCall, ...] | None = None) -> BoundModel:
    """Route the model's attention to hybridgen.

    Args:
        context: the longest sequence that will be run, up to which the masks are read; None for what the config says.
        calls: what a probe of the same class and config found, if there was one.

    Raises:
        EngineError: another engine has the model.
        UnsupportedModelError: it does not attend once per layer through Hugging Face's attention interface, or its
            attention is not causal, windowed or chunked, or not transformers' own.
    """
    check_free(model)
    attention = AttentionNames(model)
    sites, mixers, layers, logits_dtype = find_sites(model, attention, context or _context_of(model), calls)
    bound = BoundModel(model, sites, logits_dtype, ModuleWeights(model), layers, mixers, attention)
    bound.vocab_size = getattr(model.config, "vocab_size", 0)
    try:
        attention.set(ATTENTION_NAME)
        bound._use_states()
        model._hybridgen_bound = True  # type: ignore[assignment]
        replace_length_dependent_rope(model, bound._ropes)
    except BaseException:
        bound.release()
        raise
    return bound


def _context_of(model: PreTrainedModel) -> int:
    value = getattr(model.config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else _CONTEXT
