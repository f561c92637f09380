"""Attention modules that normalise, rotate and write heads in one op.

What a Llama-like attention module does between its projections and its attention function is known by the attribute
names that Hugging Face's families share, and proved for each module: its own forward hands an attention function the
same queries, keys, values and options, and makes the same of what that returns. Such a module's class gets a subclass
with a forward of ours; whenever the model attends by itself, its own forward runs. Modules that compute something else
are left alone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hybridgen.device.failures import is_fatal
from hybridgen.device.watched import has_hooks, is_unheard
from hybridgen.errors import described
from hybridgen.kernels.attention.ops import Places
from hybridgen.kernels.attention.rotary import HeadNorms, rotate_and_write, rotate_and_write_on_cpu, turned
from hybridgen.models.attention import ATTENTION_NAME, SITES_NAME, LayerBinding
from hybridgen.models.binding import BoundModel
from hybridgen.models.decoder import Unfit, head_norm
from hybridgen.models.sites import AttentionSite
from hybridgen.models.swapped import made_class

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest relative error of a head, by the dtype in which the model computes it."""
_REPEATS = 5
"""Calls of the op that have to give the same bits, where it has not run in the tests on a GPU."""
_CHECKED = 8
"""Tokens that a module is checked on."""
_LARGE = 1000.0
"""By which a module's input is multiplied to see whether it cuts large numbers off, as OLMo's `clip_qkv` does."""


class Rotation(NamedTuple):
    """What the forward of ours knows of a module beside its projections and norms; plain values."""

    dim: int
    """Of queries and keys."""
    value_dim: int
    norms_query: bool
    norms_key: bool
    query_eps: float
    key_eps: float
    shift: float
    """What is added to the norms' weights."""
    scale: float
    softcap: float
    sinks: bool = False
    half: bool = False
    """Its rotary tables have a column for each pair of dimensions alone."""


class RotatingAttention(nn.Module):
    """A base of attention modules that `use_one_op()` changed."""


def use_one_op(bound: BoundModel, max_context: int, fall_back: Callable[[str], None]) -> int:
    """From now on modules for which that is proved normalise, rotate and write in one op; returns how many these are.
    The layers' states must be attached.

    Args:
        max_context: positions that the model may be run at; modules are checked early and late in them.
        fall_back: told where the op would serve modules and is wrong on this device.
    """
    found = {}
    for site in () if bound.mixers else bound.sites:  # with mixers, no prefill is compiled
        try:
            found[site.module] = _read(bound, site)
        except Unfit as reason:
            logger.debug("%s rotates by itself: %s", type(site.module).__name__, reason)
    if not found:
        return 0
    try:
        for start in dict.fromkeys((0, max(0, max_context - _CHECKED))):
            _prove(bound, found, torch.arange(start, min(start + _CHECKED, max_context), device=bound.model.device))
    except Exception as error:  # any model code runs here, and a model that stays as it was still works
        logger.debug("no module was proved: %s", described(error), exc_info=True)
        return 0
    tried: dict[Any, bool] = {}
    for module, rotation in list(found.items()):
        if rotation.half:
            binding: LayerBinding = module._hybridgen  # type: ignore[assignment]
            key = rotation, binding.keys.shape[1:], binding.keys.dtype
            if key not in tried:
                tried[key] = _rotates_right(module, rotation, binding)
                if not tried[key]:
                    fall_back("heads are rotated by the model's own code: our kernel gives other results, or fails")
            if not tried[key]:
                del found[module]
                continue
        module._hybridgen_rotation = rotation  # type: ignore[assignment]
    allow_one_op(bound, is_unheard)
    return len(found)


def make_classes(bound: BoundModel) -> None:
    """Make the classes that `use_one_op()` may give modules: what is compiled is kept with them, and loaded first."""
    for site in bound.sites:
        kind: Any = type(site.module)
        _rotating(kind, kind.forward)


def allow_one_op(bound: BoundModel, allowed: Callable[[nn.Module], bool]) -> None:
    """Which of the modules that were proved run so: none that somebody listens to, whose norms are not called."""
    for site in bound.sites:
        kind: Any = type(site.module)
        if "_hybridgen_rotation" not in vars(site.module):
            continue
        fits = allowed(site.module)
        if issubclass(kind, RotatingAttention) is not fits:
            site.module.__class__ = _rotating(kind, kind.forward) if fits else kind.__bases__[0]


def use_own_rotation(bound: BoundModel) -> None:
    """Undo `use_one_op()`."""
    allow_one_op(bound, lambda _: False)
    for site in bound.sites:
        vars(site.module).pop("_hybridgen_rotation", None)


