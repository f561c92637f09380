"""Decoder layers whose second half is one op in decode of one token: `hybridgen::mixture`.

What such a layer does is known by the attribute names that Hugging Face's families share, and proved for each layer:
its own forward is watched, and each part has to get and give what the op's parts do. Such a layer's class gets a
subclass with a forward of ours for decode of one token; elsewhere its own runs. Whether the op is used is tried for
each kind of layer (`models.mixtures_check`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hybridgen.device.failures import is_fatal
from hybridgen.device.watched import has_hooks, is_unheard
from hybridgen.errors import described
from hybridgen.kernels.linear import mixture as op
from hybridgen.kernels.linear.experts_form import Form, Normed, Projection, Routed
from hybridgen.kernels.linear.mixture import mixture, normalised
from hybridgen.models.attention import Phase, StepMetadata
from hybridgen.models.binding import BoundModel
from hybridgen.models.decoder import Unfit, norm_of
from hybridgen.models.gated import Used
from hybridgen.models.measured import Measured
from hybridgen.models.mixtures_check import Verdict, tried_on
from hybridgen.models.packed_experts import PackedExperts
from hybridgen.models.routers import RouterSite
from hybridgen.models.swapped import made_class

logger = logging.getLogger(__name__)

_NORM, _MIXTURE, _ATTENTION = "post_attention_layernorm", "mlp", "self_attn"
_ROUTERS = ("router", "gate")
_CHECKED = 5
"""Tokens that a layer is checked on."""
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the norm of each row's results, by dtype."""


class MixtureLayer(nn.Module):
    """A base of decoder layers that `use_mixture_op()` changed."""


class MixtureBinding:
    """What the forward of ours knows of a layer beside its modules; an attribute of the layer."""

    __slots__ = ("chosen", "eps", "form", "router", "shift", "step")

    def __init__(self, step: StepMetadata, router: str, norm: tuple[float, float], site: RouterSite) -> None:
        """
        Args:
            router: its name in the layer's mixture.
            norm: epsilon, and what is added to the norm's weight.
        """
        self.step, self.router, self.form, self.chosen = step, router, site.form, site.chosen
        self.eps, self.shift = norm

    def __str__(self) -> str:
        return f"{self.router} {self.form} {self.chosen} {self.eps} {self.shift}"


def use_mixture_op(
    bound: BoundModel, step: StepMetadata, fall_back: Callable[[str], None], measured: Measured | None = None
) -> Used:
    """From now on layers for which that is proved run their second half as one op in decode of one token. The layers'
    states must be attached.

    Args:
        fall_back: told of a kind of layer that the op's kernels get wrong. That several ops are faster is none.
        measured: what earlier trials chose. The kernels are tried all the same, but not timed again.
    """
    found = dict(_candidates(bound, step))
    if not found:
        return Used()
    measured = Measured() if measured is None else measured
    tried: dict[Any, Verdict] = {}
    for layer, binding in list(found.items()):
        key = _kind(layer, binding)
        if key not in tried:
            device = getattr(layer, _NORM).weight.device
            once = partial(measured.slower, f"mixture: {key}")
            tried[key] = verdict = tried_on(device, *_parts(layer, binding), once)
            if verdict.wrong is not None:
                fall_back(f"mixtures run by several ops: {verdict.wrong}")
        if not tried[key].is_used:
            del found[layer]
    slower = tuple(each.slower for each in tried.values() if each.slower is not None)
    try:
        _prove(bound, found)
    except Exception as error:  # any model code runs here, and a model that stays as it was still works
        if is_fatal(error):
            raise
        logger.debug("no layer was proved: %s", described(error), exc_info=True)
        return Used(0, slower)
    for layer, binding in found.items():
        layer._hybridgen = binding  # type: ignore[assignment]
    allow_mixture_op(bound, is_unheard)
    return Used(len(found), slower)


