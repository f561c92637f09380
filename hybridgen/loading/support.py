"""Decides from a config alone, before weights are read, whether the engine can run the architecture.

The engine replaces the attention function and the cache and calls everything else as Hugging Face wrote it. So
it needs a decoder whose attention layers reach their function through `AttentionInterface`, and whose only
memory of earlier tokens is one K and one V per layer, or a state of one size for each request. The checks look
for what breaks that, not for a list of names; the few names are families that do not say it in their config.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from hybridgen.errors import UnsupportedModelError
from hybridgen.loading.multimodal import whole_class
from hybridgen.models.text_part import is_multimodal, text_config

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
"""Names in `layer_types` that stand for attention over one K and one V per layer."""

STATE_LAYERS = frozenset({"conv", "linear_attention", "mamba", "hybrid", "hybrid_sliding", "mlp", "moe"})
"""Names in `layer_types` that stand for a state of one size for each request, or for no state at all."""

STATES_BY_SLOT = frozenset(
    {
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lara_mini",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "zamba",
        "zamba2",
        "zaya",
    }
)
"""Types whose states run, by comparison with transformers' own generate (`tests/families.py`). Which modules keep them
is read off their code; that another family's are computed alike has to be seen first."""

_RECURRENT_FIELDS = (
    "conv_L_cache",
    "linear_key_head_dim",
    "mamba_d_state",
    "mamba_num_heads",
    "ssm_cfg",
    "state_size",
)
_INDEXER_FIELDS = ("index_topk", "index_topk_blocks", "index_n_heads")
_BY_NAME = {
    "bert-generation": "it is an encoder-decoder's half, whose attention is not causal",
    "bloom": "its attention adds ALiBi position biases",
    "diffllama": "each layer calls its attention twice, with different values (differential attention)",
    "doge": "its attention mask is computed from the values (dynamic mask attention)",
    "gemma3n": (
        "its forward looks every token up in the embedders of its encoders, which are not loaded; save its language "
        "model (Gemma3nForCausalLM) as a checkpoint and load that"
    ),
    "hrm_text": "it runs its layers several times for each token (H_cycles, L_cycles)",
    "kosmos_2_5_text_model": "it counts its positions itself, from behind the id of its padding token on",
    "rwkv": "it keeps a recurrent state instead of keys and values",
    "xlstm": "it keeps a recurrent state instead of keys and values",
}
_INSTEAD = "run it with transformers' own generate()"


def check_supported(
    hf_config: PreTrainedConfig,
    trust_remote_code: bool = False,
    model_class: type[PreTrainedModel] | None = None,
    *,
    quantised: bool = False,
) -> None:
    """Returns if the engine can run a model of this config.

    Args:
        hf_config: the model's config.
        trust_remote_code: whether code that the checkpoint brings (`auto_map`) may define the model.
        model_class: the model's class where it is known (a live model, or remote code); else it is looked up
            from the config's type, without building the model. With remote code trusted and no class given,
            the checks that need the class are left to the caller.
        quantised: weights may be, as the caller has checked.

    Raises:
        UnsupportedModelError: the reason, with the config field that shows it.
    """
    reason = unsupported_reason(hf_config, trust_remote_code, model_class, quantised=quantised)
    if reason is not None:
        kind = getattr(hf_config, "model_type", "") or type(hf_config).__name__
        raise UnsupportedModelError(f"a model of type {kind!r} cannot run here: {reason}")


def unsupported_reason(
    hf_config: PreTrainedConfig,
    trust_remote_code: bool = False,
    model_class: type[PreTrainedModel] | None = None,
    *,
    quantised: bool = False,
) -> str | None:
    """The reason that `check_supported` raises with, or None. Arguments as there."""
    if is_multimodal(hf_config):
        return _text_part_reason(hf_config, model_class, quantised)
    for check in _CHECKS:
        reason = None if quantised and check is _quantised else check(hf_config)
        if reason is not None:
            return reason
    if model_class is None:
        remote = _brings_code(hf_config)
        if remote and trust_remote_code:
            return None
        model_class = _native_class(hf_config)
        if model_class is None and remote:
            return "its code comes with the checkpoint; read it, then set trust_remote_code=True to run it"
        if model_class is None:
            return f"transformers has no causal language model for {type(hf_config).__name__}; {_INSTEAD}"
    return _class_reason(model_class)


def _brings_code(hf_config: PreTrainedConfig) -> bool:
    return "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})


def _text_part_reason(
    whole: PreTrainedConfig, model_class: type[PreTrainedModel] | None, quantised: bool
) -> str | None:
    """Why the text part of a multimodal model cannot run; None if it can, as far as its config tells."""
    kind = getattr(whole, "model_type", "") or type(whole).__name__
    for check in (_quantised, _encoder, _named):
        reason = None if quantised and check is _quantised else check(whole)
        if reason is not None:
            return reason
    model_class = model_class or whole_class(whole)
    if model_class is None:
        return f"transformers has no class that generates text with a multimodal model of type {kind!r}; {_INSTEAD}"
    text = text_config(whole)
    for check in _CHECKS:
        reason = None if quantised and check is _quantised else check(text)
        if reason is not None:
            return f"of its text part: {reason}"
    if getattr(model_class, "_is_stateful", False) and _value(text, "model_type") not in STATES_BY_SLOT:
        return f"{model_class.__name__} keeps a recurrent state besides keys and values; {_INSTEAD}"
    return None


