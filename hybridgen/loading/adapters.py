"""Adapters of PEFT merged into a model's weights, and taken out again: the extra `lora`.

Plain LoRA (arXiv:2106.09685, and rsLoRA, arXiv:2312.03732) is read from the adapter's file and added here. Other kinds
are merged by peft's own code, one module at a time, on a copy, so that whatever it can merge is merged as it does it
(DoRA, arXiv:2402.09353). Both in float32; the sum is cast once and written where the weight lies, which is where
compiled and recorded steps read it. The weight from before is kept, so that another adapter begins from it, and no
adapter leaves a trace.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybridgen.errors import ConfigError, UnsupportedModelError, described, shown
from hybridgen.models.text_part import TextPart
from hybridgen.models.tree_copy import TreeCopy

_OUTSIDE = frozenset({"POLY", "XLORA"})
"""Kinds that run code around the model's forward."""
_UNDERSTOOD = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
        "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "peft_type",
        "peft_version", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
"""Fields of a LoRA config that plain LoRA may have set: they choose modules, are for training, or make the scaling."""


def _peft() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("adapters need peft; pip install 'hybridgen[lora]'") from error
    return peft


def check_adapter(adapter: Any) -> str:
    """The adapter's path or hub id as text; checked as far as it takes no model.

    Raises:
        ConfigError: it is no path or id, cannot be read, or peft is not installed.
        UnsupportedModelError: it cannot be merged into weights.
    """
    if not isinstance(adapter, (str, os.PathLike)):
        raise ConfigError(f"adapter={shown(adapter)}; give a directory or hub id of a PEFT adapter, or None")
    name = os.fspath(adapter)
    peft = _peft()
    try:
        config = peft.PeftConfig.from_pretrained(name)
    except Exception as error:  # of peft, the hub and the file system
        raise ConfigError(f"adapter={shown(name)} cannot be read: {described(error)}") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or kind in _OUTSIDE or getattr(config, "alora_invocation_tokens", None):
        raise UnsupportedModelError(f"an adapter of type {kind} that works outside of the weights cannot be merged")
    if getattr(config, "bias", "none") != "none":
        raise UnsupportedModelError(
            f"an adapter with bias={config.bias!r} changes more than it merges; train it with bias='none'"
        )
    return name


def _room_for(weight: Tensor) -> Tensor:
    """Where a weight is kept."""
    size = weight.numel() * weight.element_size()
    if weight.is_cuda and torch.cuda.mem_get_info(weight.device)[0] > max(2**33, 4 * size):
        return torch.empty_like(weight)
    return torch.empty(weight.shape, dtype=weight.dtype, device="cpu", pin_memory=weight.is_cuda)


class Adapters:
    """The adapter of one model that nobody else has."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Tensor] = {}
        """Weights as they were before any adapter, by name; of those that one has touched. On the device where it has
        8 GiB to spare, else on the host."""
        self._touched: set[str] = set()
        """Those that the present adapter changed."""
        self.current: str | None = None

    def set(self, adapter: str | None) -> None:
        """Take the present adapter out, and merge another one; None: none.

        Raises:
            ConfigError: it does not fit the model; the model is then without an adapter.
            UnsupportedModelError: it changes a weight that is tied to one that it leaves.
        """
        self._take_out()
        if adapter is None:
            return
        try:
            with torch.no_grad():
                for name, value in self._merged(adapter):
                    weight = self._model.get_parameter(name)
                    self._check_tie(name)
                    if name not in self._kept:
                        self._kept[name] = _room_for(weight).copy_(weight.detach())
                    self._touched.add(name)
                    weight.copy_(value)
        except BaseException:
            self._take_out()
            raise
        self.current = adapter

    def _take_out(self) -> None:
        with torch.no_grad():
            for name in self._touched:
                self._model.get_parameter(name).copy_(self._kept[name], non_blocking=True)
        self._touched.clear()
        self.current = None

    def _merged(self, adapter: str) -> Iterator[tuple[str, Tensor]]:
        """The weights that an adapter changes, one by one, with their names, in the model's dtype."""
        plain = self._plain(adapter)
        if plain is not None:
            for name, (a, b, scaling) in plain.items():
                weight = self._model.get_parameter(name)
                factors = (each.to(weight.device, torch.float32) for each in (b, a))
                yield name, torch.addmm(weight.float(), *factors, alpha=scaling).to(weight.dtype)
            return
        peft = _peft()
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        # A tree of its own over the same weights: peft puts its modules there.
        whole = self._model.whole if isinstance(self._model, TextPart) else self._model
        tree: Any = TreeCopy().module(whole)
        grads = {name: parameter.requires_grad for name, parameter in self._model.named_parameters()}
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        try:
            with_adapter = peft.PeftModel.from_pretrained(tree, adapter, is_trainable=False)
        except Exception as error:  # peft says what it misses in the model
            raise ConfigError(f"adapter={shown(adapter)} does not fit the model: {described(error)}") from error
        finally:
            for name, parameter in self._model.named_parameters():
                parameter.requires_grad_(grads[name])
        for module in with_adapter.modules():
            if isinstance(module, BaseTunerLayer):
                base = module.get_base_layer()
                layer = copy.deepcopy(module).float()
                layer.merge(safe_merge=True)
                changed = layer.get_base_layer()
            elif isinstance(module, ModulesToSaveWrapper):
                base, changed = module.original_module, module.modules_to_save[with_adapter.active_adapter]
            else:
                continue
            for before, after in zip(base.parameters(), changed.parameters(), strict=True):
                value = after.detach().to(before.dtype)
                if id(before) in names and not torch.equal(value, before):
                    yield names[id(before)], value

    def _plain(self, adapter: str) -> dict[str, tuple[Tensor, Tensor, float]] | None:
        """Of plain LoRA (A, B, scaling) by the name of the weight; None for other kinds, and where it does not fit."""
        peft = _peft()
        from peft.utils.other import get_pattern_key
        from peft.utils.save_and_load import load_peft_weights

        config = peft.PeftConfig.from_pretrained(adapter)
        if type(config) is not peft.LoraConfig:
            return None
        usual = peft.LoraConfig().to_dict()
        if any(value != usual.get(name) for name, value in config.to_dict().items() if name not in _UNDERSTOOD):
            return None
        whole: Any = self._model.whole if isinstance(self._model, TextPart) else self._model
        modules = dict(whole.named_modules())
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_peft_weights(adapter, device="cpu").items():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
            if match is None:
                return None
            found.setdefault(match[1], {})[match[2]] = tensor
        result: dict[str, tuple[Tensor, Tensor, float]] = {}
        for name, pair in found.items():
            module = modules.get(name)
            if not isinstance(module, nn.Linear) or pair.keys() != {"A", "B"} or id(module.weight) not in names:
                return None
            a, b = pair["A"], pair["B"]
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
            outputs, inputs = module.weight.shape
            if tuple(a.shape) != (rank, inputs) or tuple(b.shape) != (outputs, rank):
                return None
            result[names[id(module.weight)]] = a, b, alpha / (math.sqrt(rank) if config.use_rslora else rank)
        return result

    def _check_tie(self, name: str) -> None:
        """Refuse to change a weight that another module has too, and would get what is not meant for it."""
        weight = self._model.get_parameter(name)
        tied = [
            f"{owner}.{own}"
            for owner, module in self._model.named_modules()
            for own, parameter in module._parameters.items()
            if parameter is weight and f"{owner}.{own}" != name
        ]
        if tied:
            raise UnsupportedModelError(
                f"the adapter changes {name}, which is tied to {tied[0]}; merge it with peft and save the model untied"
            )
