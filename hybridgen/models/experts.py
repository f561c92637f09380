"""Experts of a mixture: how their modules compute is probed, and in decode the op `hybridgen::experts` does it.

transformers keeps the projections of a layer's experts in two tensors, `gate_up_proj` and `down_proj`, and calls their
module with states, ids and weights. What happens in between differs: the activation, whether gate and up take turns,
biases, which dimension is which. So a copy of the module with small random weights is called, in float64, and what
comes out is compared with the op for each way that the op knows. A module that does something else keeps its own code.

The module's class is changed, not its `forward` attribute, so that layers of a kind still share a compiled graph.
Prefill and mode `eager`, the reference, run the module's own code.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridgen.kernels.linear.experts import experts
from hybridgen.kernels.linear.experts_form import ACTIVATIONS, Form, Projection
from hybridgen.models.attention import Phase, StepMetadata
from hybridgen.models.swapped import give_back, made_class

_BIASES = ("gate_up_proj_bias", "down_proj_bias")
_ALPHA, _LIMIT = "alpha", "limit"
"""Attributes of modules whose activation is clamped."""
_TOLERANCE = 1e-6
"""Of the largest result. In float64 the right way differs by 1e-15, or 1e-7 where a module's code goes through float32;
exact and approximate GELU differ by 1e-4."""
_HIDDEN, _WIDTH = 10, 6
"""Sizes of the copy that is probed; no number of theirs is the other's double."""
_TOKENS = 24


class ExpertsModule(nn.Module):
    """What the class of every module of experts is also, once it computes by the op."""


class ExpertsBinding:
    """What a module of experts needs beyond its inputs; an attribute of the module."""

    __slots__ = ("form", "step")

    def __init__(self, form: Form, step: StepMetadata) -> None:
        self.form, self.step = form, step


class ExpertsSite(NamedTuple):
    """A module of experts that computes what the op does."""

    module: nn.Module
    form: Form


class Sizes(NamedTuple):
    """Of a module of experts."""

    experts: int
    hidden: int
    width: int
    transposed: bool


def find_experts(model: nn.Module) -> Iterator[ExpertsSite]:
    """The modules of experts that the op can compute; modules of one kind are probed once."""
    known: dict[Any, Form | None] = {}
    for module in model.modules():
        sizes = sizes_of(module)
        if sizes is None:
            continue
        kind = _class_of(module), sizes, _numbers(module)
        if kind not in known:
            known[kind] = probe(module)
        form = known[kind]
        if form is not None:
            yield ExpertsSite(module, form)


def _class_of(module: nn.Module) -> Any:
    """The class that the module had before it got the op."""
    kind = type(module)
    return kind.__bases__[0] if issubclass(kind, ExpertsModule) else kind


