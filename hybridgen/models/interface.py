"""The attention function that a model's modules look up by name in transformers' `AttentionInterface`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridgen.errors import UnsupportedModelError


class AttentionNames:
    """The names that a module tree's configs hold, to be changed and put back.

    Each config is changed by itself: `set_attn_implementation` reaches the configs of models and their sub-configs,
    but not those of layers that were copied with `copy.deepcopy`.
    """

    def __init__(self, model: nn.Module) -> None:
        configs = {id(config): config for module in model.modules() for config in configs_of(module)}
        self._previous = [(config, config._attn_implementation) for config in configs.values()]

    def set(self, name: str) -> None:
        """Give all of them one name."""
        for config, _ in self._previous:
            _set_name(config, name)

    def restore(self) -> None:
        """Give each the name that it had."""
        for config, name in self._previous:
            _set_name(config, name)


def _set_name(config: PreTrainedConfig, name: str | None) -> None:
    # Not by the property, whose setter overwrites the names of sub-configs, too.
    config._attn_implementation_internal = name


def configs_of(module: nn.Module) -> list[PreTrainedConfig]:
    """A module's config and those inside of it, by which a multimodal model makes its decoder's masks."""
    found = [getattr(module, "config", None)]
    for config in found:
        if isinstance(config, PreTrainedConfig):
            found += [inner for inner in vars(config).values() if isinstance(inner, PreTrainedConfig)]
    return [config for config in found if isinstance(config, PreTrainedConfig)]


def check_functions(modules: Iterable[nn.Module]) -> None:
    """Raise if an attention module attends by a function, or with a mask function, that is not transformers' own.

    Raises:
        UnsupportedModelError: it does, and hybridgen's attention would silently compute something else.
    """
    for module in modules:
        name = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
        names: dict[str, Any] = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
        interface = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        function = interface.get(name, names.get("eager_attention_forward") if name == "eager" else None)
        home = type(module).__module__
        if function is not None and not _is_own(function, home):
            raise UnsupportedModelError(
                f"its attention function {name!r} is not one of transformers' own but {_shown(function)}; hybridgen "
                "would put its own attention in that one's place. Call set_attn_implementation('sdpa') first, if "
                "that computes what you want"
            )
        mask = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
        if function is None or mask is None or not _is_own(mask, home):
            what = f"is {_shown(mask)}" if mask is not None else "is missing"
            raise UnsupportedModelError(
                f"the mask function of its attention {name!r} {what}, not one of transformers' own; hybridgen would "
                "ignore it. Call set_attn_implementation('sdpa') first, if that computes what you want"
            )


def _is_own(function: Callable[..., Any], home: str) -> bool:
    """Whether a function comes with transformers, or with the code of the attention module itself."""
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] == "transformers" or module == home


def _shown(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None)}.{name}"
