"""What a model computes before its layers and behind them, in one kernel each in decode: rotary tables, the last norm.

Neither is compiled with a layer, and by their own code they are eight kernels each. The rotary table of all positions
is made once, by the module's own code, and a step looks its rows up; the norm is torch's own operator. Both are
compared with what the modules give. Their classes are changed, and prefill runs their own code.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridgen.device.failures import is_fatal
from hybridgen.device.watched import has_hooks, is_unheard
from hybridgen.errors import HybridgenError, described
from hybridgen.models.attention import Phase, StepMetadata
from hybridgen.models.binding import BoundModel
from hybridgen.models.decoder import Unfit, norm_of
from hybridgen.models.swapped import made_class

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the norm of each row's results, by dtype."""
_TABLE = "rotary table"
_MOST_BYTES = 32 * 2**20
"""Of a rotary table."""
_BEHIND = 1024
"""Positions behind the context that it has, too: drafts may go there."""


class EndModule(nn.Module):
    """A base of modules that `use_short_ends()` changed."""


class NormBinding:
    """What the forward of ours knows of a norm; an attribute of the module."""

    __slots__ = ("eps", "shift", "step")

    def __init__(self, step: StepMetadata, eps: float, shift: float) -> None:
        self.step, self.eps, self.shift = step, eps, shift


class RotaryBinding:
    """What the forward of ours knows of rotary embeddings; an attribute of the module."""

    __slots__ = ("step", "table", "version")

    def __init__(self, step: StepMetadata, table: Tensor, version: Any) -> None:
        """
        Args:
            table: [positions, 2 R]: cosines and sines.
            version: of what it was made of.
        """
        self.step, self.table, self.version = step, table, version


@torch.inference_mode()
def use_short_ends(bound: BoundModel, step: StepMetadata, max_context: int) -> int:
    """From now on the modules for which that is right run in one kernel in decode; returns how many these are."""
    count = 0
    for read in (_read_norm, _read_rotary):
        try:
            module, binding = read(bound, step, max_context)
        except (Unfit, HybridgenError) as reason:
            logger.debug("an end of the model stays as it is: %s", reason)
            continue
        except Exception as error:  # any model code runs here, and a model that stays as it was still works
            if is_fatal(error):
                raise
            logger.debug("an end of the model stays as it is: %s", described(error), exc_info=True)
            continue
        module._hybridgen = binding  # type: ignore[assignment]
        if isinstance(binding, RotaryBinding):
            bound.tables[_TABLE] = binding.table
        count += 1
    allow_short_ends(bound, is_unheard)
    return count


def allow_short_ends(bound: BoundModel, allowed: Callable[[nn.Module], bool]) -> None:
    """Which of the modules that were found right run so: none that somebody listens to, or whose table was made of
    something that has changed."""
    for module in bound.around:
        binding, kind = vars(module).get("_hybridgen"), type(module)
        if not isinstance(binding, (NormBinding, RotaryBinding)):
            continue
        fits = allowed(module) and not (isinstance(binding, RotaryBinding) and binding.version != _version(module))
        if issubclass(kind, EndModule) is not fits:
            make: Any = _norm if isinstance(binding, NormBinding) else _rotary
            module.__class__ = make(kind) if fits else kind.__bases__[0]


def use_own_ends(bound: BoundModel) -> None:
    """Undo `use_short_ends()`."""
    allow_short_ends(bound, lambda _: False)
    bound.tables.pop(_TABLE, None)
    for module in bound.around:
        if isinstance(vars(module).get("_hybridgen"), (NormBinding, RotaryBinding)):
            del module._hybridgen


def _check(module: nn.Module) -> None:
    if "forward" in vars(module) or has_hooks(module):
        raise Unfit("it has hooks or a replaced forward")


