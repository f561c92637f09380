"""How many positions a model's rotary scaling is made for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

SCALED = ("linear", "dynamic", "yarn", "llama3", "longrope")


def scaled_context(config: PreTrainedConfig, limit: int) -> int:
    """The most positions that a model is made for: its limit, or the original length times the scaling's factor.

    Checkpoints differ in what `max_position_embeddings` says of a scaled model: the original length, or the length
    that the scaling already made of it. The larger of the limit and original x factor is right for both. Where no
    original length is stated, the limit is the original, as in transformers' own tables and in vLLM (its issue 4930).

    Args:
        limit: the limit in the config (`max_position_embeddings`).
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in parameters.values() if isinstance(kind, Mapping)]
    if not kinds:
        return _scaled(parameters, config, limit)
    # By layer type. A windowed layer never sees far, so the others decide.
    return _scaled(parameters.get("full_attention") or {}, config, limit)


def _scaled(parameters: Mapping[str, Any], config: PreTrainedConfig, limit: int) -> int:
    factor = _positive(parameters.get("factor"))
    if parameters.get("rope_type") not in SCALED or factor is None:
        return limit
    field = "original_max_position_embeddings"  # Phi-3 has it beside its rotary parameters
    original = _positive(getattr(config, field, None)) or _positive(parameters.get(field)) or limit
    return max(limit, int(original * factor))


def _positive(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) and value > 0 else None
