"""Decoder layers whose second half is one op in decode of one token: `hybridgen::mixture`.

What such a layer does is known by the attribute names that Hugging Face's families share, and proved for each layer:
its own forward is watched, and each part has to get and give what the op's parts do. Such a layer's class gets a
subclass with a forward of ours for decode of one token; elsewhere its own runs. Whether the op is used is tried for
each kind of layer: its kernels have to give what the reference does.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hybridgen.device.failures import is_fatal
from hybridgen.errors import described
from hybridgen.kernels.linear import mixture as op
from hybridgen.kernels.linear.experts import reference
from hybridgen.kernels.linear.experts_form import Form, Normed, Projection, Routed, RouteForm
from hybridgen.kernels.linear.mixture import mixture, normalised
from hybridgen.kernels.step.linear import few_rows
from hybridgen.models.attention import Phase, StepMetadata
from hybridgen.models.binding import BoundModel
from hybridgen.models.decoder import Unfit, norm_of
from hybridgen.models.few_rows import RowsBinding, RowsNorm
from hybridgen.models.packed_experts import PackedExperts
from hybridgen.models.projections import FusedHead, has_hooks
from hybridgen.models.rotating import RotatingAttention
from hybridgen.models.routers import RouterSite
from hybridgen.models.swapped import made_class

logger = logging.getLogger(__name__)

IS_ON = False
"""Whether layers are looked at."""
JOINS_NORMS = False
"""Whether the norm before attention is computed with the projection behind it."""
_NORM, _MIXTURE, _ATTENTION = "post_attention_layernorm", "mlp", "self_attn"
_ROUTERS = ("router", "gate")
_CHECKED = 5
"""Tokens that a layer is checked on."""
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the norm of each row's results, by dtype."""
_SMALL = 0.01
"""Size of the random states of a trial: the sum is mostly what experts give then."""


class MixtureLayer(nn.Module):
    """A base of decoder layers that `use_mixture_op()` changed."""


class MixtureBinding:
    """What the forward of ours knows of a layer beside its modules; an attribute of the layer."""

    __slots__ = ("chosen", "eps", "first", "form", "normalises", "router", "shift", "step")

    def __init__(
        self, step: StepMetadata, router: str, norm: tuple[float, float], first: RowsNorm, site: RouterSite
    ) -> None:
        """
        Args:
            router: its name in the layer's mixture.
            norm: epsilon, and what is added to the norm's weight.
            first: the norm before attention.
        """
        self.step, self.router, self.form, self.chosen = step, router, site.form, site.chosen
        self.eps, self.shift = norm
        self.first = first
        self.normalises = False
        """Whether the projection behind the first norm normalises, in one kernel with its product."""

    def __str__(self) -> str:
        return f"{self.router} {self.form} {self.chosen} {self.eps} {self.shift} {self.normalises}"


def use_mixture_op(bound: BoundModel, step: StepMetadata, fall_back: Callable[[str], None]) -> int:
    """From now on layers for which that is proved run their second half as one op in decode of one token; returns how
    many these are. The layers' states must be attached.

    Args:
        fall_back: told why the op is not used for a kind of layer.
    """
    found = dict(_candidates(bound, step)) if IS_ON else {}
    if not found:
        return 0
    tried: dict[Any, str | None] = {}
    for layer, binding in list(found.items()):
        key = _kind(layer, binding)
        if key not in tried:
            tried[key] = _problem(layer, binding)
            if tried[key] is not None:
                fall_back(f"mixtures run by several ops: {tried[key]}")
        if tried[key] is not None:
            del found[layer]
    try:
        _prove(bound, found)
    except Exception as error:  # any model code runs here, and a model that stays as it was still works
        if is_fatal(error):
            raise
        logger.debug("no layer was proved: %s", described(error), exc_info=True)
        return 0
    for layer, binding in found.items():
        layer._hybridgen = binding  # type: ignore[assignment]
    allow_mixture_op(bound, True)
    return len(found)


def allow_mixture_op(bound: BoundModel, allowed: bool) -> None:
    """Whether layers that were proved run so. Not while somebody listens to their modules, which are not called."""
    for layer in bound.layers:
        kind: Any = type(layer)
        bindings = isinstance(vars(layer).get("_hybridgen"), MixtureBinding)
        if bindings and issubclass(kind, MixtureLayer) is not allowed:
            layer.__class__ = _with_op(kind) if allowed else kind.__bases__[0]
            _join_norm(layer, allowed)


def _join_norm(layer: Any, allowed: bool) -> None:
    """Have the joined projection of queries, keys and values normalise, where nothing else reads the norm's result."""
    binding, attention = layer._hybridgen, layer.self_attn
    head = getattr(attention, "q_proj", None)
    rows = None if head is None else vars(head).get("_hybridgen")
    if not isinstance(rows, RowsBinding):
        return
    names = ("q_proj", "k_proj", "v_proj")
    whole = type(head) is FusedHead and list(head.fused_members) == [getattr(attention, name, None) for name in names]
    whole = whole and JOINS_NORMS and isinstance(attention, RotatingAttention)
    binding.normalises = allowed and whole and _normalises_right(head, binding.first)
    rows.norm = binding.first if binding.normalises else None