def _read(bound: BoundModel, site: AttentionSite) -> Rotation:
    """What a module seems to do.

    Raises:
        Unfit: something is missing, or of another kind.
    """
    module = site.module
    binding = vars(module).get("_hybridgen")
    if not isinstance(binding, LayerBinding) or binding.reads_only or binding.factors is not None:
        raise Unfit("its layer keeps no keys and values of its own, or scaled ones")
    if site.options.sinks and not isinstance(getattr(module, "sinks", None), nn.Parameter):
        raise Unfit("it has sinks that are called otherwise")
    if bound.length_dependent:
        raise Unfit("its rotary positions depend on the length")
    for inner in module.modules():
        if "forward" in vars(inner) or has_hooks(inner):
            raise Unfit("it has hooks or a replaced forward")
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        raise Unfit("it has no config")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        if not isinstance(getattr(module, name, None), nn.Module):
            raise Unfit(f"it has no {name}")
    norms = head_norm(module, "q_norm"), head_norm(module, "k_norm")
    if any(norm is not None and norm.scale.shape[0] != site.shape.key_dim for norm in norms):
        raise Unfit("it normalises all heads together")
    shifts = {norm.shift for norm in norms if norm is not None}
    if len(shifts) > 1:
        raise Unfit("its norms are of two kinds")
    query_eps, key_eps = (0.0 if norm is None else norm.eps for norm in norms)
    return Rotation(
        site.shape.key_dim,
        site.shape.value_dim,
        norms[0] is not None,
        norms[1] is not None,
        query_eps,
        key_eps,
        shifts.pop() if shifts else 0.0,
        site.options.scale,
        site.options.softcap,
        site.options.sinks,
    )


def _heads(module: Any, rotation: Rotation, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, HeadNorms]:
    """Queries, keys and values [T, heads, size] of hidden states [1, T, width], and how they are normalised."""
    shape = hidden.shape[1], -1, rotation.dim
    q, k = module.q_proj(hidden).view(shape), module.k_proj(hidden).view(shape)
    v = module.v_proj(hidden).view(hidden.shape[1], -1, rotation.value_dim)
    norms = HeadNorms(
        module.q_norm.weight if rotation.norms_query else None,
        module.k_norm.weight if rotation.norms_key else None,
        rotation.query_eps,
        rotation.key_eps,
        rotation.shift,
        rotation.half,
    )
    return q, k, v, norms


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward with one op between its projections and its attention."""
    binding = getattr(self, "_hybridgen", None)
    # The name says whether the model attends by itself, for a comparison.
    if binding is None or self.config._attn_implementation != ATTENTION_NAME:
        return self._hybridgen_forward(*args, **kwargs)
    rotation = self._hybridgen_rotation
    hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
    q, k, v, norms = _heads(self, rotation, hidden)
    options = rotation.scale, rotation.softcap, self.sinks if rotation.sinks else None
    out = binding.rotate_and_attend(q, k, v, cos[0], sin[0], norms, *options)
    return self.o_proj(out.flatten(1)[None]), None


@functools.cache
def _rotating(kind: Any, forward: Any) -> Any:
    members = {"forward": _forward, "_hybridgen_forward": forward}
    return made_class(kind, RotatingAttention, members, globals())


@torch.inference_mode()
def _rotates_right(module: Any, rotation: Rotation, binding: LayerBinding) -> bool:
    """Whether the op gives on this device what torch's operators give, with tables of half the width; tried with random
    heads of the module's sizes."""
    try:
        return _same_heads(module, rotation, binding)
    except Exception as error:  # whatever Triton raises
        if is_fatal(error):
            raise
        logger.debug("the op for heads failed", exc_info=True)
        return False


