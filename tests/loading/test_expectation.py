"""What files hold is compared with what the model expects, before weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hybridgen import CheckpointError, Engine, EngineConfig, UnsupportedModelError
from hybridgen.loading import Checkpoint

EditJson = Callable[..., None]
Tensors = dict[str, torch.Tensor]


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if not request.node.name.startswith("test_loads"):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool]
)
def test_codes_in_place_of_weights(whole: Path, dtype: torch.dtype) -> None:
    rewrite(whole, lambda t: {name: value.to(dtype) if "proj" in name else value for name, value in t.items()})
    with pytest.raises(
        UnsupportedModelError, match=r"quantised or broken: model\.layers\.0\.mlp\.down_proj\.weight is"
    ):
        Checkpoint.open(whole)


def test_codes_in_place_of_the_embedding(whole: Path) -> None:
    rewrite(whole, lambda t: {name: value.to(torch.int16) if "embed" in name else value for name, value in t.items()})
    with pytest.raises(UnsupportedModelError, match=r"quantised or broken: model\.embed_tokens\.weight is"):
        Checkpoint.open(whole)


def test_packed_names_in_place_of_weights(whole: Path) -> None:
    rewrite(whole, lambda t: {name.replace("q_proj.weight", "q_proj.weight_packed"): t[name] for name in t})
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.weight_packed"):
        Checkpoint.open(whole)


@pytest.mark.parametrize(
    "suffix",
    [
        "weight_scale",
        "weight_scale_inv",
        "scales",
        "input_scale",
        "qweight",
        "SCB",
        "weight.absmax",
        "weight.quant_state.bitsandbytes__nf4",
        "weight_zero_point",
    ],
)
def test_scales_beside_weights(whole: Path, suffix: str) -> None:
    rewrite(whole, lambda t: t | {f"model.layers.0.self_attn.k_proj.{suffix}": torch.ones(1)})
    with pytest.raises(UnsupportedModelError, match=rf"beside them are model\.layers\.0\.self_attn\.k_proj\.{suffix}"):
        Checkpoint.open(whole)


def test_codes_and_scales_of_experts_that_are_joined_while_loading(tmp_path: Path) -> None:
    path = families.write("mixtral", tmp_path)
    rewrite(path, lambda t: t | {name + "_scale": torch.ones(1) for name in t if ".experts." in name})
    with pytest.raises(UnsupportedModelError, match=r"beside them are .*\.experts\.0\.\w+\.weight_scale"):
        Checkpoint.open(path)
    rewrite(
        path,
        lambda t: {
            name: value.to(torch.int8) if ".experts." in name else value
            for name, value in t.items()
            if not name.endswith("_scale")
        },
    )
    with pytest.raises(UnsupportedModelError, match=r"quantised or broken: .*\.experts\.0\."):
        Checkpoint.open(path)


def test_blocks_in_place_of_experts(tmp_path: Path) -> None:
    path = families.write("gpt_oss", tmp_path)
    rewrite(
        path,
        lambda t: {
            new: value.clone()
            for name, value in t.items()
            for new in ([name + "_blocks", name + "_scales"] if name.endswith("experts.down_proj") else [name])
        },
    )
    with pytest.raises(UnsupportedModelError, match=r"beside them are .*experts\.down_proj_blocks"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}),
        ("hf_quant_config.json", {}),
        ("quantize_config.json", {"bits": 4, "group_size": 128}),
        ("quant_config.json", {"w_bit": 4}),
    ],
)
def test_files_of_quantisers(whole: Path, name: str, content: dict[str, Any]) -> None:
    (whole / name).write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match=f"quantised weights \\({name}"):
        Checkpoint.open(whole)


def test_loads_what_is_quantised_for_another_engines_cache_alone(whole: Path) -> None:
    content = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (whole / "hf_quant_config.json").write_text(json.dumps(content))
    rewrite(whole, lambda t: t | {"model.layers.0.self_attn.k_scale": torch.ones(1)})
    Checkpoint.open(whole).load()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 5_000_000}, r"embed_tokens.weight is \[257, 64\], the config says \[5000000, 64\]"),
        ({"intermediate_size": 10**9}, r"the config says \[1000000000, 64\]"),
        ({"num_hidden_layers": 20_000}, "asks for 20000 layers, and its files hold weights of 2 layers"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers=1000000 is more than any model has"),
        ({"num_hidden_layers": 3}, "lacks 9 weights that its config asks for: model.layers.2"),
        ({"hidden_size": 2**62}, "no model can be built|other shapes"),
        ({"hidden_size": 0}, "other shapes"),
        ({"vocab_size": -5}, "vocab_size=-5"),
        ({"head_dim": 10**9}, "other shapes"),
        ({"num_attention_heads": 10**8, "num_key_value_heads": 10**8}, "config.json"),
        ({"num_key_value_heads": 0}, "no multiple of num_key_value_heads=0"),
        ({"num_key_value_heads": -2}, "no multiple of num_key_value_heads=-2"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
    ],
)
def test_a_config_of_another_model(whole: Path, edit_json: EditJson, change: dict[str, int], words: str) -> None:
    edit_json(whole / "config.json", **change)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words):
        Checkpoint.open(whole)


def test_a_model_of_far_more_parts_than_the_files_have_is_not_built_on(tmp_path: Path, edit_json: EditJson) -> None:
    """Layers are not all that a config can have many of: experts, each with weights of its own."""
    path = families.write("mixtral", tmp_path)
    edit_json(path / "config.json", num_local_experts=90_000)
    with pytest.raises(CheckpointError, match=r"do not belong together|other shapes|lacks"):
        Checkpoint.open(path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "phi3", "gpt2", "opt", "gpt_neox"])
def test_loads_families_whose_names_on_disk_are_others(tmp_path: Path, family: str) -> None:
    Checkpoint.open(families.write(family, tmp_path)).load()


def test_loads_nothing_whose_names_have_a_wrappers_before_them(whole: Path) -> None:
    rewrite(whole, lambda t: {f"module.{name}": value for name, value in t.items()})
    with pytest.raises(CheckpointError, match="lacks 21 weights"):
        Checkpoint.open(whole).load()


def test_a_base_model_without_its_head(whole: Path) -> None:
    rewrite(whole, lambda t: {name: value for name, value in t.items() if name != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights that its config asks for: lm_head\.weight"):
        Checkpoint.open(whole)


def test_loads_the_first_gpt2s_file(tmp_path: Path) -> None:
    """Its keys lack the prefix, it has the masks of its attention, and no head."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    tensors = {
        name.removeprefix("transformer."): value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith("lm_head")
    }
    for kind in (torch.float32, torch.uint8, torch.bool):
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32, dtype=kind) for layer in range(2)}
        save_file(tensors | masks, tmp_path / "model.safetensors")
        loaded = Checkpoint.open(tmp_path).load().model
        assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


