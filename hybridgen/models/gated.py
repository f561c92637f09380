"""MLPs whose gate and up are one op in prefill: `hybridgen::gated_rows`, which writes neither product.

What such a module does is known by the attribute names that Hugging Face's families share, and proved for each module:
its own forward makes the same of random rows. Such a module's class gets a subclass with a forward of ours for prefill;
in decode its own forward runs. Whether the op is used is tried for each size of weight: its kernel has to give what
cuBLAS gives, in less time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridgen.device.failures import is_fatal
from hybridgen.device.timing import event_seconds
from hybridgen.device.watched import has_hooks, is_unheard
from hybridgen.errors import described
from hybridgen.kernels.linear.gated import LEAST_ROWS, by_cublas, gated_rows, has_kernel
from hybridgen.models.attention import StepMetadata
from hybridgen.models.binding import BoundModel
from hybridgen.models.few_rows import RowsBinding
from hybridgen.models.measured import Measured
from hybridgen.models.projections import FusedHead, FusedTail
from hybridgen.models.swapped import made_class

logger = logging.getLogger(__name__)

_SILU = ("SiLU", "SiLUActivation")
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the norm of each row's results, by dtype."""
_PART = 1024
"""Rows that are compared at once."""
_CHECKED = 7
"""Rows that a module is checked on; the kernel gets more."""


class GatedMlp(nn.Module):
    """A base of MLP modules that `use_gated_op()` changed."""


class Used(NamedTuple):
    """What the trials of an op chose."""

    modules: int = 0
    """That run it."""
    slower: tuple[str, ...] = ()
    """For each size of weight whose trial found it right and not faster: both times."""


class _Problem(NamedTuple):
    """Why the op is not used for a weight."""

    why: str
    measured: bool = False
    """It is right, and takes as long as cuBLAS or longer."""


def use_gated_op(
    bound: BoundModel,
    step: StepMetadata,
    rows: int,
    fall_back: Callable[[str], None],
    measured: Measured | None = None,
) -> Used:
    """From now on MLPs for which that is proved run gate and up as one op in prefill.

    Args:
        rows: tokens of the largest prefill, for which it is timed; the op's kernel is for `LEAST_ROWS` and more.
        fall_back: told of a weight that the op serves and gets wrong. One that cuBLAS multiplies faster is no fallback.
        measured: what earlier trials chose. The op is compared with cuBLAS all the same, but not timed again.
    """
    measured = Measured() if measured is None else measured
    if rows < LEAST_ROWS:
        return Used()
    tried: dict[Any, _Problem | None] = {}
    count = 0
    for module in _candidates(bound):
        weight = module.gate_proj.fused_weight
        if not has_kernel(weight):
            continue
        key = weight.shape, weight.dtype, weight.device
        if key not in tried:
            problem = tried[key] = _problem(weight, rows, measured)
            if problem is not None and not problem.measured:
                fall_back(f"gate and up of prefill are left to cuBLAS: {problem.why}")
        if tried[key] is not None:
            continue
        why = _difference(module)
        if why is None:
            module._hybridgen = RowsBinding(step)
            count += 1
        else:
            logger.debug("%s gates by itself: %s", type(module).__name__, why)
    allow_gated_op(bound, is_unheard)
    return Used(count, tuple(each.why for each in tried.values() if each is not None and each.measured))


def make_gated_classes(bound: BoundModel) -> None:
    """Make the classes that `use_gated_op()` may give modules: what is compiled is kept with them, and loaded first."""
    for module in _candidates(bound):
        kind: Any = type(module)
        _gating(kind, kind.forward)


def allow_gated_op(bound: BoundModel, allowed: Callable[[nn.Module], bool]) -> None:
    """Which of the modules that were proved run so: none that somebody listens to, whose parts are not called."""
    for module in bound.model.modules():
        kind: Any = type(module)
        if not isinstance(vars(module).get("_hybridgen"), RowsBinding) or not _looks_gated(module):
            continue
        fits = allowed(module)
        if issubclass(kind, GatedMlp) is not fits:
            module.__class__ = _gating(kind, kind.forward) if fits else kind.__bases__[0]