def _native_class(hf_config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that `AutoModelForCausalLM` takes for this config, imported but not built."""
    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    except KeyError:
        return None
    if isinstance(found, (tuple, list)):
        names = getattr(hf_config, "architectures", None) or ()
        return next((cls for cls in found if cls is not None and cls.__name__ in names), found[0])
    return found


def _class_reason(model_class: type[PreTrainedModel]) -> str | None:
    name = model_class.__name__
    kind = getattr(model_class.config_class, "model_type", "")
    if getattr(model_class, "_is_stateful", False) and kind not in STATES_BY_SLOT:
        return f"{name} keeps a recurrent state besides keys and values; {_INSTEAD}"
    if not model_class._can_set_attn_implementation():
        return f"{name} does not call its attention through transformers' AttentionInterface; {_INSTEAD}"
    return None


def _quantised(config: PreTrainedConfig) -> str | None:
    for field in ("quantization_config", "compression_config"):
        value = _value(config, field)
        if value:
            method = value.get("quant_method") if isinstance(value, dict) else getattr(value, "quant_method", None)
            return (
                f"its weights are quantised ({field}, method {str(method or 'unknown')!r}); "
                "load a float32, bfloat16 or float16 checkpoint of it"
            )
    return None


def _encoder(config: PreTrainedConfig) -> str | None:
    if _value(config, "is_encoder_decoder"):
        return f"it is an encoder-decoder (is_encoder_decoder=True), not a causal decoder; {_INSTEAD}"
    # GPT-NeoX says is_decoder=False too, so the field alone proves nothing; masked LMs are encoders.
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES  # as the first, it takes 0.2 s

    if _value(config, "model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        role = f"is_decoder={bool(_value(config, 'is_decoder'))}"
        return f"it is of an encoder-only family trained on masked tokens ({role}); choose a causal decoder"
    for field in ("add_cross_attention", "cross_attention_layers"):
        if _value(config, field):
            return f"it attends to an encoder ({field}={_value(config, field)}); {_INSTEAD}"
    return None


def _composite(config: PreTrainedConfig) -> str | None:
    nested = [name for name in type(config).sub_configs if isinstance(_value(config, name), PreTrainedConfig)]
    # DBRX keeps settings of its one decoder in attn_config and ffn_config.
    foreign = [name for name in nested if not name.startswith(("attn", "ffn"))]
    foreign += [name for name in ("text_config", "vision_config", "audio_config") if _value(config, name) is not None]
    if not foreign:
        return None
    names = ", ".join(dict.fromkeys(foreign))
    return f"it is a multi-modal or composite model ({names}); save its text model as a checkpoint and load that"


def _alibi(config: PreTrainedConfig) -> str | None:
    for holder in (config, _value(config, "attn_config")):
        alibi = holder.get("alibi") if isinstance(holder, dict) else getattr(holder, "alibi", None)
        if alibi:
            return f"its attention adds ALiBi position biases (alibi=True); {_INSTEAD}"
    return None


def _indexer(config: PreTrainedConfig) -> str | None:
    found = [field for field in _INDEXER_FIELDS if _value(config, field)]
    if not found:
        return None
    return f"an indexer picks the tokens that it attends to (sparse attention, {found[0]}); {_INSTEAD}"


def _recurrent(config: PreTrainedConfig) -> str | None:
    if _value(config, "model_type") in STATES_BY_SLOT and set(_layer_types(config)) <= ATTENTION_LAYERS | STATE_LAYERS:
        return None
    others = [kind for kind in _layer_types(config) if kind not in ATTENTION_LAYERS]
    if others:
        kinds = ", ".join(others)
        return f"it has layers other than full, sliding and chunked attention (layer_types: {kinds}); {_INSTEAD}"
    fields = [field for field in _RECURRENT_FIELDS if _value(config, field)]
    if fields:
        return f"it has recurrent or convolution layers, which keep a state ({fields[0]}); {_INSTEAD}"
    return None


def keeps_states(config: PreTrainedConfig) -> bool:
    """Whether layers keep a state of one size for each request, as the config says. Of some types (Granite 4) there are
    models of attention alone."""
    kinds = set(_layer_types(config))
    return _value(config, "model_type") in STATES_BY_SLOT and (not kinds or bool(kinds & STATE_LAYERS - {"mlp", "moe"}))


def _named(config: PreTrainedConfig) -> str | None:
    kind = _value(config, "model_type")
    reason = _BY_NAME.get(kind)
    return None if reason is None else f"{reason} (model_type={kind!r}); {_INSTEAD}"


_CHECKS = (
    _quantised,
    _encoder,
    _composite,
    _alibi,
    _indexer,
    _recurrent,
    _named,
)


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """The kinds of layers that the config names, sorted."""
    kinds: set[str] = set()
    for field in ("layer_types", "layers_block_type", "_block_types", "block_types"):
        value: Any = _value(config, field)
        if isinstance(value, Iterable) and not isinstance(value, str):
            kinds.update(str(kind) for kind in value)
    return sorted(kinds)


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field of the config, or None. Where it differs between layers (transformers' `per_layer_config`,
    whose configs refuse to give one value for the model), the text "per layer".
    """
    try:
        return getattr(config, name, None)
    except Exception as error:  # transformers' exception for this is newer than the oldest version supported
        if type(error).__name__ != "AmbiguousGlobalPerLayerAttributeError":
            raise
        return "per layer"
