"""Attention that caches latents in place of keys and values: multi-head latent attention (MLA), arXiv:2405.04434.

transformers' modules compute a latent and a rotary key for each token, and expand both to keys and values of all heads
in a method of their own, `expand_kv`. In the engine's own tree that method hands its arguments on as they are: the
attention function gets latents, keeps them in pages (`cache.paged_latent`), and does what the method would have done:

- *Decode* attends to latents. A head's score q.(W c) is (q W).c, so the keys' part of the projection goes into the
  query, and the values' part behind the sum (absorbed).
- *Prefill* projects the latents of each run, those of earlier chunks and shared pages included; on CUDA it attends to
  latents too, but for runs that begin in the call, which attend to keys and values of their own.

Both read the weight of `kv_b_proj` at each step. That they compute what the module's own method and a plain softmax do
is tried at loading, with its weights (`check_expansion`). The module's class is changed, not its attributes, so that
layers of a kind still share a compiled graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hybridgen.cache.paged_latent import LatentShape
from hybridgen.device.watched import has_forward_hooks
from hybridgen.errors import UnsupportedModelError
from hybridgen.kernels.attention.latent import (
    LatentPlaces,
    latent_decode,
    latent_prefill,
    through_keys,
    through_values,
    write_latent,
)
from hybridgen.models.attention import AttentionCall, Phase, StepMetadata
from hybridgen.models.projections import RowsLinear
from hybridgen.models.swapped import give_back, made_class
from hybridgen.models.visibility import CAUSAL

_TRIED = 11
"""Tokens that `check_expansion` attends with."""
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
"""Of the largest value, where a GPU may multiply in tensorfloat32; half precision gets 4e-2."""


class LatentAttention(nn.Module):
    """What the class of every such module is also, once it hands on its latents."""


class LatentBinding:
    """What one module needs beyond its inputs; an attribute of the module."""

    __slots__ = ("latents", "sees", "step")

    def __init__(self, latents: Tensor, step: StepMetadata) -> None:
        """`latents` are the layer's pages, [pages, 1, page_size, rank + rope]."""
        self.latents = latents
        self.sees = CAUSAL
        self.step = step

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Write the step's latents and attend to the pages: [T, H, value_dim]."""
        (latent, rotary), query, scale = call.new, call.query, call.scale
        step = self.step
        places = LatentPlaces(self.latents, step.block_table, step.slots, step.positions)
        weight: Tensor = module.kv_b_proj.weight  # type: ignore[assignment, union-attr]
        nope = query.shape[-1] - rotary.shape[-1]
        plain, turned = query[..., :nope], query[..., nope:]
        appends = step.phase is Phase.DECODE and not step.several
        if not appends:  # all of them, before any is read: requests of one prefill call can share pages
            write_latent(latent, rotary, places)
        if step.phase is Phase.PREFILL:
            return latent_prefill(plain, turned, places, step.query_starts, weight, scale, latent, rotary)
        new = (latent, rotary) if appends else (None, None)
        mixed = latent_decode(through_keys(plain, weight), turned, places, scale, *new)
        return through_values(mixed, weight, nope)


def find_latents(model: nn.Module) -> Iterator[nn.Module]:
    """The attention modules that expand latents to keys and values."""
    for module in model.modules():
        if callable(getattr(type(module), "expand_kv", None)):
            yield module


def latent_projections(model: nn.Module) -> list[nn.Module]:
    """The projections by which they do."""
    found = (getattr(module, "kv_b_proj", None) for module in find_latents(model))
    return [projection for projection in found if isinstance(projection, nn.Module)]


def check_latents(model: nn.Module) -> tuple[nn.Module, ...]:
    """The model's modules with latents, each of whose projection can be taken apart.

    Raises:
        UnsupportedModelError: one of them has no dense one without bias, or it is hooked.
    """
    found = tuple(find_latents(model))
    names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    for module in found:
        projection: Any = getattr(module, "kv_b_proj", None)
        plain = type(projection) in (nn.Linear, RowsLinear) and projection.bias is None
        if not plain or "forward" in vars(projection):
            raise UnsupportedModelError(
                f"{names[module]} caches latents, and its kv_b_proj is a {type(projection).__name__}; hybridgen takes "
                "the projection apart, and needs a dense linear layer without bias (not a quantised or adapted one)"
            )
    check_unwatched(found)
    return found


def check_unwatched(modules: Sequence[nn.Module]) -> None:
    """Raise if somebody listens to a projection, which is not called.

    Raises:
        UnsupportedModelError: somebody does.
    """
    for module in modules:
        if has_forward_hooks(module.kv_b_proj):  # type: ignore[arg-type]
            kind = type(module).__bases__[0] if isinstance(module, LatentAttention) else type(module)
            raise UnsupportedModelError(
                f"the kv_b_proj of a {kind.__name__} has forward hooks; hybridgen never calls it, because it takes the "
                "projection apart. Remove them"
            )


