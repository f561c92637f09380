"""Find where a model attends and what keeps a state: by its calls, with its own weights, hooks and devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from hybridgen.cache import LayerShape
from hybridgen.cache.paged_latent import LatentShape
from hybridgen.errors import UnsupportedModelError, shown
from hybridgen.models.attention import SITES_NAME
from hybridgen.models.counting import counts_tokens
from hybridgen.models.interface import AttentionNames, check_functions
from hybridgen.models.latent import check_expansion, check_latents, expanded, noting_expansion
from hybridgen.models.layer_inputs import LayerInputs
from hybridgen.models.layer_list import decoder_layers, layer_around
from hybridgen.models.mixers import MixerSite, cache_keyword, check_claimed, check_mixers, mixer_sites
from hybridgen.models.probe import (
    AttentionOptions,
    ProbedCall,
    check_distinct,
    check_interface,
    kind_of,
    probe_model,
    read_options,
)
from hybridgen.models.torch_functions import torch_alone
from hybridgen.models.visibility import CAUSAL, Visibility


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
    latent: LatentShape | None = None
    """What it stores instead of the keys and values of `shape`; None where it stores these."""


class _Seen(NamedTuple):
    module: nn.Module
    query_heads: int
    shape: LayerShape
    options: AttentionOptions
    producer: int | None
    latent: LatentShape | None


def find_sites(
    model: PreTrainedModel,
    attention: AttentionNames,
    context: int,
    calls: tuple[ProbedCall, ...] | None,
) -> tuple[tuple[AttentionSite, ...], tuple[MixerSite, ...], tuple[nn.Module, ...], torch.dtype]:
    """The model's attention calls, its mixers, its decoder layers, and the dtype of its logits.

    What they see comes from a probe of a copy without weights (`models.probe`). Two tokens through the model itself
    then show that it makes the same calls: with its hooks, its replaced `forward`s and its devices.
    """
    kind = kind_of(model)
    check_interface(model)
    calls = probe_model(model, context) if calls is None else calls
    mixers = check_mixers(model)
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    cache = DynamicCache(config=model.config) if mixers else None
    inputs = LayerInputs(mixers)
    with inputs.listening(), torch_alone(model):
        seen, logits_dtype = _run_two_tokens(model, attention, names, cache)
    check_distinct(kind, [names[site.module] for site in seen])
    layers = decoder_layers(model, [site.module for site in seen], mixers)
    if [names[site.module] for site in seen] != [call.name for call in calls]:
        raise UnsupportedModelError(
            f"{kind} attends in other modules than its classes do ({len(seen)} and {len(calls)} calls): a hook or a "
            "replaced forward changes them; remove it"
        )
    check_functions(site.module for site in seen)
    _check_shared(model, [names[site.module] for site in seen if site.producer is not None])
    for site, call in zip(seen, calls, strict=True):
        if site.latent is not None:
            _check_latent(names[site.module], site, call.sees)
    sites = tuple(
        AttentionSite(
            site.module,
            layer_around(site.module, layers),
            site.query_heads,
            site.shape,
            call.sees,
            site.options,
            site.producer,
            site.latent,
        )
        for site, call in zip(seen, calls, strict=True)
    )
    check_class_forward(names, [site.module for site in sites if counts_tokens(site.module)])
    if cache is None:
        return sites, (), layers, logits_dtype
    check_claimed(mixers, cache)
    states = mixer_sites(mixers, layers, cache, inputs)
    check_class_forward(names, [site.module for site in states])
    return sites, states, layers, logits_dtype


def check_class_forward(names: Mapping[nn.Module, str], modules: Iterable[nn.Module]) -> None:
    """Raise unless these modules run the forward of their class, which is called with the step's states or positions.

    Raises:
        UnsupportedModelError: the forward of one was replaced.
    """
    module = next((module for module in modules if "forward" in vars(module)), None)
    if module is not None:
        raise UnsupportedModelError(
            f"the forward of {names[module]} was replaced by another ({shown(vars(module)['forward'])}); hybridgen "
            f"runs that of {type(module).__name__}, with its own states and positions. Register a hook instead, or "
            "delete the attribute"
        )


def _check_latent(name: str, site: _Seen, sees: Visibility) -> None:
    """Raise unless attention to a site's latents is what its module computes.

    Raises:
        UnsupportedModelError: it is not.
    """
    if sees != CAUSAL or site.options.softcap or site.options.sinks or site.latent is None:
        raise UnsupportedModelError(
            f"{name} caches latents and attends with a window, a soft cap or sinks ({sees}, {site.options}); hybridgen "
            "attends to latents without them"
        )
    check_expansion(name, site.module, site.latent, site.query_heads, site.shape.key_dim)


def _check_shared(model: PreTrainedModel, readers: Sequence[str]) -> None:
    """Raise unless as many layers read an earlier one's keys and values as the config says.

    Args:
        readers: names of the attention modules that were given an earlier one's tensors.

    Raises:
        UnsupportedModelError: a layer that is to share got tensors of its own, such as copies on its device, or the
            other way round.
    """
    count = getattr(model.config, "num_kv_shared_layers", None) or 0
    if len(readers) != count:
        raise UnsupportedModelError(
            f"num_kv_shared_layers={count}, but {len(readers)} attention modules of {kind_of(model)} are given the "
            f"keys and values of an earlier one ({', '.join(readers) or 'none'}); hybridgen cannot tell which pages "
            "the others read. Run it with transformers' own generate()"
        )


def _run_two_tokens(
    model: PreTrainedModel, attention: AttentionNames, names: dict[nn.Module, str], cache: DynamicCache | None
) -> tuple[list[_Seen], torch.dtype]:
    """Note every attention call of a forward pass, and the dtype of the logits.

    Args:
        cache: gets what mixers keep; None where there are none.
    """
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
        latent = expanded(names[module], module, key, value)
        seen.append(_Seen(module, query.shape[1], shape, options, next(same, None), latent))
        stored.append((key, value))

    modules = list(model.modules())
    attention.set(SITES_NAME)
    for module in modules:
        vars(module)["_hybridgen_note"] = note
    try:
        with torch.inference_mode(), noting_expansion(check_latents(model)):
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            keeps = {"use_cache": False} if cache is None else {cache_keyword(model): cache, "use_cache": True}
            output = model(input_ids=ids, position_ids=torch.arange(2, device=model.device)[None], **keeps)
    finally:
        for module in modules:
            vars(module).pop("_hybridgen_note", None)
        attention.restore()
    return seen, output.logits.dtype