def allow_mixture_op(bound: BoundModel, allowed: Callable[[nn.Module], bool]) -> None:
    """Which of the layers that were proved run so: none whose modules, which are not called, somebody listens to."""
    for layer in bound.layers:
        kind: Any = type(layer)
        if not isinstance(vars(layer).get("_hybridgen"), MixtureBinding):
            continue
        fits = allowed(layer)
        if issubclass(kind, MixtureLayer) is not fits:
            layer.__class__ = _with_op(kind) if fits else kind.__bases__[0]


def use_own_mixture(bound: BoundModel) -> None:
    """Undo `use_mixture_op()`."""
    allow_mixture_op(bound, lambda _: False)
    for layer in bound.layers:
        if isinstance(vars(layer).get("_hybridgen"), MixtureBinding):
            del layer._hybridgen


def make_classes(bound: BoundModel) -> None:
    """Make the classes that `use_mixture_op()` may give layers: what is compiled is kept with them, and loaded
    first."""
    for layer in bound.layers:
        kind: Any = type(layer)
        _with_op(kind)


def _candidates(bound: BoundModel, step: StepMetadata) -> Iterator[tuple[nn.Module, MixtureBinding]]:
    routers = {site.module: site for site in bound.routers}
    for layer in bound.layers:
        try:
            yield layer, _read(layer, routers, step)
        except Unfit as reason:
            logger.debug("%s has a second half of its own: %s", type(layer).__name__, reason)


def _read(layer: Any, routers: dict[nn.Module, RouterSite], step: StepMetadata) -> MixtureBinding:
    """What a layer seems to do.

    Raises:
        Unfit: something is missing, or of another kind.
    """
    mlp, norm = getattr(layer, _MIXTURE, None), getattr(layer, _NORM, None)
    if not isinstance(mlp, nn.Module) or not isinstance(norm, nn.Module):
        raise Unfit(f"it has no {_MIXTURE} or {_NORM}")
    if not all(isinstance(getattr(layer, name, None), nn.Module) for name in (_ATTENTION, "input_layernorm")):
        raise Unfit("it has no attention or norm before it")
    name = next((name for name in _ROUTERS if getattr(mlp, name, None) in routers), None)
    experts = getattr(mlp, "experts", None)
    if name is None or not isinstance(experts, PackedExperts):
        raise Unfit("its router or its experts are other ones")
    if experts.kind != op.KIND or experts.block != op.BLOCK:
        raise Unfit(f"its experts are in {experts.kind}")
    for inner in layer.modules():
        if "forward" in vars(inner) or has_hooks(inner):
            raise Unfit("it has hooks or a replaced forward")
    found = norm_of(norm, experts.hidden)
    return MixtureBinding(step, name, (found.eps, found.shift), routers[getattr(mlp, name)])


def _kind(layer: Any, binding: MixtureBinding) -> Any:
    """What the kernels of a layer are compiled for."""
    tensors = vars(layer.mlp.experts)["_buffers"].values()
    shapes = tuple(None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors)
    return str(binding), shapes, layer.mlp.experts.form, getattr(layer, _NORM).weight.dtype


def _parts(layer: Any, binding: MixtureBinding) -> tuple[Normed, Routed, Projection, Projection, Form]:
    """What the op takes behind the states."""
    norm, mlp = getattr(layer, _NORM), getattr(layer, _MIXTURE)
    router, experts = getattr(mlp, binding.router), mlp.experts
    bias = router.bias if "bias" in router._parameters else None
    routed = Routed(router.weight, bias, binding.chosen, binding.form)
    gate_up, down = experts._projection("gate_up"), experts._projection("down")
    return Normed(norm.weight, binding.eps, binding.shift), routed, gate_up, down, experts.form


