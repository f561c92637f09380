"""Adapters of a live PEFT model, merged for an engine: the model's own weights and modules stay as they are.

A twin gets a layer of its own where the owner has an adapter around one. Its weight is the sum, made in float32 and
cast once, in memory of its own; all other weights stay the owner's. Every call makes the sums anew, because what
training writes into an adapter cannot be seen from outside. Plain LoRA is added here, `W + scaling * B @ A`
(arXiv:2106.09685); peft's own code merges the other kinds, on a copy.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hybridgen.device.watched import has_forward_hooks
from hybridgen.errors import EngineError, described
from hybridgen.models.tree_copy import TreeCopy
from hybridgen.models.twin import Twin

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BASES = ("Linear", "Embedding", "Conv1D")
"""Layers with a weight that adapters are merged into; so are those that name a parameter of any layer, such as of
experts. Others run with their adapter as modules."""


def merge_live(twin: Twin[Any]) -> int:
    """Put a merged layer where a twin has one with an adapter; returns how many there are.

    Layers that cannot be merged keep their adapters as modules, as the owner runs them.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return 0
    count = 0
    inside: set[int] = set()
    """Modules in a layer that was replaced."""
    names: dict[int, list[str]] = {}
    for name, module in twin.model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for original, own in twin.modules:
        usable = isinstance(original, BaseTunerLayer) and id(own) in names and id(own) not in inside
        if not usable or not _can_merge(original):
            continue
        inside |= {id(module) for module in own.modules()}  # an adapter can be around another one
        place = _Merged(original)
        for name in names[id(own)]:
            twin.model.set_submodule(name, place.layer)
        twin.at_each_look(place.refresh)
        count += 1
    return count


def _can_merge(layer: Any) -> bool:
    base = layer.get_base_layer()
    if not (type(base).__name__ in _BASES or hasattr(layer, "parameter_name")) or _listened_to(layer):
        return False
    if any(parameter.dtype not in _FLOATS for parameter in base.parameters()):
        return False
    try:
        with torch.no_grad():
            merged(layer)
    except Exception:  # peft refuses kinds that work outside of the weight
        return False
    return True


def _listened_to(layer: Any) -> bool:
    """Whether somebody has hooks on forwards inside, or put another forward there."""
    return any(has_forward_hooks(module) or "forward" in vars(module) for module in layer.modules())


class _Merged:
    """A layer with the weights of another one and its adapter."""

    def __init__(self, original: Any) -> None:
        base = original.get_base_layer()
        self._original = original
        self.layer = TreeCopy().module(base)
        with torch.no_grad():
            changed = merged(original)
        parameters = dict(base.named_parameters(recurse=False))
        # Biases too, which are small: what the owner puts in their place is then seen.
        self._own = {name: nn.Parameter(torch.empty_like(parameters[name]), requires_grad=False) for name in changed}
        self._own |= {
            name: nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            for name, parameter in parameters.items()
            if parameter.dim() == 1
        }
        self.layer._parameters.update(self._own)
        self._shared = {name: each.data_ptr() for name, each in parameters.items() if name not in self._own}
        self.refresh()

    def refresh(self) -> None:
        """Make the sums anew.

        Raises:
            EngineError: the adapter cannot be merged any more, or somebody listens to a layer inside.
        """
        original, base = self._original, self._original.get_base_layer()
        if _listened_to(original):
            raise EngineError(
                f"a {type(original).__name__} with a merged adapter has forward hooks or another forward, which are "
                "not called; remove them, or load an engine with merge_adapters=False"
            )
        if any(base.get_parameter(name).data_ptr() != place for name, place in self._shared.items()):
            raise EngineError(
                f"weights of a {type(base).__name__} lie elsewhere now; close this engine and load a new one"
            )
        try:
            with torch.no_grad():
                values = merged(original)
                for name, own in self._own.items():
                    own.copy_(values.get(name, base.get_parameter(name)))
        except Exception as error:
            raise EngineError(
                f"the adapter of a {type(original).__name__} cannot be merged: {described(error)}; put it back, or "
                "load an engine with merge_adapters=False"
            ) from error


def merged(layer: Any) -> dict[str, Tensor]:
    """The parameters of a layer's base that its active adapters change, with them: float32 sums."""
    base = layer.get_base_layer()
    plain = _plain_lora(layer)
    if plain is not None:
        weight = base.weight.detach().float()
        for a, b, scaling in plain:
            weight = torch.addmm(weight, b.float(), a.float(), alpha=scaling)
        return {"weight": weight}
    whole, names = copy.deepcopy(layer).float(), []
    each = whole
    while hasattr(each, "get_base_layer"):  # an adapter can be around another one
        if each.disable_adapters:
            if each.merged:
                each.unmerge()
        elif not each.merged:
            each.merge(safe_merge=True)
        names.append(getattr(each, "parameter_name", "weight"))
        names += ["bias"] if any(getattr(each, "lora_bias", {}).values()) and base.bias is not None else []
        each = each.base_layer
    return {name: whole.get_base_layer().get_parameter(name) for name in names}


def _plain_lora(layer: Any) -> list[tuple[Tensor, Tensor, float]] | None:
    """(A, B, scaling) of each active adapter of a linear layer, none where they are off; None for another kind."""
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if kind != "peft.tuners.lora.layer.Linear" or type(layer.get_base_layer()) is not nn.Linear:
        return None
    if layer.merged or layer.fan_in_fan_out:
        return None
    if layer.disable_adapters:
        return []
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if any(name in layer.lora_variant or layer.lora_bias[name] for name in active):
        return None
    return [(layer.lora_A[n].weight, layer.lora_B[n].weight, float(layer.scaling[n])) for n in active]
