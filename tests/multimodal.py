"""Tiny random multimodal checkpoints, whose text part hybridgen runs, for tests to write to disk and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from hybridgen.loading.multimodal import whole_class
from hybridgen.models.text_part import text_config

IMAGE = 250
"""The token that stands for images, video or sound."""

_ENCODERS: dict[str, Any] = {
    "hidden_size": 32, "embed_dim": 32, "d_model": 32, "intermediate_size": 48, "encoder_ffn_dim": 48, "mlp_dim": 48,
    "num_hidden_layers": 1, "depth": 1, "encoder_layers": 1, "num_layers": 1, "num_attention_heads": 2, "num_heads": 2,
    "encoder_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "projection_dim": 32,
    "image_size": 32, "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0], "global_attn_indexes": [0], "num_mel_bins": 16, "vocab_size": 64,
}  # fmt: skip
"""Fields of encoders, where they have them."""


def _text(name: str, *without: str, **fields: Any) -> dict[str, Any]:
    """A family's config of two layers."""
    config = families.CONFIGS[name] | fields
    kinds = config.get("layer_types")
    two: dict[str, Any] = {"num_hidden_layers": 2} | ({"layer_types": kinds[:2]} if kinds else {})
    return {key: value for key, value in (config | two).items() if key not in without}


def _mrope(*sections: int) -> dict[str, Any]:
    values = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": values}


_QWEN = _text("qwen2", **_mrope(2, 3, 3))
_QWEN3 = _text("qwen3", **_mrope(2, 3, 3))
_GLM = _text("glm4", **_mrope(1, 1, 2))

_DELTA_ROPE = {"rope_parameters": {**_mrope(2, 1, 1)["rope_parameters"], "partial_rotary_factor": 0.5}}

WHOLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (_text("gemma3_text"), {"mm_tokens_per_image": 4}),
    "mistral3": (_text("mistral"), {}),
    "llava": (_text("llama"), {}),
    "llava_next": (_text("llama"), {}),
    "llava_next_video": (_text("llama"), {}),
    "llava_onevision": (_text("qwen2"), {}),
    "vipllava": (_text("llama"), {}),
    "video_llava": (_text("llama"), {}),
    "internvl": (_text("qwen2"), {}),
    "idefics2": (_text("mistral"), {}),
    "idefics3": (_text("llama"), {}),
    "smolvlm": (_text("llama"), {}),
    "aya_vision": (_text("cohere2"), {}),
    "cohere2_vision": (_text("cohere2"), {}),
    "qwen2_vl": (_QWEN, {}),
    "qwen2_5_vl": (_QWEN, {}),
    "qwen3_vl": (_QWEN3, {}),
    "qwen3_vl_moe": (_text("qwen3_moe", **_mrope(2, 3, 3)), {}),
    "glm4v": (_GLM, {}),
    "glm46v": (_GLM, {}),
    "glm4v_moe": (_text("glm4_moe", **_mrope(1, 1, 2)), {}),
    "glm_ocr": (_GLM, {}),
    "gemma4": (_text("gemma4_text"), {}),
    "deepseek_ocr2": (
        _text(
            "llama",
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            mlp_layer_types=["dense", "sparse"],
            n_group=1,
            topk_group=1,
        ),
        {
            "vision_config": {
                "sam_config": {
                    "hidden_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 32,
                    "global_attn_indexes": [0],
                    "mlp_dim": 48,
                    "output_channels": 8,
                    "downsample_channels": [16, 32],
                },
                "encoder_config": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "vocab_size": 64,
                },
            }
        },
    ),
    "emu3": (
        _text("llama"),
        {
            "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 251},
            "vq_config": {
                "codebook_size": 16,
                "embed_dim": 8,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
            },
        },
    ),
    "exaone4_5": (_text("exaone4"), {}),
    "aria": (_text("aria_text"), {}),
    "ovis2": (_text("qwen2"), {"hidden_size": 64, "vocab_size": families.VOCAB}),
    "ernie4_5_vl_moe": (_text("ernie4_5_moe", moe_intermediate_size=[48, 48], **_mrope(2, 2, 4)), {}),
    "paddleocr_vl": (_text("ernie4_5", **_mrope(2, 3, 3)), {}),
    "lighton_ocr": (_text("qwen3"), {}),
    "granite_docling": (_text("granite"), {"vision_config": {"out_hidden_size": 64}}),
    "qwen2_5_omni_thinker": (_QWEN, {"vision_start_token_id": 249}),
    "qwen3_omni_moe_thinker": (_text("qwen3_moe", **_mrope(2, 3, 3)), {"vision_start_token_id": 249}),
    "hyperclovax_vision_v2": (_text("hyperclovax"), {}),
    "cohere_compass": (_text("cohere_compass_text"), {}),
    "molmo2": (_text("qwen3"), {"adapter_config": {"vision_feature_layer": [0]}}),
    "voxtral": (_text("llama"), {}),
    "qwen3_asr": (_text("qwen3"), {}),
    "glmasr": (_text("llama"), {}),
    "fuyu": (_text("persimmon"), {}),
    "deepseek_vl": (_text("llama"), {}),
    "janus": (_text("llama"), {}),
    "got_ocr2": (_text("qwen2"), {}),
    "granite_speech": (_text("granite"), {}),
    "video_llama_3": (_text("qwen2"), {}),
    "qianfan_ocr": (_text("qwen3"), {}),
    "cosmos3_edge": (_text("llama"), {}),
    "cosmos3_omni": (_QWEN3, {}),
    "fun_asr_nano": (_text("qwen3"), {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}}),
    "muse_glimmer": (_text("llama"), {"vision_config": {"layer_types": ["full_attention"]}}),
    "muse_spark": (
        _text("llama", num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, moe_hidden_size=32)
        | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        {
            "vision_config": {"layer_types": ["full_attention"]},
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4, "out_hidden_size": 64},
        },
    ),
    "omniasr": (_text("llama"), {}),
    "apertus1p5": (
        families.CONFIGS["apertus1p5_text"],
        {
            "image_token_offset": 200,
            "audio_token_offset": 216,
            "vision_config": {"codebook_size": 16, "base_channels": 32, "latent_channels": 32, "num_res_blocks": 1},
            "audio_config": {"codebook_dim": 32, "codebook_size": 16, "num_lstm_layers": 1},
        },
    ),
    "moss_transcribe_diarize": (_text("qwen3"), {}),
    "llama4": (_text("llama4_text"), {}),
    "kimi_k25": (_text("deepseek_v3"), {}),
    "qwen3_5": (families.CONFIGS["qwen3_5_text"] | _DELTA_ROPE, {}),
    "qwen3_5_moe": (families.CONFIGS["qwen3_5_moe_text"] | _DELTA_ROPE, {}),
    "lfm2_vl": (families.CONFIGS["lfm2"], {}),
    "lfm3_vl": (families.CONFIGS["lfm3"], {"vision_config": {"layer_types": ["full_attention"]}}),
    "minicpm_ocr": (families.CONFIGS["qwen3_5_text"] | _DELTA_ROPE, {}),
    "minicpmv4_6": (families.CONFIGS["qwen3_5_text"] | _DELTA_ROPE, {}),
    "minicpmv4_7": (families.CONFIGS["qwen3_5_text"] | _DELTA_ROPE, {}),
    "nemo_speechlm": (families.CONFIGS["nemotron_h"], {"word_timestamp_config": {"blank_token_id": 1}}),
    "deepseek_vl_hybrid": (_text("llama"), {}),
    "granite_speech_plus": (_text("granite"), {}),
    "vibevoice_asr": (_text("qwen2"), {}),
    "gemma4_unified": (_text("gemma4_unified_text"), {}),
    "granite4_vision": (
        _text("granite"),
        {
            "deepstack_layer_map": [[0, 0]],
            "downsample_rate": "1/2",
            "spatial_target_layers": [0],
            "vision_config": {"hidden_size": 64},
            "qformer_config": {"model_type": "blip_2_qformer"},
        },
    ),
    "hunyuan_vl": (_text("hunyuan_v1_dense", **_mrope(2, 2, 2, 2)), {}),
    "nemotron_h_omni": (families.CONFIGS["nemotron_h"], {}),
    "qwen2_audio": (_text("qwen2"), {}),
    "step3p7": (
        _text(
            "gpt_oss",
            "num_local_experts",
            mlp_layer_types=["dense", "sparse"],
            moe_intermediate_size=48,
            n_routed_experts=4,
            num_sliding_attention_heads=2,
            share_expert_dim=48,
        ),
        {},
    ),
}
"""By model type: the text config, and other fields of the whole one."""

