"""Which architectures are let in, and what is said about the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import multimodal
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import hybridgen
from hybridgen.errors import CheckpointError, UnsupportedModelError
from hybridgen.loading import check_supported
from hybridgen.loading.support import unsupported_reason

IDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    **SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
SMALL = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "glm_moe_dsa": (LATENT | {"index_topk": 8, "index_n_heads": 2}, "index_topk"),
    "recurrent_gemma": ({**IDS, "hidden_size": 32, "num_hidden_layers": 3}, "recurrent"),
    "minimax": (SIZES, "layer_types: linear_attention"),
    "inkling_text": ({}, "layer_types: hybrid, hybrid_sliding"),
    "qwen4_exp_text": ({}, "layer_types: indexed_attention"),
    "deepseek_v32": (LATENT, "index_topk"),
    "mllama": ({}, "cross_attention_layers"),
    "gemma3n": ({}, "embedders of its encoders"),
    "xlstm": ({}, "recurrent state"),
    "rwkv": ({**IDS, "hidden_size": 32, "num_hidden_layers": 2}, "recurrent state"),
    "bloom": ({**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi"),
    "mpt": ({**IDS, "d_model": 32, "n_layers": 2, "n_heads": 4}, "ALiBi"),
    "falcon": (SMALL, "AttentionInterface"),
    "gptj": ({**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4}, "AttentionInterface"),
    "minimax_m3_vl_text": (SIZES | {"index_n_heads": 2}, "indexer"),
    "diffllama": (SIZES, "attention twice"),
    "doge": (SIZES, "attention mask"),
    "hrm_text": (SIZES, "several times"),
    "t5": ({"vocab_size": 97, "d_model": 32, "num_layers": 2, "num_heads": 4}, "encoder-decoder"),
    "bart": ({"vocab_size": 97, "d_model": 32}, "encoder-decoder"),
    "bert": (SMALL, "encoder-only"),
    "roberta": (SMALL | {"is_decoder": True}, "encoder-only"),
    "bert-generation": (SMALL, "not causal"),
    "vit": ({"hidden_size": 32}, "no causal language model"),
}  # fmt: skip


@pytest.mark.parametrize("family", families.CONFIGS)
def test_every_family_that_runs_is_let_in(family: str) -> None:
    if families.is_absent(family):
        pytest.skip(f"this transformers has no {family}")
    config = CONFIG_MAPPING[family](**families.CONFIGS[family])
    assert unsupported_reason(config) is None
    assert check_supported(config) is None


@pytest.mark.parametrize("family", REJECTED)
def test_others_are_refused_with_the_feature_that_breaks(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    if family == "gptj" and not families.is_absent(family):
        pytest.skip("GPT-J attends through the interface from transformers 5.24 on, and runs")
    values, word = REJECTED[family]
    config = CONFIG_MAPPING[family](**values)
    with pytest.raises(UnsupportedModelError) as caught:
        check_supported(config)
    assert word in str(caught.value)
    assert repr(family) in str(caught.value)


@pytest.mark.parametrize("family", sorted(REJECTED.keys() - {"gptj", "vit"}))
def test_they_are_refused_before_weights_are_read(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint's config alone, by every way to load it; its file of weights has none of them."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    values, word = REJECTED[family]
    CONFIG_MAPPING[family](**values).save_pretrained(tmp_path)
    save_file({"none": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(hybridgen.loading.Checkpoint, "load", lambda self: pytest.fail("weights are read"))
    for call in (hybridgen.Engine.load, lambda path: hybridgen.generate(path, [5, 6])):
        with pytest.raises(UnsupportedModelError) as caught:
            call(str(tmp_path))
        assert word in str(caught.value)


@pytest.mark.slow
def test_every_type_that_does_not_run_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever transformers has for text, from its default config as a checkpoint's. What the config does not tell, but
    a model that is built without memory does, comes behind a look at the files' headers, which are others here."""
    tested = families.CONFIGS.keys() | multimodal.WHOLES.keys()
    monkeypatch.setattr(hybridgen.loading.Checkpoint, "load", lambda self: pytest.fail("weights are read"))
    refused = 0
    for name in sorted(
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES).keys() - tested
    ):
        path = tmp_path / name
        try:
            CONFIG_MAPPING[name]().save_pretrained(path)
        except Exception:  # a config class checks what it likes
            continue
        save_file({"none": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(hybridgen.HybridgenError) as caught:
            hybridgen.Engine.load(str(path))
        if isinstance(caught.value, UnsupportedModelError):
            assert f"a model of type {name!r} cannot run here: " in str(caught.value)
            refused += 1
        else:
            assert isinstance(caught.value, CheckpointError), name
    assert refused > 80


def test_falcon_with_alibi_names_alibi() -> None:
    assert "ALiBi" in str(unsupported_reason(CONFIG_MAPPING["falcon"](**SMALL, alibi=True)))


def test_composite_models_without_a_text_part_are_told_to_load_the_text_model() -> None:
    reason = str(unsupported_reason(CONFIG_MAPPING["git"]()))
    assert "vision_config" in reason
    assert "text model" in reason


@pytest.mark.parametrize("name", multimodal.WHOLES)
def test_the_text_part_of_multimodal_models_is_let_in(name: str) -> None:
    if multimodal.is_absent(name):
        pytest.skip(f"this transformers has no {name}")
    assert unsupported_reason(multimodal.config_of(name)) is None


def test_what_keeps_a_text_part_out_is_said() -> None:
    assert "attends to an encoder (cross_attention_layers" in str(unsupported_reason(CONFIG_MAPPING["mllama"]()))
    kosmos = CONFIG_MAPPING["kosmos-2.5"]()
    assert "embedders of its encoders" in str(unsupported_reason(CONFIG_MAPPING["gemma3n"]()))
    assert "of its text part: it counts its positions itself" in str(unsupported_reason(kosmos))
    quantised = multimodal.config_of("llava")
    quantised.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert "quantised" in str(unsupported_reason(quantised))


def test_a_multimodal_config_without_a_class_that_generates() -> None:
    shield = CONFIG_MAPPING["shieldgemma2"]()
    assert "no class that generates text with a multimodal model of type 'shieldgemma2'" in str(
        unsupported_reason(shield)
    )


def test_a_text_config_set_from_a_file_counts_too() -> None:
    assert "text_config" in str(unsupported_reason(LlamaConfig(**SIZES, text_config={"model_type": "llama"})))


def test_quantised_checkpoints_are_refused_by_method() -> None:
    config = LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantised \(quantization_config, method 'gptq'\)"):
        check_supported(config)
    assert unsupported_reason(LlamaConfig(**SIZES, quantization_config=None)) is None


def test_layer_types_of_a_known_class_are_read() -> None:
    config = LlamaConfig(**SIZES)
    config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in str(unsupported_reason(config))


class FakeConfig(PreTrainedConfig):
    model_type = "fake"


class FakeAttention(nn.Module):
    """Makes this file look to transformers like a model without the attention interface."""


class FakeModel(PreTrainedModel):
    config_class = FakeConfig


class StatefulModel(PreTrainedModel):
    config_class = FakeConfig
    _is_stateful = True


def test_remote_code_is_named_unless_it_is_trusted() -> None:
    config = FakeConfig(auto_map={"AutoConfig": "a.A", "AutoModelForCausalLM": "a.M"})
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
        check_supported(config)
    check_supported(config, trust_remote_code=True)
    with pytest.raises(UnsupportedModelError, match="no causal language model for FakeConfig"):
        check_supported(FakeConfig())


def test_a_given_class_is_checked_whatever_the_config_maps_to() -> None:
    from transformers import LlamaForCausalLM

    trusted = FakeConfig(auto_map={"AutoModelForCausalLM": "a.M"})
    assert unsupported_reason(FakeConfig(), model_class=LlamaForCausalLM) is None
    assert "AttentionInterface" in str(unsupported_reason(trusted, True, FakeModel))
    assert "recurrent state" in str(unsupported_reason(trusted, True, StatefulModel))


def test_no_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a parameter was made")

    monkeypatch.setattr(torch.nn.Parameter, "__new__", refuse)
    check_supported(CONFIG_MAPPING["llama"]())