def use_own_mixture(bound: BoundModel) -> None:
    """Undo `use_mixture_op()`."""
    allow_mixture_op(bound, False)
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
    found, before = norm_of(norm, experts.hidden), norm_of(layer.input_layernorm, experts.hidden)
    first = RowsNorm(layer.input_layernorm, before.eps, before.shift)
    return MixtureBinding(step, name, (found.eps, found.shift), first, routers[getattr(mlp, name)])


def _kind(layer: Any, binding: MixtureBinding) -> Any:
    """What the kernels of a layer are compiled for."""
    tensors = vars(layer.mlp.experts)["_buffers"].values()
    shapes = tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors)
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
        normed = hidden_states if binding.normalises else self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **kwargs)
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
    first = Normed(layer.input_layernorm.weight, binding.first.eps, binding.first.shift)
    norms: list[tuple[Tensor, Normed, Tensor]] = [
        (states, _parts(layer, binding)[0], normed.out),
        (whole.args[0], first, cast(Tensor, before.out)),
    ]
    for x, norm, out in norms:
        ours, own = normalised(x, norm).float(), out.float()
        if not bool(((ours - own).norm(dim=-1) <= _TOLERANCE.get(x.dtype, 2e-2) * own.norm(dim=-1)).all()):
            return "it normalises in another way"
    return None


def _is(found: Any, wanted: Any) -> bool:
    """Whether tensors are equal, one by one."""
    return len(found) == len(wanted) and all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(found, wanted, strict=True)
    )


def _problem(layer: Any, binding: MixtureBinding) -> str | None:
    """Why a layer's kernels are not to be used, or None."""
    weight = getattr(layer, _NORM).weight
    if weight.device.type != "cuda":
        return "there are no kernels for its device"
    try:
        with torch.cuda.device(weight.device), torch.inference_mode():
            return _off(layer, binding)
    except Exception as error:  # whatever Triton raises
        if is_fatal(error):
            raise
        return f"its kernels failed: {described(error)}"
    finally:
        torch.cuda.empty_cache()  # the memory is counted next


def _off(layer: Any, binding: MixtureBinding) -> str | None:
    """How far the kernels are from the reference, if further than rounding."""
    from hybridgen.kernels.linear.mixture_kernels import mixture_on_cuda

    norm, routed, gate_up, down, form = _parts(layer, binding)
    experts, hidden = routed.weight.shape
    device, dtype = routed.weight.device, routed.weight.dtype
    for number in range(3):
        g = torch.Generator().manual_seed(number)
        x, added = (_SMALL * torch.randn(1, hidden, generator=g).to(device) for _ in range(2))
        x, added = x.to(dtype), added.to(dtype)
        states = x + added
        normed = normalised(states, norm)
        # Logits that are well apart, whatever is rounded.
        counts = torch.linspace(-2, 2, experts)[torch.randperm(experts, generator=g)].to(device)
        along = normed.float() / normed.float().square().sum()
        weight = (counts[:, None] * along).to(dtype)
        bias = None if routed.bias is None else torch.zeros_like(routed.bias)
        apart = routed._replace(weight=weight, bias=bias)
        out = mixture_on_cuda(x, added, norm, apart, gate_up, down, form)
        if out is None:
            return "its kernels cannot be had"
        ids = counts.topk(routed.chosen).indices[None]
        scores = _scores(normed.float() @ weight.float().t(), ids, routed.form)
        wanted = states.float() + reference(
            normed.float(), ids, scores, *gate_up, *down, op.KIND, op.BLOCK.outputs, op.BLOCK.inputs,
            False, form.interleaved, form.activation, form.alpha, form.limit,
        )  # fmt: skip
        size, error = float(wanted.norm()), float((out.float() - wanted).norm())
        if not error <= _TOLERANCE[torch.bfloat16] * size:
            return f"of a random token the kernels' results are off by {error / size if size else error:.3g}"
    return None


def _normalises_right(head: Any, norm: RowsNorm) -> bool:
    """Whether the joined projection gives what a norm and a product give."""
    weight, scale = head.fused_weight, norm.module.weight
    key = weight.shape, weight.dtype, weight.device, scale.dtype, head.fused_bias is None
    return _norm_tried(*key, norm.eps, norm.shift)


@functools.cache
def _norm_tried(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, norm_dtype: torch.dtype, plain: bool, eps: float,
    shift: float,
) -> bool:  # fmt: skip
    g = torch.Generator().manual_seed(0)

    def random(*sizes: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=g) * size).to(device, dtype)

    with torch.inference_mode():
        weight, x, bias = random(*shape, size=shape[1] ** -0.5), random(1, shape[1], size=3.0), random(shape[0])
        norm, added = random(shape[1]).to(norm_dtype), None if plain else bias
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                found = few_rows(x, weight, added, norm, eps, shift).float()
        except Exception as error:  # whatever Triton raises
            if is_fatal(error):
                raise
            logger.debug("norms stay kernels of their own: %s", described(error), exc_info=True)
            return False
        rows = normalised(x.float(), Normed(norm, eps, shift))
        wanted = nn.functional.linear(rows, weight.float(), None if plain else bias.float())
    return bool((found - wanted).norm() <= _TOLERANCE[torch.bfloat16] * wanted.norm())


def _scores(logits: Tensor, ids: Tensor, form: RouteForm) -> Tensor:
    """What chosen experts count."""
    if form.chosen_only:
        return logits.gather(1, ids).softmax(-1)
    scores = logits.softmax(-1).gather(1, ids)
    return scores / scores.sum(-1, keepdim=True) if form.normalised else scores
