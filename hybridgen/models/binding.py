"""Find where a model attends, and put our cache there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hybridgen.cache import KeyValueState, LayerShape, PagedKV
from hybridgen.errors import EngineError, UnsupportedModelError
from hybridgen.models.attention import ATTENTION_NAME, PROBE_NAME, LayerBinding, StepMetadata
from hybridgen.models.rope import PerTokenRope, replace_length_dependent_rope, restore_rope
from hybridgen.models.weights import ModuleWeights, WeightProvider


class AttentionCall(NamedTuple):
    """How a module attends."""

    scale: float
    window: int
    """Positions seen, the own one included; 0 for all."""
    softcap: float
    sinks: bool


class AttentionSite(NamedTuple):
    """One attention module as the probe saw it."""

    module: nn.Module
    layer: nn.Module
    """The decoder layer around it: what is compiled."""
    shape: LayerShape
    window: int
    """Sliding window for a model that does not hand one down; 0 for none."""
    call: AttentionCall
    """What the module hands to attention besides tensors."""


@dataclass(eq=False)
class BoundModel:
    """A model whose attention runs on a paged cache, until `release()`."""

    model: PreTrainedModel
    sites: tuple[AttentionSite, ...]
    logits_dtype: torch.dtype
    """Of what `forward()` returns; some models compute their logits in float32 whatever their weights are."""
    weights: WeightProvider
    """Gives the weights of the model's projections by their modules' names."""
    _attention: str | None
    _ropes: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The decoder layers, in order."""
        return tuple(site.layer for site in self.sites)

    def layer_states(self, page_size: int, dtype: torch.dtype) -> tuple[KeyValueState, ...]:
        """What each layer keeps between steps, as the probe saw it; not allocated yet."""
        return tuple(PagedKV(site.shape, page_size, dtype) for site in self.sites)

    @property
    def reprefill_length(self) -> int | None:
        """The length at which a request must be prefilled again, because its rotary table changes (longrope)."""
        lengths = {rope.switch_length for _, _, rope in self._replaced() if rope.switch_length is not None}
        return min(lengths) if lengths else None

    def _replaced(self) -> list[tuple[nn.Module, str, PerTokenRope]]:
        return [(parent, name, getattr(parent, name)) for parent, name, _ in self._ropes]

    def attach(self, states: Sequence[KeyValueState], step: StepMetadata) -> None:
        """Give every attention module its layer's state, which is allocated, and the step's metadata."""
        for site, state in zip(self.sites, states, strict=True):
            site.module._hybridgen = LayerBinding(*state.pages, step, site.window)  # type: ignore[assignment]
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
        output = self.model(
            input_ids=input_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            # An int above 0 is not the same thing in every model; a tensor and 0 are.
            logits_to_keep=0 if keep is None else keep,
        )
        return output.logits[0]

    @contextmanager
    def original_attention(self) -> Iterator[None]:
        """Inside, the model attends as it did before `bind()`, without a cache."""
        if self._attention is None:
            raise EngineError(f"this {type(self.model).__name__} has no attention of its own to go back to")
        self.model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            _set_attention(self.model, ATTENTION_NAME)

    def release(self) -> None:
        """Put everything back as it was before `bind()`."""
        for site in self.sites:
            vars(site.module).pop("_hybridgen", None)
        restore_rope(self._ropes)
        self._ropes.clear()
        if self._attention is not None:
            self.model.set_attn_implementation(self._attention)
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


def bind(model: PreTrainedModel) -> BoundModel:
    """Route the model's attention to hybridgen.

    Raises:
        EngineError: another engine has the model.
        UnsupportedModelError: it does not attend once per layer through Hugging Face's attention interface.
    """
    check_free(model)
    previous = model.config._attn_implementation
    sites, logits_dtype = _probe(model)
    bound = BoundModel(model, sites, logits_dtype, ModuleWeights(model), previous)
    try:
        _set_attention(model, ATTENTION_NAME)
        model._hybridgen_bound = True  # type: ignore[assignment]
        replace_length_dependent_rope(model, bound._ropes)
    except BaseException:
        bound.release()
        raise
    return bound


def _set_attention(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    # Hugging Face only logs a warning when it refuses.
    if model.config._attn_implementation != name:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not attend through Hugging Face's attention interface, so hybridgen cannot "
            "put its paged cache under it"
        )


def _probe(model: PreTrainedModel) -> tuple[tuple[AttentionSite, ...], torch.dtype]:
    """Run two tokens through the model and note every attention call, and the dtype of the logits."""
    previous = model.config._attn_implementation
    seen: list[tuple[nn.Module, LayerShape, int, AttentionCall]] = []

    def note(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict) -> None:
        shape = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        scale = kwargs.get("scaling")
        call = AttentionCall(
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            int(kwargs.get("sliding_window") or 0) or _config_window(module),
            float(kwargs.get("softcap") or 0.0),
            kwargs.get("s_aux") is not None,
        )
        seen.append((module, shape, 0 if kwargs.get("sliding_window") else call.window, call))

    modules = list(model.modules())
    _set_attention(model, PROBE_NAME)
    for module in modules:
        vars(module)["_hybridgen_probe"] = note
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            output = model(input_ids=ids, position_ids=torch.arange(2, device=model.device)[None], use_cache=False)
    finally:
        for module in modules:
            vars(module).pop("_hybridgen_probe", None)
        model.set_attn_implementation(previous)
    layers = _decoder_layers(model, [module for module, *_ in seen])
    sites = tuple(
        AttentionSite(module, layer, shape, window, call)
        for (module, shape, window, call), layer in zip(seen, layers, strict=True)
    )
    return sites, output.logits.dtype


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


def _config_window(module: nn.Module) -> int:
    """The window of a layer whose model leaves it to the mask."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types is None or index is None or index >= len(types) or types[index] != "sliding_attention":
        return 0
    return int(getattr(config, "sliding_window", 0) or 0)
