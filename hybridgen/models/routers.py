"""Routers of a mixture: how their modules choose experts is probed, and in decode the op `hybridgen::route` does it.

transformers has a module for it in most mixtures, with one weight [experts, hidden] and perhaps a bias, that is called
with states and gives logits, scores and ids. What happens in between differs: softmax of all logits or of the chosen
ones, divided by their sum or not, rounded or not. So a copy with small random weights is called, in float64 and in
bfloat16, and what comes out is compared with the op for each way that the op knows. A module that does something else
(groups of experts, corrections, sigmoids) keeps its own code.

As in `models.experts`, the module's class is changed, and prefill and mode `eager` run the module's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridgen.kernels.linear.experts_form import RouteForm
from hybridgen.kernels.linear.route import reference, route
from hybridgen.models.attention import Phase, StepMetadata

_FORMS = (RouteForm(True), RouteForm(False), RouteForm(False, True))
_TOLERANCE = 1e-6
"""Of the largest score, which is at most 1: softmax is in float32."""
_TOKENS = 24


class RouterModule(nn.Module):
    """What the class of every router is also, once it chooses by the op."""


class RouterBinding:
    """What a router needs beyond its inputs; an attribute of the module."""

    __slots__ = ("chosen", "form", "step")

    def __init__(self, form: RouteForm, chosen: int, step: StepMetadata) -> None:
        self.form, self.chosen, self.step = form, chosen, step


class RouterSite(NamedTuple):
    """A router that computes what the op does."""

    module: nn.Module
    form: RouteForm
    chosen: int


def find_routers(model: nn.Module) -> Iterator[RouterSite]:
    """The routers that the op can compute; modules of one kind are probed once."""
    known: dict[Any, tuple[RouteForm, int] | None] = {}
    for module in model.modules():
        if not _looks_like_one(module):
            continue
        plain = {name: repr(value) for name, value in vars(module).items() if isinstance(value, (int, float, str))}
        weight: Any = module.weight
        kind = _class_of(module), weight.shape, module._parameters.get("bias") is None, tuple(sorted(plain.items()))
        if kind not in known:
            known[kind] = probe(module)
        found = known[kind]
        if found is not None:
            yield RouterSite(module, *found)


def _looks_like_one(module: nn.Module) -> bool:
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    if isinstance(module, nn.Linear) or "weight" not in parameters or not parameters.keys() <= {"weight", "bias"}:
        return False
    weight, bias = parameters["weight"], parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.dim() != 2 or module._modules or _has_buffers(module):
        return False
    fits = bias is None or (
        type(bias) is nn.Parameter and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype
    )
    return fits and isinstance(getattr(module, "top_k", None), int) and "forward" not in vars(module)


def _has_buffers(module: nn.Module) -> bool:
    return any(value is not None for value in module._buffers.values())


def _class_of(module: nn.Module) -> Any:
    """The class that the module had before it got the op."""
    kind = type(module)
    return kind.__bases__[0] if issubclass(kind, RouterModule) else kind


@torch.no_grad()
def probe(module: nn.Module) -> tuple[RouteForm, int] | None:
    """How a router chooses, and how many; None where the op knows no such way."""
    own: Any = module
    experts, hidden = own.weight.shape
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x, weight = random(_TOKENS, hidden), random(experts, hidden) * hidden**-0.5
        bias = None if module._parameters.get("bias") is None else random(experts)
        exact, rounded = (_called(module, x, weight, bias, dtype) for dtype in (torch.float64, torch.bfloat16))
        if exact is None or rounded is None or rounded[1].dtype not in (torch.float32, torch.bfloat16):
            return None
        logits, scores, ids = exact
        chosen, wide = ids.shape[1], rounded[1].dtype is torch.float32
        for form in _FORMS:
            if form.chosen_only and wide:  # the same numbers, which would be rounded on their way
                continue
            wanted = reference(x, weight, bias, chosen, *form)
            same = torch.equal(ids, wanted[2]) and torch.allclose(logits, wanted[0])
            if same and float((scores - wanted[1]).abs().max()) < _TOLERANCE:
                return form._replace(wide=wide), chosen
    return None


def _called(
    module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What a router gives with other weights of a dtype; None where these are no logits, scores and ids."""
    small: nn.Module = object.__new__(_class_of(module))
    vars(small).update(vars(module))
    values = {"weight": weight, "bias": bias}
    small._parameters = {
        name: None if value is None else nn.Parameter(value.to(dtype), requires_grad=False)
        for name, value in ((name, values.get(name)) for name in module._parameters)
    }
    try:
        found = _class_of(module).forward(small, x.to(dtype))
    except Exception:  # whatever a module's own code raises: it takes other arguments
        return None
    if not isinstance(found, tuple) or len(found) != 3 or not all(isinstance(each, Tensor) for each in found):
        return None
    logits, scores, ids = found
    fits = logits.shape == (len(x), len(weight)) and scores.shape == ids.shape and ids.dim() == 2
    if not fits or ids.shape[0] != len(x) or ids.dtype is not torch.int64 or logits.dtype is not dtype:
        return None
    return logits, scores, ids


def use_route(site: RouterSite) -> None:
    """From now on the module chooses by the op in decode; `RouterBinding` has to be there when it is called."""
    site.module.__class__ = _with_op(_class_of(site.module))


def use_own_choice(site: RouterSite) -> None:
    """Undo `use_route`."""
    site.module.__class__ = _class_of(site.module)


@functools.cache
def _with_op(kind: Any) -> type[nn.Module]:
    own: Callable[..., Any] = kind.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        binding: RouterBinding = self._hybridgen
        if binding.step.phase is not Phase.DECODE or args or kwargs:
            return own(self, hidden_states, *args, **kwargs)
        rows = hidden_states.reshape(-1, self.weight.shape[1])
        return route(rows, self.weight, self.bias if "bias" in self._parameters else None, binding.chosen, binding.form)

    # What is compiled is kept with its classes' names, by which another process finds them here, once it has bound.
    title = f"{kind.__module__}.{kind.__qualname__}".replace(".", "_")
    made = type(title, (kind, RouterModule), {"forward": forward, "__module__": __name__})
    globals()[title] = made
    return made