@functools.cache
def _with_op(kind: Any) -> Any:
    own: Callable[..., Any] = kind.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        binding: MixtureBinding = self._hybridgen
        if binding.step.phase is not Phase.DECODE or hidden_states.shape[1] != 1 or args:
            return own(self, hidden_states, *args, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return mixture(hidden_states[0], attended[0], *_parts(self, binding))[None]

    return made_class(kind, MixtureLayer, {"forward": forward, "_hybridgen_forward": own}, globals())


class _Seen(NamedTuple):
    """A call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


@torch.inference_mode()
def _prove(bound: BoundModel, found: dict[nn.Module, MixtureBinding]) -> None:
    """Take out of `found` the layers whose own forward does something else.

    Raises:
        Exception: whatever the model's code raises.
    """
    seen: dict[nn.Module, _Seen] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        seen[module] = _Seen(args, dict(kwargs), out)

    hooks = []
    for layer, binding in found.items():
        own: Any = layer
        parts = own.input_layernorm, own.self_attn, getattr(own, _NORM), own.mlp, own.mlp.experts
        for module in (layer, *parts, getattr(own.mlp, binding.router)):
            hooks.append(module.register_forward_hook(note, with_kwargs=True))
    words = cast(nn.Embedding, bound.model.get_input_embeddings()).num_embeddings
    device = bound.model.device
    ids = torch.arange(_CHECKED, device=device) * 37 % words
    try:
        with bound.original_attention():
            bound.model(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in list(found):
        why = _difference(layer, found[layer], seen)
        if why is not None:
            logger.debug("%s has a second half of its own: %s", type(layer).__name__, why)
            del found[layer]


def _difference(layer: Any, binding: MixtureBinding, seen: dict[nn.Module, _Seen]) -> str | None:
    """Why a layer's own forward is not that of ours; None if it is."""
    mlp, norm = layer.mlp, getattr(layer, _NORM)
    router = getattr(mlp, binding.router)
    modules = layer, layer.input_layernorm, layer.self_attn, norm, mlp, router, mlp.experts
    if any(module not in seen for module in modules):
        return "a part of it was not called"
    whole, before, attention, normed, mixed, routed, experts = (seen[module] for module in modules)
    if len(whole.args) != 1 or not isinstance(whole.out, Tensor) or not _is(before.args, whole.args):
        return "it is called with other arguments"
    if not isinstance(attention.out, tuple) or len(attention.out) != 2:
        return "its attention returns something else"
    handed = {name: value for name, value in attention.kwargs.items() if name != "hidden_states"}
    if attention.args or attention.kwargs.get("hidden_states") is not before.out:
        return "its attention gets other states"
    if any(name not in whole.kwargs or whole.kwargs[name] is not value for name, value in handed.items()):
        return "its attention gets other arguments"
    states = whole.args[0] + attention.out[0]
    if not _is(normed.args, (states,)) or not _is(mixed.args, (normed.out,)) or normed.kwargs or mixed.kwargs:
        return "its norm or its mixture gets other states"
    result = mixed.out[0] if isinstance(mixed.out, tuple) else mixed.out
    flat = normed.out.reshape(-1, normed.out.shape[-1])
    taken = (*experts.args, *(experts.kwargs.get(name) for name in mlp.experts._names[len(experts.args) :]))
    if not _is(routed.args, (flat,)) or not _is(taken, (flat, routed.out[2], routed.out[1])):
        return "its router or its experts get something else"
    if not torch.equal(experts.out.reshape(result.shape), result) or not torch.equal(whole.out, states + result):
        return "it makes something else of its experts' results"
    ours, own = normalised(states, _parts(layer, binding)[0]).float(), normed.out.float()
    close = (ours - own).norm(dim=-1) <= _TOLERANCE.get(states.dtype, 2e-2) * own.norm(dim=-1)
    return None if bool(close.all()) else "it normalises in another way"


def _is(found: Any, wanted: Any) -> bool:
    """Whether tensors are equal, one by one."""
    return len(found) == len(wanted) and all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(found, wanted, strict=True)
    )