def use_own_gate(bound: BoundModel) -> None:
    """Undo `use_gated_op()`."""
    allow_gated_op(bound, lambda _: False)
    for module in bound.model.modules():
        if _looks_gated(module):
            vars(module).pop("_hybridgen", None)


def _looks_gated(module: nn.Module) -> bool:
    gate, up = (getattr(module, name, None) for name in ("gate_proj", "up_proj"))
    return type(gate) is FusedHead and type(up) is FusedTail and gate.fused_members == (gate, up)


def _candidates(bound: BoundModel) -> Iterator[Any]:
    """MLPs with a joined gate and up, without biases, that nobody listens to."""
    for module in bound.model.modules():
        own: Any = module
        if not _looks_gated(module) or own.gate_proj.fused_bias is not None or "_hybridgen" in vars(module):
            continue
        if type(getattr(module, "act_fn", None)).__name__ not in _SILU or not hasattr(module, "down_proj"):
            continue
        if not any("forward" in vars(inner) or has_hooks(inner) for inner in module.modules()):
            yield own


def _gated(module: Any, hidden: Tensor) -> Tensor:
    rows = gated_rows(hidden.reshape(-1, hidden.shape[-1]), module.gate_proj.fused_weight)
    found: Tensor = module.down_proj(rows.view(*hidden.shape[:-1], rows.shape[-1]))
    return found


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, in prefill with one op up to what goes down."""
    if kwargs or len(args) != 1 or self._hybridgen.decodes:
        return self._hybridgen_forward(*args, **kwargs)
    return _gated(self, args[0])


@functools.cache
def _gating(kind: Any, forward: Any) -> Any:
    return made_class(kind, GatedMlp, {"forward": _forward, "_hybridgen_forward": forward}, globals())


def _random(rows: int, weight: Tensor) -> Tensor:
    generator = torch.Generator(weight.device).manual_seed(rows)
    return torch.randn(rows, weight.shape[1], generator=generator, device=weight.device, dtype=weight.dtype)


@torch.inference_mode()
def _difference(module: Any) -> str | None:
    """Why a module's own forward is not that of ours; None if it is."""
    weight = module.gate_proj.fused_weight
    hidden = _random(_CHECKED, weight)[None]
    try:
        own = module(hidden)
        if not isinstance(own, Tensor) or not _close(_gated(module, hidden), own):
            return "it computes something else"
    except Exception as error:  # any model code runs here, and a model that stays as it was still works
        return described(error)
    return None


@torch.inference_mode()
def _problem(weight: Tensor, rows: int, measured: Measured) -> _Problem | None:
    """Why the op is not used for a weight; None where it is."""
    try:
        for count in (LEAST_ROWS + 1, rows):
            x = _random(count, weight)
            if not _close(gated_rows(x, weight), by_cublas(x, weight)):
                return _Problem(f"of {count} random rows our kernel's results are other ones")
        slower = measured.slower(
            f"gate and up: {tuple(weight.shape)} {weight.dtype} {rows}", partial(_slower, x, weight)
        )
    except Exception as error:  # what compiles and launches can raise much
        if is_fatal(error):
            raise
        return _Problem(f"our kernel failed: {described(error)}")
    return None if slower is None else _Problem(slower, True)


def _slower(x: Tensor, weight: Tensor) -> str | None:
    ours, cublas = (median(event_seconds(partial(call, x, weight), 5)) for call in (gated_rows, by_cublas))
    if ours < cublas:
        return None
    return f"{len(x)} rows take our kernel {ours * 1e6:.0f} us, and cuBLAS {cublas * 1e6:.0f}"


def _close(ours: Tensor, own: Tensor) -> bool:
    """Whether each row is near; some rows at a time, as float32 takes room."""
    if ours.shape != own.shape:
        return False
    tolerance = _TOLERANCE.get(own.dtype, 2e-2)
    for first, second in zip(ours.split(_PART, -2), own.split(_PART, -2), strict=True):
        error, size = (first.float() - second.float()).norm(dim=-1), second.float().norm(dim=-1)
        if not bool((error <= tolerance * size + 1e-30).all()):
            return False
    return True