@contextmanager
def noting_expansion(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, each module keeps what its `expand_kv` was given and returned, for `expanded()`."""

    def noting(module: Any) -> Any:
        own = module.expand_kv

        def expand_kv(*latents: Tensor) -> Any:
            result = own(*latents)
            vars(module)["_hybridgen_expanded"] = (latents, result)
            return result

        return expand_kv

    try:
        for module in modules:
            vars(module)["expand_kv"] = noting(module)
        yield
    finally:
        for module in modules:
            vars(module).pop("expand_kv", None)
            vars(module).pop("_hybridgen_expanded", None)


def expanded(name: str, module: nn.Module, key: Tensor, value: Tensor) -> LatentShape | None:
    """What a module stores for each position, inside `noting_expansion()`; None where it has keys and values.

    Args:
        name: of the module, for messages.
        key: as its attention function got it; `value` alike.

    Raises:
        UnsupportedModelError: these are not what its `expand_kv` returned for one latent and one rotary key.
    """
    if callable(getattr(type(module), "expand_kv", None)):
        latents, result = vars(module).get("_hybridgen_expanded", ((), ()))
        tokens = (1, 1, key.shape[2])
        fit = len(latents) == 2 == len(result) and all(tuple(each.shape[:3]) == tokens for each in latents)
        if fit and key is result[0] and value is result[1]:
            return LatentShape(*(each.shape[-1] for each in latents))
        raise UnsupportedModelError(
            f"{name} caches latents and does not attend to what its expand_kv makes of one latent and one rotary key; "
            "run it with transformers' own generate()"
        )
    return None


def use_latents(module: nn.Module) -> None:
    """From now on the module hands its latents to its attention function, if it does not yet."""
    if not isinstance(module, LatentAttention):
        kind: Any = type(module)
        module.__class__ = _with_latents(kind)


def use_expansion(module: nn.Module) -> None:
    """Undo `use_latents()`."""
    give_back(module, LatentAttention)


def _handed_on(self: nn.Module, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    return latent, rotary


@functools.cache
def _with_latents(kind: Any) -> Any:
    return made_class(kind, LatentAttention, {"expand_kv": _handed_on}, globals())


@torch.inference_mode()
def check_expansion(name: str, module: nn.Module, shape: LatentShape, heads: int, dim: int) -> None:
    """Raise unless both ways to attend give what the module's own keys and values give.

    Args:
        name: of the module, for messages; it is not changed by `use_latents()` yet.
        dim: of a query's head, nope + rope.

    Raises:
        UnsupportedModelError: one of them does not.
    """
    own: Any = module
    weight: Tensor = own.kv_b_proj.weight
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(weight.device, weight.dtype)

    latent, rotary = random(1, 1, _TRIED, shape.rank), random(1, 1, _TRIED, shape.rope)
    query = random(_TRIED, heads, dim)
    key, value = (each[0].float() for each in own.expand_kv(latent, rotary))
    scores = query.transpose(0, 1).float() @ key.transpose(1, 2)
    # With scores of this size, rounding changes little; the module's own scale is taken as it is, and not tried.
    scale = 1.0 / max(float(scores.abs().max()), 1e-6)
    hidden = torch.ones(_TRIED, _TRIED, dtype=torch.bool, device=weight.device).triu(1)
    wanted = ((scores * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(0, 1)
    places = torch.arange(_TRIED, device=weight.device)
    step = StepMetadata(
        block_table=torch.tensor([[2, 1]], dtype=torch.int32, device=weight.device),
        slots=torch.zeros_like(places, dtype=torch.int32),
        positions=places,
        query_starts=torch.tensor([0, _TRIED], dtype=torch.int32, device=weight.device),
        rope_lengths=torch.zeros_like(places),
        ids=torch.zeros_like(places),
    )
    binding = LatentBinding(latent.new_zeros(3, 1, 8, sum(shape)), step)
    new = latent[0, 0, :, None], rotary[0, 0, :, None]
    call = AttentionCall(query, new, scale, CAUSAL, 0.0, None)
    for phase in (Phase.PREFILL, Phase.DECODE):
        step.phase = phase
        try:
            found = binding.attend(module, call).float()
            right = found.shape == wanted.shape
            error = float((found - wanted).abs().max()) if right else float("inf")
        except RuntimeError:  # sizes that do not fit
            error = float("inf")
        if not error <= _TOLERANCE.get(weight.dtype, 4e-2) * float(wanted.abs().max()):
            raise UnsupportedModelError(
                f"{name} does not expand its latents by kv_b_proj alone: attention to latents ({phase}) differs from "
                f"its own by {error:.2g}, of values up to {float(wanted.abs().max()):.2g}; run it with transformers' "
                "own generate()"
            )