def _same_heads(module: Any, rotation: Rotation, binding: LayerBinding) -> bool:
    device, dtype = binding.keys.device, module.sinks.dtype if rotation.sinks else module.q_proj.weight.dtype
    kv_heads, size = binding.keys.shape[1:3]
    heads = kv_heads * 2 if not rotation.sinks else module.sinks.shape[0]
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    widths = heads * rotation.dim, kv_heads * rotation.dim, kv_heads * rotation.value_dim
    q, k, v = random(3, sum(widths)).split(widths, -1)
    q, k, v = q.view(3, -1, rotation.dim), k.view(3, -1, rotation.dim), v.view(3, -1, rotation.value_dim)
    cos, sin = random(3, rotation.dim // 2), random(3, rotation.dim // 2)
    norms = HeadNorms(
        module.q_norm.weight if rotation.norms_query else None,
        module.k_norm.weight if rotation.norms_key else None,
        rotation.query_eps, rotation.key_eps, rotation.shift, True,
    )  # fmt: skip

    def places() -> Places:
        sizes = rotation.dim, rotation.value_dim
        keys, values = (torch.zeros(3, kv_heads, size, n, device=device).to(binding.keys.dtype) for n in sizes)
        table = torch.tensor([[1, 2]], dtype=torch.int32, device=device)
        slots = torch.zeros(3, dtype=torch.int32, device=device)
        return Places(keys, values, table, slots, torch.tensor([0, size - 1, size], device=device))

    ours, own = places(), places()
    out = rotate_and_write(q, k, v, cos, sin, norms, ours)
    same = all(torch.equal(rotate_and_write(q, k, v, cos, sin, norms, places()), out) for _ in range(_REPEATS))
    wanted = rotate_and_write_on_cpu(q, k, v, cos, sin, *norms, *own)
    tolerance = _TOLERANCE.get(dtype, 2e-2)
    of_pages = max(tolerance, 0.07 if ours.k_pages.element_size() == 1 else 0.0)
    near = _close(out.float(), wanted.float(), tolerance) and _close(
        ours.k_pages.float(), own.k_pages.float(), of_pages
    )
    return same and near and torch.equal(ours.v_pages.float(), own.v_pages.float())


class _Call(NamedTuple):
    """A call of a module, as far as its own forward has come."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@torch.inference_mode()
def _prove(bound: BoundModel, found: dict[nn.Module, Rotation], positions: Tensor) -> None:
    """Take out of `found` the modules whose own forward does something else, on tokens at these positions.

    Raises:
        Exception: whatever the model's code raises.
    """
    handed: dict[nn.Module, tuple[Any, ...]] = {}
    calls: dict[nn.Module, _Call] = {}
    wrong: dict[nn.Module, str] = {}
    generator = torch.Generator().manual_seed(0)

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        returned = torch.randn(1, query.shape[2], query.shape[1], value.shape[-1], generator=generator)
        returned = returned.to(query)
        handed[module] = query, key, value, returned, kwargs.get("s_aux")
        return returned

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = _Call(args, dict(kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        why = _difference(module, found[module], calls.get(module), handed.get(module), out)
        if why is not None and not found[module].half:
            half = found[module]._replace(half=True)
            if _difference(module, half, calls.get(module), handed.get(module), out) is None:
                found[module], why = half, None
        if why is None:
            large = _Call((), {**kwargs, "hidden_states": kwargs["hidden_states"] * _LARGE})
            forward: Any = type(module).forward
            out = forward(module, **large.kwargs)
            why = _difference(module, found[module], large, handed.get(module), out)
        if why is not None:
            wrong[module] = why

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in found]
    hooks += [module.register_forward_hook(after, with_kwargs=True) for module in found]
    for site in bound.sites:
        vars(site.module)["_hybridgen_note"] = note
    words = cast(nn.Embedding, bound.model.get_input_embeddings()).num_embeddings
    ids = torch.arange(len(positions), device=positions.device) * 37 % words
    try:
        with bound.attending_by(SITES_NAME):
            bound.model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for site in bound.sites:
            vars(site.module).pop("_hybridgen_note", None)
    for module in list(found):
        if module not in calls or module in wrong:
            logger.debug("%s rotates by itself: %s", type(module).__name__, wrong.get(module, "it was not called"))
            del found[module]


def _difference(
    module: nn.Module, rotation: Rotation, call: _Call | None, handed: tuple[Any, ...] | None, out: Any
) -> str | None:
    """Why a module's own forward is not that of ours; None if it is."""
    if call is None or handed is None:
        return "it was not seen to attend"
    rotary = call.kwargs.get("position_embeddings")
    hidden = call.kwargs.get("hidden_states")
    if call.args or not isinstance(hidden, Tensor) or not isinstance(rotary, tuple) or len(rotary) != 2:
        return "it is called with other arguments"
    cos, sin = rotary
    tables = isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.dim() == 3 == sin.dim()
    turns = cos.shape[-1] * (2 if rotation.half else 1) if tables else 0
    if not tables or turns % 2 or turns > rotation.dim or cos.shape != sin.shape:
        return "its rotary table is of another kind"
    query, key, value, returned, sinks = handed
    if rotation.sinks and not (isinstance(sinks, Tensor) and torch.equal(sinks, cast(Any, module).sinks)):
        return "its sinks are other ones"
    q, k, v, norms = _heads(module, rotation, hidden)
    q = turned(q, cos[0], sin[0], norms.q_weight, norms.q_eps, norms.shift, norms.half)
    k = turned(k, cos[0], sin[0], norms.k_weight, norms.k_eps, norms.shift, norms.half)
    tolerance = _TOLERANCE.get(hidden.dtype, 2e-2)
    for name, ours, own in (("queries", q, query), ("keys", k, key)):
        theirs = own[0].transpose(0, 1)
        if ours.shape != theirs.shape or not _close(ours.float(), theirs.float(), tolerance):
            return f"its {name} are other ones"
    if not torch.equal(v, value[0].transpose(0, 1)):
        return "its values are other ones"
    if not isinstance(out, tuple) or len(out) != 2 or out[1] is not None:
        return "it returns something else than attention's output"
    expected = cast(Any, module).o_proj(returned[0].flatten(1)[None])
    return None if torch.equal(out[0], expected) else "it makes something else of attention's output"


def _close(ours: Tensor, own: Tensor, tolerance: float) -> bool:
    error, size = (ours - own).norm(dim=-1), own.norm(dim=-1)
    return bool((error <= tolerance * size + 1e-30).all())
