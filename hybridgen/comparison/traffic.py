"""Bytes that a decode step has to read: the weights once, and the cached keys and values of its requests.

What it reads beyond that (activations, state) is small; what it writes is one position per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What decides the bytes of a step."""

    weights: int
    """Bytes of the parameters that every step reads."""
    layers: Sequence[tuple[int, int | None]]
    """Per layer: bytes of one position's keys and values, and the sliding window, if it has one."""

    def step_bytes(self, contexts: Sequence[float]) -> float:
        """Bytes of one step of requests with these numbers of cached positions."""
        cached = sum(
            size * (context if window is None else min(context, window))
            for size, window in self.layers
            for context in contexts
        )
        return self.weights + cached


def traffic_of(model: Any) -> Traffic | str:
    """What a decode step of a Hugging Face causal LM reads; or why that is not known.

    The input embedding is left out, of which a step reads one row per request, unless the head shares it.
    """
    config = model.config
    experts = [name for name in _EXPERTS if (getattr(config, name, None) or 0) > 1]
    if experts:
        return f"the model has experts ({experts[0]}={getattr(config, experts[0])}): which are read depends on tokens"
    layers = kv_layers(config, model)
    if layers is None:
        return "the config does not say how many keys and values a layer has"
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if not tied:
        parameters.pop(id(embedding.weight), None)
    return Traffic(weights=sum(parameter.nbytes for parameter in parameters.values()), layers=layers)


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters, each counted once."""
    return sum(parameter.nbytes for parameter in {id(p): p for p in model.parameters()}.values())


def kv_layers(config: Any, model: Any) -> list[tuple[int, int | None]] | None:
    """Per layer: bytes of one position's keys and values, and the sliding window."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not (layers and heads and hidden):
        return None
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    size = 2 * key_heads * head_dim * model.dtype.itemsize
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    everywhere = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [everywhere] * layers
    return [(size, window if kind == "sliding_attention" else None) for kind in kinds]