UNCOMPILED = {"step3p7"}
"""Their layers run uncompiled, counted: experts in a loop over values."""

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"paligemma": (_text("gemma"), {})}
"""Prompts are seen both ways (prefix attention)."""


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of a multimodal model."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    text, others = (WHOLES | REFUSED)[name]
    fields: dict[str, Any] = {key: value for key, value in others.items() if key not in kind.sub_configs}
    for part in kind.sub_configs:
        inner = getattr(default, part, None)
        if not isinstance(inner, PreTrainedConfig):
            continue
        if inner is text_config(default):
            fields[part] = {"model_type": inner.model_type, **text, **changes}
            continue
        known = inner.to_dict()
        fields[part] = {
            key: value for key, value in known.items() if not isinstance(value, dict) and key != "transformers_version"
        } | {key: value for key, value in _ENCODERS.items() if key in known and isinstance(known[key], type(value))}
        fields[part] |= others.get(part, {})
    for token, field in enumerate(("image_token_id", "image_token_index", "video_token_id", "audio_token_id"), IMAGE):
        if hasattr(default, field):
            fields.setdefault(field, token)
    config = kind(**fields)
    config.tie_word_embeddings = text_config(config).tie_word_embeddings = False
    text_config(config).eos_token_id = None
    return config


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model in eval mode whose norms and biases are not trivial either.

    Args:
        changes: fields of the text config.
    """
    torch.manual_seed(0)
    config = config_of(name, **changes)
    model_class = whole_class(config)
    assert model_class is not None
    config._attn_implementation = "eager"
    model = model_class._from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def write(name: str, directory: Path, **changes: Any) -> Path:
    """Write such a checkpoint to `directory/name`."""
    path = directory / name
    build(name, **changes).save_pretrained(path)
    return path


def is_absent(name: str) -> bool:
    """Whether the installed transformers lacks it, or cannot generate text with it itself: 5.24's Llama 4 raises
    without an image, and is refused for that."""
    return name not in CONFIG_MAPPING or (name == "llama4" and Version(transformers.__version__).release[:2] == (5, 24))
