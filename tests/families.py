"""Tiny random checkpoints of every family that hybridgen runs, for tests to write to disk and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 257

# Windows are small enough to bite; weights are large enough that greedy choices are clear in float32.
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


def _with(**fields: Any) -> dict[str, Any]:
    return _BASE | fields


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


def _without(*names: str, **fields: Any) -> dict[str, Any]:
    return {name: value for name, value in _with(**fields).items() if name not in names}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _with(),
    "mistral": _with(sliding_window=8),
    "qwen2": _with(use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": _with(head_dim=16),
    "gemma": _with(head_dim=16),
    "gemma2": _with(head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3_text": _with(head_dim=16, query_pre_attn_scalar=16, **_MIXED),
    "lfm2": _with(layer_types=["conv", "full_attention", "conv", "conv"], block_auto_adjust_ff_dim=False),
    "phi3": _with(),
    "phi": _with(partial_rotary_factor=0.5),
    "olmo2": _with(),
    "smollm3": _with(no_rope_layers=[1, 1, 1, 0]),
    "granite": _with(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2),
    "gpt2": _GPT,
    "gpt_bigcode": _GPT | {"multi_query": True},
    "gpt_neox": _without("num_key_value_heads", rotary_pct=0.5),
    "starcoder2": _with(sliding_window=8),
    "stablelm": _with(partial_rotary_factor=0.5, use_qkv_bias=True),
    "nemotron": _with(partial_rotary_factor=0.5),
    "cohere": _with(logit_scale=0.5),
    "cohere2": _with(logit_scale=0.5, **_MIXED),
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 64,
        "init_std": 0.25,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
    "glm": _with(head_dim=16, partial_rotary_factor=0.5),
    "glm4": _with(head_dim=16, partial_rotary_factor=0.5),
    "exaone4": _with(head_dim=16, sliding_window_pattern=2, **_MIXED),
    "ernie4_5": _with(head_dim=16),
    "hunyuan_v1_dense": _with(head_dim=16),
    "seed_oss": _with(head_dim=16),
    "ministral3": _with(head_dim=16),
    "mixtral": _with(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2_moe": _with(
        moe_intermediate_size=48, shared_expert_intermediate_size=48, use_sliding_window=True, **_MOE, **_MIXED
    ),
    "qwen3_moe": _with(moe_intermediate_size=48, head_dim=16, **_MOE),
    "olmoe": _with(**_MOE),
    "glm4_moe": _with(
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "gpt_oss": _with(num_local_experts=4, num_experts_per_tok=2, head_dim=16, **_MIXED),
}
"""Configs by model type: each with every mode's whole matrix of tests."""

_SHORT: dict[str, Any] = {"num_hidden_layers": 2}
_TWO: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], **_SHORT}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, **_EXPERTS}
_THREE: dict[str, Any] = {"num_hidden_layers": 3}
_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    **_THREE,
}
_ROUTED_DELTA: dict[str, Any] = {"num_experts": 4, "shared_expert_intermediate_size": 48, **_EXPERTS}
_KDA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    **_EXPERTS,
    **_THREE,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
_MAMBA_1: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "state_size": 8,
    "num_hidden_layers": 2,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
"""Models without attention: Mamba, and with more fields Mamba 2."""
ALIKE: dict[str, Any] = {"layer_types": ["sliding_attention"] * 2, **_SHORT}
"""Two layers of one kind, of a family that has two: half as many graphs, where kinds of layers are not the subject."""
_TWO_MLPS: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
_TWO_ROPES: dict[str, Any] = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
    }
}
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_LATENT_ROUTED: dict[str, Any] = {"first_k_dense_replace": 1, **_LATENT, **_ROUTED, **_SHORT}

MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": _with(head_dim=16, num_experts=4, num_shared_experts=1, num_dense_layers=1, **_EXPERTS, **_TWO),
    "apertus": _with(**_SHORT),
    "apertus1p5_text": _with(output_vocab_size=193, **_rope("default"), **_SHORT),
    "arcee": _with(head_dim=16, **_SHORT),
    "aria_text": _with(head_dim=16, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, **_SHORT),
    "axk1": _with(**_LATENT_ROUTED),
    "beam": _with(head_dim=16, num_experts=4, n_group=1, topk_group=1, **_EXPERTS, **_TWO, **_TWO_MLPS)
    | {"rope_parameters": _TWO_ROPES["rope_parameters"] | {"full_attention": None}},
    "biogpt": _without("num_key_value_heads", **_SHORT),
    "bitnet": _with(**_SHORT),
    "codegen": _GPT | {"n_layer": 2, "rotary_dim": 8},
    "cohere2_moe": _with(head_dim=16, logit_scale=0.5, num_experts=4, num_experts_per_tok=2, **_TWO, **_TWO_MLPS),
    "cohere_compass_text": _with(head_dim=16, logit_scale=0.5, **_TWO, **_TWO_ROPES),
    "ctrl": {"vocab_size": VOCAB, "n_positions": 512, "n_embd": 64, "dff": 96, "n_layer": 2, "n_head": 4},
    "cwm": _with(head_dim=16, **_TWO),
    "dbrx": {
        "vocab_size": VOCAB,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "initializer_range": 0.25,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _with(topk_method="greedy", **_LATENT_ROUTED),
    "deepseek_v3": _with(**_LATENT_ROUTED),
    "dots1": _with(head_dim=16, first_k_dense_replace=1, **_ROUTED, **_TWO),
    "ernie4_5_moe": _with(
        moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_intermediate_size=48, moe_layer_end_index=1, **_SHORT
    ),
    "exaone": _with(head_dim=16, **_SHORT),
    "exaone_moe": _with(
        head_dim=16, num_experts=4, num_shared_experts=1, n_group=1, topk_group=1, **_EXPERTS, **_TWO, **_TWO_MLPS
    ),
    "flex_olmo": _with(num_experts=4, num_experts_per_tok=2, **_SHORT),
    "flint": _with(
        head_dim=16, num_experts=4, shared_expert_intermediate_size=48, mlp_only_layers=[0], **_EXPERTS, **_TWO
    ),
    "gemma4_text": _with(
        head_dim=16, global_head_dim=32, num_kv_shared_layers=0, hidden_size_per_layer_input=0, **_TWO
    ),
    "gemma3n_text": _with(
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        intermediate_size=[96] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
    ),
    "gemma4_unified_text": _with(head_dim=16, global_head_dim=32, num_kv_shared_layers=0, **_TWO),
    "glm4_moe_lite": _with(**_LATENT, **_ROUTED, **_SHORT, **_TWO_MLPS),
    "gpt-sw3": _GPT | {"n_layer": 2},
    "granite_swa": _with(layer_rope_theta=[10000.0, 50000.0], **_GRANITE, **_TWO),
    "granitemoe": _with(num_local_experts=4, num_experts_per_tok=2, **_GRANITE, **_SHORT),
    "granitemoe_swa": _with(
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        layer_rope_theta=[10000.0, 50000.0],
        **_GRANITE,
        **_TWO,
    ),
    "granitemoeshared": _with(
        num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=48, **_GRANITE, **_SHORT
    ),
    "helium": _with(head_dim=16, **_SHORT),
    "hunyuan_v1_moe": _with(head_dim=16, num_experts=4, moe_topk=2, **_SHORT),
    "hy_v3": _with(head_dim=16, num_experts=4, **_EXPERTS, **_SHORT, **_TWO_MLPS),
    "hyperclovax": _with(head_dim=16, **_GRANITE, **_SHORT),
    "internlm3": _with(head_dim=16, **_SHORT),
    "iquestcoder": _with(head_dim=16, **_SHORT),
    "jais2": _with(head_dim=16, **_SHORT),
    "jetmoe": _with(kv_channels=16, num_local_experts=4, num_experts_per_tok=2, **_SHORT),
    "kolibri1": _with(head_dim=16, num_local_experts=4, shared_expert_intermediate_size=48, **_EXPERTS, **_TWO),
    "laguna": _with(
        head_dim=16,
        num_experts=4,
        shared_expert_intermediate_size=48,
        num_attention_heads_per_layer=[4, 2],
        **_EXPERTS,
        **_TWO,
        **_TWO_MLPS,
        **_TWO_ROPES,
    ),
    "qwen3_next": _with(**_DELTA, head_dim=16, partial_rotary_factor=0.5, **_ROUTED_DELTA),
    "qwen3_5_text": _with(**_DELTA, head_dim=16),
    "qwen3_5_moe_text": _with(**_DELTA, head_dim=16, **_ROUTED_DELTA),
    "olmo_hybrid": _with(**_DELTA),
    "lara_mini": _without(
        "intermediate_size",
        **_DELTA
        | {"layer_types": ["linear_attention", "sliding_attention", "full_attention"], "linear_num_value_heads": 4},
        head_dim=16,
        sliding_window=8,
        **_ROUTED_DELTA,
    ),
    "bamba": _with(**_MAMBA, attn_layer_indices=[1], **_THREE),
    "granitemoehybrid": _with(
        **_MAMBA,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=4,
        shared_intermediate_size=48,
        **_THREE,
    ),
    "falcon_h1": _with(**_MAMBA, mamba_d_ssm=128, **_SHORT),
    "nemotron_h": _without(
        "num_hidden_layers",
        layers_block_type=["mamba", "attention", "mlp", "mamba"],
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
    ),
    "zamba2": _with(
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=16,
        mamba_ngroups=2,
        chunk_size=16,
        num_mem_blocks=1,
        adapter_rank=8,
        **_THREE,
    ),
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "mamba2": _MAMBA_1 | {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "jamba": _with(
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        **_THREE,
    ),
    "zamba": _with(
        layers_block_type=["linear_attention", "hybrid", "linear_attention"],
        mamba_d_state=8,
        n_mamba_heads=2,
        num_key_value_heads=4,
        **_THREE,
    ),
    "lfm3": _with(head_dim=16, sliding_window=8, layer_types=["conv", "full_attention", "sliding_attention", "conv"]),
    "zaya": _without(
        "intermediate_size",
        head_dim=16,
        layer_types=["hybrid", "hybrid_sliding"],
        sliding_window=8,
        num_experts=4,
        moe_intermediate_size=48,
        router_hidden_size=16,
        **_SHORT,
    ),
    "kimi_linear": _with(**_KDA, linear_head_dim=16, linear_num_heads=4),
    "bailing_hybrid": _with(**_KDA | {"n_group": 2}, head_dim=16, num_mtp_layers=0),
    "lfm2_moe": _with(
        layer_types=["conv", "full_attention", "conv"],
        num_hidden_layers=3,
        moe_intermediate_size=48,
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "llama4_text": _with(
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=4,
        num_experts_per_tok=1,
        attention_chunk_size=24,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        attn_temperature_tuning=True,
        attn_scale=0.5,
        floor_scale=16,
        interleave_moe_layer_step=2,
        **_SHORT,
    ),
    "longcat_flash": _without(
        "num_hidden_layers",
        num_layers=2,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=48,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        head_dim=8,
        **_LATENT,
    ),
    "mellum": _with(head_dim=16, num_local_experts=4, **_EXPERTS, **_TWO, **_TWO_ROPES),
    "mimo_v2_flash": _with(head_dim=24, v_head_dim=16, **_ROUTED, **_TWO, **_TWO_MLPS),
    "minicpm3": _with(scale_emb=3.0, **_LATENT, **_SHORT),
    "minimax_m2": _with(head_dim=16, num_local_experts=4, num_experts_per_tok=2, **_SHORT),
    "ministral": _with(head_dim=16, **_TWO),
    "modernbert-decoder": _without("num_key_value_heads", local_attention=16, **_TWO),
    "nanochat": _with(**_SHORT),
    "olmo": _with(clip_qkv=8.0, **_SHORT),
    "olmo3": _with(**_TWO),
    "persimmon": _without("num_key_value_heads", **_SHORT),
    "phimoe": _with(num_local_experts=4, num_experts_per_tok=2, **_SHORT),
    "sarvam_mla": _with(**_LATENT_ROUTED),
    "sarvam_moe": _with(head_dim=16, first_k_dense_replace=1, use_qk_norm=True, **_ROUTED, **_SHORT),
    "solar_open": _with(head_dim=16, **_ROUTED, **_SHORT),
    "youtu": _with(**_LATENT, **_SHORT),
    "vaultgemma": _with(head_dim=16, query_pre_attn_scalar=16, **_TWO),
    "gptj": _GPT | {"n_layer": 2, "rotary_dim": 8},
}
"""Configs by model type, of two layers: each in one sweep over the modes. A few are newer than the oldest transformers
that is supported."""

CONFIGS = FAMILIES | MORE_FAMILIES

UNCOMPILED = {"dbrx", "gemma3n_text", "longcat_flash"}
"""Families whose layers run uncompiled, counted: Dynamo cannot trace them (experts in a loop over values), or they hand
on keys and values that they share."""

ROPE_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", _rope("linear", factor=2.0)),
    "llama3": (
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "yarn": ("qwen3", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "dynamic": ("llama", _rope("dynamic", factor=8.0) | {"max_position_embeddings": 64}),
    "longrope": (
        "phi3",
        _rope(
            "longrope",
            short_factor=[1.0] * 8,
            long_factor=[2.0] * 8,
            original_max_position_embeddings=80,
        )
        | {"original_max_position_embeddings": 80},
    ),
}
"""Rotary scalings: the family they are tried on, and the fields that differ from its config."""


def is_absent(name: str) -> bool:
    """Whether the installed transformers lacks a family, or has it in a form that does not run yet."""
    since = {"codegen": "5.24", "cohere_compass_text": "5.23", "gptj": "5.24"}.get(name, "0")
    return name not in CONFIG_MAPPING or Version(transformers.__version__) < Version(since)


def layer_kinds(name: str) -> int:
    """Layers of different structure, each of which needs its own compiled graph."""
    config = FAMILIES[name]
    if "layer_types" in config or name in ("qwen2", "gemma2", "smollm3", "glm4_moe"):
        return 2
    return 1


_LISTS: dict[str, dict[str, Any]] = {"qwen2": {"max_window_layers": 1}, "smollm3": {"no_rope_layers": [1, 0]}}
"""Of families that tell their layers apart by other fields, for two layers."""


def depth(name: str) -> dict[str, Any]:
    """Fields of its config for two layers, one of each kind where there are two: more of them show little new, and
    take their share of every step. `test_whole_matrix` has more."""
    config = CONFIGS[name]
    if name not in FAMILIES:  # as few as they can be
        return {}
    fields: dict[str, Any] = {"n_layer" if "n_layer" in config else "num_hidden_layers": 2, **_LISTS.get(name, {})}
    if "layer_types" in config:
        fields["layer_types"] = config["layer_types"][:2]
    return fields


def state_kinds(name: str) -> int:
    """How many of them keep a state by slot, so that their prefill is not compiled."""
    return len({"conv", "linear_attention", "mamba", "hybrid"} & set(FAMILIES[name].get("layer_types", ())))


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model in eval mode whose norms and biases are not trivial either."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**(CONFIGS[name] | changes))
    config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
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


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def reference(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Hugging Face's own greedy tokens for one prompt, and the raw logits [new_tokens, vocab] behind them."""
    tokens, logits = _generate(model, [prompt], new_tokens)
    return tokens[0], logits[:, 0]


@torch.no_grad()
def references(
    model: PreTrainedModel, prompts: list[list[int]], new_tokens: int
) -> list[tuple[list[int], torch.Tensor]]:
    """What `reference` gives for each prompt, for a fraction of its time.

    All prompts are generated in one batch, padded. Where one forward pass over a prompt and its tokens, without padding
    and without a cache, chooses every one of them, these are its greedy tokens, and its logits are those behind them.
    Where it does not, the prompt is generated alone.
    """
    if getattr(model, "_is_stateful", False):
        return [reference(model, prompt, new_tokens) for prompt in prompts]
    guesses, _ = _generate(model, prompts, new_tokens)
    found = []
    for prompt, guess in zip(prompts, guesses, strict=True):
        logits = model(torch.tensor([prompt + guess[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :].float()
        same = logits.argmax(-1).tolist() == guess
        found.append((guess, logits) if same else reference(model, prompt, new_tokens))
    return found


@torch.no_grad()
def _generate(
    model: PreTrainedModel, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of one batch, and logits [new_tokens, prompts, vocab]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, longest:].tolist(), torch.stack(out.logits)
