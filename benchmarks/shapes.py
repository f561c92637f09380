"""Shapes of published models: configs for random weights."""

from __future__ import annotations

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


def shape_config(name: str) -> PretrainedConfig:
    """The config of a published model, for random weights of its shape; `tiny` runs anywhere."""
    if name == "tiny":
        return LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
    if name == "small":  # what kernels need that cut rows into pieces
        return LlamaConfig(
            vocab_size=512,
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=1,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=1024,
            rope_theta=500000.0,
        )
    if name == "llama-3.2-1b":
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=131072,
            rope_theta=500000.0,
            tie_word_embeddings=True,
        )
    if name == "qwen3-0.6b":
        return Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
        )
    if name == "llama-3.1-8b":
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            rope_theta=500000.0,
        )
    if name == "llama-3.1-70b":
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            rope_theta=500000.0,
        )
    if name == "gpt-oss-20b":
        return GptOssConfig(
            vocab_size=201088,
            hidden_size=2880,
            intermediate_size=2880,
            num_hidden_layers=24,
            num_local_experts=32,
            num_experts_per_tok=4,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            sliding_window=128,
        )
    if name == "tiny-moe":
        return GptOssConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=128,
        )
    if name == "llama-2-7b":
        return LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
        )
    if name == "qwen3-30b-a3b":
        return Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            max_position_embeddings=40960,
            rope_theta=1000000.0,
        )
    if name == "qwen3.5-4b":  # the text part
        return Qwen3_5TextConfig(
            vocab_size=248320,
            hidden_size=2560,
            intermediate_size=9216,
            num_hidden_layers=32,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            max_position_embeddings=262144,
            rope_parameters={"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
            tie_word_embeddings=True,
        )
    if name == "lfm2-2.6b":
        attends = (2, 5, 9, 13, 17, 21, 24, 27)
        return Lfm2Config(
            vocab_size=65536,
            hidden_size=2048,
            intermediate_size=10752,
            block_auto_adjust_ff_dim=False,
            num_hidden_layers=30,
            num_attention_heads=32,
            num_key_value_heads=8,
            layer_types=["full_attention" if i in attends else "conv" for i in range(30)],
            tie_word_embeddings=True,
        )
    if name in ("deepseek-v2-lite", "tiny-latent"):
        sizes = {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "max_position_embeddings": 32768,
        }
        if name == "tiny-latent":
            sizes |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32}
            sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8}
            sizes |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2}
        return DeepseekV2Config(q_lora_rank=None, n_shared_experts=2, first_k_dense_replace=1, **sizes)
    known = (
        "tiny, tiny-moe, tiny-latent, llama-3.2-1b, qwen3-0.6b, llama-3.1-8b, llama-3.1-70b, gpt-oss-20b, llama-2-7b, "
        "qwen3-30b-a3b, qwen3.5-4b, lfm2-2.6b or deepseek-v2-lite"
    )
    raise SystemExit(f"unknown shape {name!r}; choose {known}")


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
