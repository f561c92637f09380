"""Find where a model attends, and put our cache there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hybridgen.cache import KeyValueState, LayerShape, PagedKV, SharedKV
from hybridgen.errors import EngineError, UnsupportedModelError
from hybridgen.kernels.attention.ops import make_schedule
from hybridgen.models.attention import ATTENTION_NAME, SITES_NAME, LayerBinding, Phase, StepMetadata
from hybridgen.models.interface import AttentionNames, check_functions
from hybridgen.models.probe import AttentionOptions, check_distinct, probe_model, read_options
from hybridgen.models.rope import PerTokenRope, replace_length_dependent_rope, restore_rope
from hybridgen.models.visibility import Visibility
from hybridgen.models.weights import ModuleWeights, WeightProvider

_CONTEXT = 4096
"""Positions up to which masks are read where neither the caller nor the config says how many."""


class AttentionSite(NamedTuple):
    """One attention module as the probe saw it."""

    module: nn.Module
    layer: nn.Module
    """The decoder layer around it: what is compiled."""
    query_heads: int
    shape: LayerShape
    sees: Visibility
    """The positions that it attends to."""
    options: AttentionOptions
    """What the module hands to attention besides tensors."""
    producer: int | None = None
    """The earlier site whose keys and values it is given; None where it has its own."""


@dataclass(eq=False)
class BoundModel:
    """A model whose attention runs on a paged cache, until `release()`."""

    model: PreTrainedModel
    sites: tuple[AttentionSite, ...]
    logits_dtype: torch.dtype
    """Of what `forward()` returns; some models compute their logits in float32 whatever their weights are."""
    weights: WeightProvider
    """Gives the weights of the model's projections by their modules' names."""
    _attention: AttentionNames
    _ropes: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    _schedules: tuple[tuple[LayerBinding, int], ...] = ()
    """Of the layers that share an attention schedule the first, and its query heads."""

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The decoder layers, in order."""
        return tuple(site.layer for site in self.sites)

    def layer_states(self, page_size: int, dtype: torch.dtype) -> tuple[KeyValueState, ...]:
        """What each layer keeps between steps, as the probe saw it; not allocated yet."""
        states: list[KeyValueState] = []
        for site in self.sites:
            if site.producer is None:
                states.append(PagedKV(site.shape, page_size, dtype))
            else:
                states.append(SharedKV(states[site.producer]))
        return tuple(states)

    @property
    def reach(self) -> int | None:
        """Positions that a query sees at most in any layer; None where a layer sees all of them."""
        reaches = [site.sees.reach for site in self.sites]
        return max(reaches) if all(reaches) else None

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

    def attach(self, states: Sequence[KeyValueState], step: StepMetadata, rows: int) -> None:
        """Give every attention module its layer's state, which is allocated, and the step's metadata.

        Args:
            rows: tokens of a decode step at most.
        """
        first: dict[tuple[int, LayerShape, Visibility], LayerBinding] = {}
        for site, state in zip(self.sites, states, strict=True):
            kind = site.query_heads, site.shape, site.sees
            if kind in first:
                schedule = first[kind].schedule
            else:
                limits = site.sees.window, site.sees.chunk
                schedule = make_schedule(*state.pages, step.block_table, site.query_heads, rows, *limits)
            binding = LayerBinding(*state.pages, step, site.sees, schedule, site.producer is not None)
            first.setdefault(kind, binding)
            site.module._hybridgen = binding  # type: ignore[assignment]
        self._schedules = tuple((binding, query_heads) for (query_heads, _, _), binding in first.items())
        for _, _, rope in self._replaced():
            rope.step = step

    def forward(self, input_ids: torch.Tensor, step: StepMetadata, keep: torch.Tensor | None) -> torch.Tensor:
        """Logits of a step.

        Args:
            input_ids: int64 [T], packed.
            keep: int64 [K], the tokens whose logits are wanted; None for all.

        Returns:
            [K, vocab_size] in `logits_dtype`.
        """
        if step.phase is Phase.DECODE:
            for binding, query_heads in self._schedules:
                binding.write_schedule(query_heads)
        output = self.model(
            input_ids=input_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            # An int above 0 is not the same thing in every model; a tensor and 0 are.
            logits_to_keep=0 if keep is None else keep,
        )
        return output.logits[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What steps leave for their own layers alone, by name: the attention schedules."""
        return {f"attention schedule {i}": binding.schedule for i, (binding, _) in enumerate(self._schedules)}

    @contextmanager
    def original_attention(self) -> Iterator[None]:
        """Inside, the model attends as it did before `bind()`, without a cache."""
        self._attention.restore()
        try:
            yield
        finally:
            self._attention.set(ATTENTION_NAME)

    def release(self) -> None:
        """Put everything back as it was before `bind()`."""
        for site in self.sites:
            vars(site.module).pop("_hybridgen", None)
        self._schedules = ()
        restore_rope(self._ropes)
        self._ropes.clear()
        self._attention.restore()
        vars(self.model).pop("_hybridgen_bound", None)


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


def bind(model: PreTrainedModel, context: int | None = None) -> BoundModel:
    """Route the model's attention to hybridgen.

    Args:
        context: the longest sequence that will be run, up to which the masks are read; None for what the config says.

    Raises:
        EngineError: another engine has the model.
        UnsupportedModelError: it does not attend once per layer through Hugging Face's attention interface, or its
            attention is not causal, windowed or chunked, or not transformers' own.
    """
    check_free(model)
    attention = AttentionNames(model)
    sites, logits_dtype = _find_sites(model, attention, context or _context_of(model))
    bound = BoundModel(model, sites, logits_dtype, ModuleWeights(model), attention)
    try:
        attention.set(ATTENTION_NAME)
        model._hybridgen_bound = True  # type: ignore[assignment]
        replace_length_dependent_rope(model, bound._ropes)
    except BaseException:
        bound.release()
        raise
    return bound


def _context_of(model: PreTrainedModel) -> int:
    value = getattr(model.config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else _CONTEXT


class _Seen(NamedTuple):
    module: nn.Module
    query_heads: int
    shape: LayerShape
    options: AttentionOptions
    producer: int | None


def _find_sites(
    model: PreTrainedModel, attention: AttentionNames, context: int
) -> tuple[tuple[AttentionSite, ...], torch.dtype]:
    """The model's attention calls, and the dtype of its logits.

    What they see comes from a probe of a copy without weights (`models.probe`). Two tokens through the model itself
    then show that it makes the same calls: with its hooks, its replaced `forward`s and its devices.
    """
    kind = type(model).__name__
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{kind} does not attend through Hugging Face's attention interface, so hybridgen cannot put its paged "
            "cache under it"
        )
    calls = probe_model(model, context)
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    seen, logits_dtype = _run_two_tokens(model, attention, names)
    check_distinct(kind, [names[site.module] for site in seen])
    layers = _decoder_layers(model, [site.module for site in seen])
    if [names[site.module] for site in seen] != [call.name for call in calls]:
        raise UnsupportedModelError(
            f"{kind} attends in other modules than its classes do ({len(seen)} and {len(calls)} calls): a hook or a "
            "replaced forward changes them; remove it"
        )
    check_functions(site.module for site in seen)
    sites = tuple(
        AttentionSite(site.module, layer, site.query_heads, site.shape, call.sees, site.options, site.producer)
        for site, layer, call in zip(seen, layers, calls, strict=True)
    )
    return sites, logits_dtype


def _run_two_tokens(
    model: PreTrainedModel, attention: AttentionNames, names: dict[nn.Module, str]
) -> tuple[list[_Seen], torch.dtype]:
    """Note every attention call of a forward pass, and the dtype of the logits."""
    seen: list[_Seen] = []
    stored: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, kwargs: dict
    ) -> None:
        if mask is not None:
            raise UnsupportedModelError(f"{names[module]} is given a mask by a replaced forward or a hook; remove it")
        options = read_options(names[module], query, key, kwargs)
        shape = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        # A layer that shares is handed the very tensors that an earlier one attended to.
        same = (i for i, (k, v) in enumerate(stored) if k is key and v is value)
        seen.append(_Seen(module, query.shape[1], shape, options, next(same, None)))
        stored.append((key, value))

    modules = list(model.modules())
    attention.set(SITES_NAME)
    for module in modules:
        vars(module)["_hybridgen_note"] = note
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            output = model(input_ids=ids, position_ids=torch.arange(2, device=model.device)[None], use_cache=False)
    finally:
        for module in modules:
            vars(module).pop("_hybridgen_note", None)
        attention.restore()
    return seen, output.logits.dtype


def _decoder_layers(model: PreTrainedModel, attentions: list[nn.Module]) -> list[nn.Module]:
    """The element of the model's layer list around each attention module."""
    for candidate in model.modules():
        if isinstance(candidate, nn.ModuleList) and len(candidate) == len(attentions) > 0:
            members = [set(layer.modules()) for layer in candidate]
            if all(attention in inside for attention, inside in zip(attentions, members, strict=True)):
                return list(candidate)
    raise UnsupportedModelError(
        f"{type(model).__name__} made {len(attentions)} attention calls that do not pair up with a list of decoder "
        "layers; hybridgen runs models with one attention per layer"
    )