def _numbers(module: nn.Module) -> tuple[Any, ...]:
    """What may tell modules of one class apart: their numbers and functions."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
    functions = [type(child) for child in module.children()]
    return tuple(sorted((name, repr(value)) for name, value in plain.items())), tuple(functions)


def sizes_of(module: nn.Module) -> Sizes | None:
    """The sizes of a module whose only parameters are those of experts; None for other modules."""
    parameters = module._parameters
    names = {name for name, value in parameters.items() if value is not None}
    if not {"gate_up_proj", "down_proj"} <= names or names - {"gate_up_proj", "down_proj", *_BIASES}:
        return None
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    if gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3 or "forward" in vars(module):
        return None
    if type(gate_up) is not nn.Parameter or type(down) is not nn.Parameter or gate_up.dtype != down.dtype:
        return None
    count, first, second = gate_up.shape
    if down.shape[0] != count:
        return None
    if (first, second) == (2 * down.shape[2], down.shape[1]):
        sizes = Sizes(count, second, first // 2, False)
    elif (first, second) == (down.shape[2], 2 * down.shape[1]):
        sizes = Sizes(count, first, second // 2, True)
    else:
        return None
    biases = [parameters.get(name) for name in _BIASES]
    wanted = (count, 2 * sizes.width), (count, sizes.hidden)
    fits = all(b is None or tuple(b.shape) == shape for b, shape in zip(biases, wanted, strict=True))
    return sizes if fits else None


@torch.no_grad()
def probe(module: nn.Module) -> Form | None:
    """How a module of experts computes; None where the op knows no such way."""
    sizes = sizes_of(module)
    if sizes is None:
        return None
    with torch.device("cpu"):
        try:
            small, (x, ids, weights) = _small(module, sizes)
            result = _class_of(module).forward(small, x, ids, weights)
            gate_up, down = projections_of(small)
        except Exception:  # whatever a module's own code raises: it takes other arguments, or has other sizes
            return None
        best, least = None, _TOLERANCE
        for form in _ways(module, sizes.transposed):
            guess = experts(x, ids, weights, gate_up, down, form)
            if not isinstance(result, Tensor) or result.shape != guess.shape:
                return None
            error = float((result - guess).abs().max() / guess.abs().max())
            if error < least:
                best, least = form, error
    return best


def _ways(module: nn.Module, transposed: bool) -> Iterator[Form]:
    alpha, limit = (getattr(module, name, None) for name in (_ALPHA, _LIMIT))
    clamped = isinstance(alpha, float) and isinstance(limit, float)
    for interleaved in (False, True):
        for activation in ACTIVATIONS:
            if activation != "clamped":
                yield Form(activation, interleaved, transposed)
            elif clamped:
                yield Form(activation, interleaved, transposed, alpha, limit)  # type: ignore[arg-type]


def _small(module: nn.Module, sizes: Sizes) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """A copy of a module with few and random weights in float64, and what to call it with."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64), requires_grad=False)

    count, wide = sizes.experts, 2 * _WIDTH
    shapes = {
        "gate_up_proj": (count, _HIDDEN, wide) if sizes.transposed else (count, wide, _HIDDEN),
        "down_proj": (count, _WIDTH, _HIDDEN) if sizes.transposed else (count, _HIDDEN, _WIDTH),
        "gate_up_proj_bias": (count, wide),
        "down_proj_bias": (count, _HIDDEN),
    }
    small: nn.Module = object.__new__(_class_of(module))
    vars(small).update(vars(module))
    small._parameters = {
        name: None if value is None else random(*shapes[name]) for name, value in module._parameters.items()
    }
    scaled = {sizes.hidden: _HIDDEN, sizes.width: _WIDTH, 2 * sizes.width: wide}
    for name, value in vars(module).items():
        # Sizes that it goes by, but for the number of its experts.
        if type(value) is int and value in scaled and "expert" not in name:
            vars(small)[name] = scaled[value]
    config = vars(module).get("config")
    if config is not None:
        vars(small)["config"] = config = copy.copy(config)
        if hasattr(config, "_experts_implementation_internal"):  # else its property changes shared configs
            config._experts_implementation_internal = "eager"
        else:
            config._experts_implementation = "eager"
    chosen = min(2, count)
    # Small states and large ones, so that clamps and both ends of activations are met.
    x = random(_TOKENS, _HIDDEN) * torch.logspace(-1, 1, _TOKENS, dtype=torch.float64)[:, None]
    ids = torch.stack([torch.randperm(count, generator=generator)[:chosen] for _ in range(_TOKENS)])
    weights = torch.rand(_TOKENS, chosen, generator=generator, dtype=torch.float64)
    return small, (x, ids, weights)


def projections_of(module: nn.Module) -> tuple[Projection, Projection]:
    """The projections of a module of experts."""
    parts: Any = module
    gate_up_bias, down_bias = (getattr(module, name, None) for name in _BIASES)
    gate_up = Projection(parts.gate_up_proj, bias=gate_up_bias)
    return gate_up, Projection(parts.down_proj, bias=down_bias)


def use_op(site: ExpertsSite) -> None:
    """From now on the module decodes by the op; `ExpertsBinding` has to be there when it is called."""
    site.module.__class__ = _with_op(_class_of(site.module))


def use_own_code(site: ExpertsSite) -> None:
    """Undo `use_op`."""
    give_back(site.module, ExpertsModule)


@functools.cache
def _with_op(kind: Any) -> Any:
    own: Callable[..., Tensor] = kind.forward
    names = list(inspect.signature(own).parameters)[1:4]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        binding: ExpertsBinding = self._hybridgen
        if binding.step.phase is not Phase.DECODE:
            return own(self, *args, **kwargs)
        x, ids, weights = (*args, *(kwargs[name] for name in names[len(args) :]))
        return experts(x, ids, weights, *projections_of(self), binding.form)

    return made_class(kind, ExpertsModule, {"forward": forward}, globals())
