"""Shapes of published models: configs for random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

_LONG = {"max_position_embeddings": 131072, "rope_theta": 500000.0}
_LATENT = {"q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 1, "max_position_embeddings": 32768}
_ATTENDS = (2, 5, 9, 13, 17, 21, 24, 27)
SHAPES: dict[str, tuple[type[PretrainedConfig], tuple[int, ...], dict[str, Any]]] = {
    # Vocabulary, hidden and intermediate size, layers, heads, kv heads, size of a head, as far as the config has them;
    # and what else there is.
    "tiny": (LlamaConfig, (512, 64, 128, 2, 4, 2), {"max_position_embeddings": 1024}),
    "tiny-moe": (
        GptOssConfig,
        (512, 64, 96, 2, 4, 2, 16),
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
    ),
    "tiny-latent": (
        DeepseekV2Config,
        (512, 64, 128, 2, 4),
        {
            **_LATENT,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    # What kernels need that cut rows into pieces.
    "small": (LlamaConfig, (512, 1024, 2048, 1, 16, 4, 64), {**_LONG, "max_position_embeddings": 1024}),
    "llama-3.2-1b": (LlamaConfig, (128256, 2048, 8192, 16, 32, 8, 64), {**_LONG, "tie_word_embeddings": True}),
    "llama-3.1-8b": (LlamaConfig, (128256, 4096, 14336, 32, 32, 8, 128), _LONG),
    "llama-3.1-70b": (LlamaConfig, (128256, 8192, 28672, 80, 64, 8, 128), _LONG),
    "llama-2-7b": (LlamaConfig, (32000, 4096, 11008, 32, 32, 32), {"max_position_embeddings": 4096}),
    "qwen3-0.6b": (
        Qwen3Config,
        (151936, 1024, 3072, 28, 16, 8, 128),
        {"max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": True},
    ),
    "gpt-oss-20b": (
        GptOssConfig,
        (201088, 2880, 2880, 24, 64, 8, 64),
        {"num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128},
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        (151936, 2048, 6144, 48, 32, 4, 128),
        {
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            "rope_theta": 1000000.0,
        },
    ),
    "qwen3.5-4b": (  # the text part
        Qwen3_5TextConfig,
        (248320, 2560, 9216, 32, 16, 4, 256),
        {
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "max_position_embeddings": 262144,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
            "tie_word_embeddings": True,
        },
    ),
    "lfm2-2.6b": (
        Lfm2Config,
        (65536, 2048, 10752, 30, 32, 8),
        {
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["full_attention" if i in _ATTENDS else "conv" for i in range(30)],
            "tie_word_embeddings": True,
        },
    ),
    "deepseek-v2-lite": (
        DeepseekV2Config,
        (102400, 2048, 10944, 27, 16),
        {
            **_LATENT,
            "moe_intermediate_size": 1408,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
        },
    ),
}
"""Published models; `tiny`, `tiny-moe` and `tiny-latent` run anywhere."""
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def shape_config(name: str) -> PretrainedConfig:
    """A new config of a shape in `SHAPES`, for random weights."""
    if name not in SHAPES:
        raise SystemExit(f"unknown shape {name!r}; choose {', '.join(SHAPES)}")
    kind, sizes, more = SHAPES[name]
    return kind(**dict(zip(_SIZES, sizes, strict=False)), **copy.deepcopy(more))


def shape_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that a published model has; float32 on a CPU."""
    if device == "cpu":
        return torch.float32
    return torch.float16 if name == "llama-2-7b" else torch.bfloat16


def shorten(config: PretrainedConfig, layers: int) -> None:
    """Leave a config so many layers, if it has more."""
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