def _read_norm(bound: BoundModel, step: StepMetadata, _: int) -> tuple[nn.Module, NormBinding]:
    """The last norm.

    Raises:
        Unfit: it computes something else.
        HybridgenError: there is none.
    """
    module: Any = bound.final_norm
    _check(module)
    weight = module.weight
    found = norm_of(module, weight.shape[0])
    binding = NormBinding(step, found.eps, found.shift)
    sizes = torch.tensor([[1e-3], [1.0], [30.0], [3e3]], device=weight.device)
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(4, weight.shape[0], generator=g).to(weight.device) * sizes).to(weight.dtype)
    ours, own = _normed(x, weight, binding).float(), module(x).float()
    tolerance = _TOLERANCE.get(weight.dtype, 2e-2)
    if ours.shape != own.shape or not bool(((ours - own).norm(dim=-1) <= tolerance * own.norm(dim=-1)).all()):
        raise Unfit("it normalises in another way")
    return module, binding


def _normed(x: Tensor, weight: Tensor, binding: NormBinding) -> Tensor:
    return F.rms_norm(x, weight.shape, weight + binding.shift if binding.shift else weight, binding.eps)


def _version(module: nn.Module) -> Any:
    """Changes when a table has to be made again."""
    buffers = [tensor for tensor in module._buffers.values() if tensor is not None]
    # Inference tensors count no versions, and nobody writes to those of a model that the engine has loaded.
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in buffers]


def _read_rotary(bound: BoundModel, step: StepMetadata, max_context: int) -> tuple[nn.Module, RotaryBinding]:
    """The rotary embeddings, if they go by each token's position alone.

    Raises:
        Unfit: they do not.
    """
    module: Any = getattr(bound.model.get_decoder(), "rotary_emb", None)
    if not isinstance(module, nn.Module) or bound.length_dependent or "inv_freq" not in module._buffers:
        raise Unfit("its rotary embeddings are of another kind")
    _check(module)
    frequencies: Any = module.inv_freq
    x = torch.zeros(1, 1, 1, dtype=bound.model.dtype, device=frequencies.device)
    every = torch.arange(max_context + _BEHIND, device=x.device)

    def own(positions: Tensor) -> Tensor:
        found = module(x, positions[None])
        if not isinstance(found, tuple) or len(found) != 2 or any(each.dim() != 3 for each in found):
            raise Unfit("its rotary embeddings are of another kind")
        cos, sin = found
        if cos.shape != sin.shape or cos.shape[:2] != (1, len(positions)) or cos.dtype != sin.dtype:
            raise Unfit("its rotary embeddings are of another kind")
        return torch.cat((cos[0], sin[0]), -1)

    some = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:7].to(x.device)]
    few = own(some)
    if few.shape[1] * few.element_size() * len(every) > _MOST_BYTES:
        raise Unfit("its rotary table is too large")
    table = own(every)
    if not torch.equal(table[some], few) or not torch.equal(own(some[:1]), few[:1]):
        raise Unfit("its rotary embeddings go by more than positions")
    return module, RotaryBinding(step, table, _version(module))


@functools.cache
def _norm(kind: Any) -> Any:
    own = kind.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        binding: NormBinding = self._hybridgen
        if binding.step.phase is not Phase.DECODE or args or kwargs:
            return own(self, hidden_states, *args, **kwargs)
        return _normed(hidden_states, self.weight, binding)

    return made_class(kind, EndModule, {"forward": forward, "_hybridgen_forward": own}, globals())


@functools.cache
def _rotary(kind: Any) -> Any:
    own = kind.forward

    def forward(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        binding: RotaryBinding = self._hybridgen
        # Models of images hand over three positions of each token (Qwen3.5), and what is not a step may have more rows.
        usual = position_ids.dim() == 2 and position_ids.shape[0] == 1 and x.dtype == binding.table.dtype
        if binding.step.phase is not Phase.DECODE or args or kwargs or not usual:
            return own(self, x, position_ids, *args, **kwargs)
        rows = binding.table.index_select(0, position_ids[0])[None]
        return rows.chunk(2, -1)

    return made_class(kind, EndModule, {"forward": forward, "_hybridgen_forward": own}, globals())
