"""Finds the transformers model in what other packages wrap around one. None of them is imported."""

from __future__ import annotations

from typing import Any

from hybridgen.errors import ConfigError, UnsupportedModelError

_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
}
"""Wrappers by class name, and where they keep the model."""

_NOT_IN_THE_LAYERS = frozenset({"POLY", "XLORA"})
"""Kinds of PEFT adapters that run code around the model's forward."""


def unwrapped(model: Any) -> Any:
    """The model with adapters in it that a PEFT model is about; other objects as they are.

    Adapters such as LoRA are modules in the place of the model's projections, so that the model inside computes what
    the PEFT model does.

    Raises:
        UnsupportedModelError: the adapter is not in the model's layers.
        ConfigError: it is another wrapper; the message says how to give the model inside.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "PeftModel" in kinds:
        return _adapted(model)
    for kind, attribute in _INSIDE.items():
        if kind in kinds and hasattr(model, attribute):
            inside = type(getattr(model, attribute)).__name__
            raise ConfigError(f"the model is a {type(model).__name__} around a {inside}; give that: model.{attribute}")
    return model


def _adapted(model: Any) -> Any:
    config = getattr(model, "active_peft_config", None)
    kind = getattr(config, "peft_type", None)
    kind = str(getattr(kind, "value", kind))
    if getattr(config, "is_prompt_learning", False) or kind in _NOT_IN_THE_LAYERS:
        raise UnsupportedModelError(
            f"a PEFT adapter of type {kind} works outside of the model's layers; run it with its own generate(), or "
            "use an adapter that is in them, such as LoRA"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise UnsupportedModelError(
            "an activated LoRA adapter (alora_invocation_tokens) is switched on in the middle of a prompt; run it with "
            "its own generate(), or use a plain LoRA adapter"
        )
    return model.get_base_model()