def test_bin_files_are_held_against_the_model_too(whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    torch.save(tensors, whole / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight is"):
        Checkpoint.open(whole, EngineConfig(allow_pickle=True))


@pytest.mark.parametrize(("heads", "shared"), [(4, 3), (4, 8), (8, 3)])
def test_loads_no_live_module_whose_heads_do_not_divide(heads: int, shared: int) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=heads, num_key_value_heads=shared,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match=f"num_attention_heads={heads} is no multiple"):
        Engine.load(model)
    del config.num_key_value_heads  # the module says it all the same
    model.config.num_key_value_heads = heads
    with pytest.raises(UnsupportedModelError):
        Engine.load(model, fuse_projections=False)


def test_a_context_whose_page_table_fits_nowhere(whole: Path, edit_json: EditJson) -> None:
    edit_json(whole / "config.json", max_position_embeddings=2**40)
    with pytest.raises(Exception, match=r"a context of 1099511627776 tokens .* set max_context"):
        Engine.load(whole)


def test_loads_with_a_context_of_the_users_where_the_models_is_absurd(whole: Path, edit_json: EditJson) -> None:
    edit_json(whole / "config.json", max_position_embeddings=2**62)
    with Engine.load(whole, mode="eager", max_context=64) as engine:
        assert len(engine.generate([5, 6], max_new_tokens=3, ignore_eos=True).token_ids) == 3
