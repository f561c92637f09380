"""`quantization=` and `quantize_head=`: what is quantised while a checkpoint is read, and what is not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats as formats
import torch
from transformers import PreTrainedModel

import hybridgen
from hybridgen.errors import CheckpointError, ConfigError, UnsupportedModelError
from hybridgen.loading import Checkpoint
from hybridgen.models.quantised import QuantisedLinear, quantised_modules
from hybridgen.models.rounding import quantise

LENGTHS = (7, 33, 1)


def load(path: Path, **fields: Any) -> PreTrainedModel:
    return Checkpoint.open(path, hybridgen.EngineConfig(device="cpu", **fields)).load().model


def by_hand(model: PreTrainedModel, kind: str, names: list[str]) -> PreTrainedModel:
    """The model with the values of its quantised projections."""
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight.copy_(quantise(weight, kind, torch.float32).dequantise())
    return model


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_mode_generates_the_tokens_of_the_rounded_weights(kind: str, family: str, tmp_path: Path) -> None:
    depth = families.depth(family)
    path, model = families.write(family, tmp_path, **depth), families.build(family, **depth)
    found = dict(quantised_modules(load(path, quantization=kind)))
    assert sorted(found) == sorted(name for name, _ in model.named_modules() if name.endswith("_proj"))
    by_hand(model, kind, list(found))
    wanted = [tokens for tokens, _ in families.references(model, families.prompts_of(LENGTHS), 12)]
    modes = ("eager", "graph", "jit", "hybrid") if (kind, family) == ("int4", "llama") else ("eager", "graph")
    for mode in modes:
        # Inductor's code for such products is what test_format_modes.py is about.
        with hybridgen.Engine.load(
            path, mode=mode, quantization=kind, compile_backend="eager", **formats.SETTINGS
        ) as engine:
            outs = engine.generate(families.prompts_of(LENGTHS), max_new_tokens=12)
            assert [list(out.token_ids) for out in outs] == wanted, mode
            name, row = next(iter(engine.stats().weights.items()))
            assert name.startswith(kind)
            assert row.error == pytest.approx({"fp8": 0.026, "int8": 0.006, "int4": 0.09}[kind], rel=0.3)
            assert f"relative error of {row.error:.2g}" in str(engine.stats())


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_what_mixers_multiply_by_themselves_stays(family: str, tmp_path: Path) -> None:
    path = families.write(family, tmp_path)
    found = dict(quantised_modules(load(path, quantization="int8")))
    names = {name.rpartition(".")[2] for name in found}
    assert "dt_proj" not in names
    assert {"in_proj", "x_proj", "out_proj"} <= names
    assert not any("weight" in vars(module) for module in found.values())
    model = by_hand(families.build(family), "int8", list(found))
    wanted = [families.reference(model, prompt, 12)[0] for prompt in families.prompts_of(LENGTHS)]
    with hybridgen.Engine.load(path, mode="eager", quantization="int8", **formats.SETTINGS) as engine:
        outs = engine.generate(families.prompts_of(LENGTHS), max_new_tokens=12)
        assert [list(out.token_ids) for out in outs] == wanted


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_quantised_on_request(tied: bool, tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, tie_word_embeddings=tied)
    assert not isinstance(load(path, quantization="int8").get_output_embeddings(), QuantisedLinear)
    loaded = load(path, quantize_head="fp8")
    assert [name for name, _ in quantised_modules(loaded)] == ["lm_head"]
    model = families.build("llama", tie_word_embeddings=tied)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    head = loaded.get_output_embeddings()
    assert torch.equal(
        head.weight_stored.dequantise(), quantise(model.lm_head.weight, "fp8", torch.float32).dequantise()
    )
    if tied:  # the copies in Hugging Face's model are to differ too
        model.lm_head = copy.deepcopy(model.lm_head)
    by_hand(model, "fp8", ["lm_head"])
    with hybridgen.Engine.load(path, quantize_head="fp8", **formats.SETTINGS) as engine:
        [out] = engine.generate(families.prompts_of((7,)), max_new_tokens=12)
    assert list(out.token_ids) == families.reference(model, families.prompts_of((7,))[0], 12)[0]


def test_the_head_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    kinds = {name: module.kind for name, module in quantised_modules(load(tmp_path, quantize_head="int8"))}
    assert kinds.pop("lm_head") == "int8"
    assert set(kinds.values()) == {"int4"}


def test_a_head_that_is_quantised_already_stays_and_it_is_said(tmp_path: Path) -> None:
    writer, config = formats.FORMATS["ct fp8 channel"]
    model = families.build("llama", num_hidden_layers=1)
    formats.write(tmp_path, model, lambda name: writer if name == "lm_head" else None, {**config, "ignore": []})
    loaded = Checkpoint.open(tmp_path, hybridgen.EngineConfig(device="cpu", quantize_head="int8")).load()
    assert [module.kind for _, module in quantised_modules(loaded.model)] == ["fp8"]
    assert loaded.notes == {"the head stays as it is: the checkpoint's is quantised already": 1}


def test_routers_and_experts_stay_as_they_are(tmp_path: Path) -> None:
    path = families.write("qwen2_moe", tmp_path)
    opened = Checkpoint.open(path, hybridgen.EngineConfig(device="cpu", quantization="int8"))
    loaded = opened.load()
    names = [name for name, _ in quantised_modules(loaded.model)]
    assert any("shared_expert.up_proj" in name for name in names)
    assert not any("gate" in name.rpartition(".")[2] and "gate_proj" not in name for name in names)
    assert any("experts' weights are not quantised" in note for note in loaded.notes)


def test_int4_warns_of_its_error(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    with (
        pytest.warns(RuntimeWarning, match="calibrated"),
        hybridgen.Engine.load(path, quantization="int4", **formats.SETTINGS) as engine,
    ):
        assert any("calibrated" in reason for reason in engine.stats().fallbacks)


def test_the_compile_caches_key_knows(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    asked: list[dict[str, Any]] = [{}, {"quantization": "fp8"}, {"quantization": "int8"}, {"quantize_head": "fp8"}]
    found = {Checkpoint.open(path, hybridgen.EngineConfig(device="cpu", **fields)).formats for fields in asked}
    assert len(found) == len(asked)
    assert {"quantization", "quantize_head"} <= set(hybridgen.EngineConfig.key_fields())
    for name in ("ct w4 group", "ct w4 zeros"):
        formats.write_family(tmp_path / name, "llama", name, num_hidden_layers=2)
        found.add(Checkpoint.open(tmp_path / name, hybridgen.EngineConfig(device="cpu")).formats)
    assert len(found) == len(asked) + 2


def test_what_cannot_be_quantised(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    with pytest.raises(ConfigError, match="quantization='int2' is unknown; choose one of: fp8, int8, int4"):
        hybridgen.EngineConfig(quantization="int2")
    with pytest.raises(ConfigError, match="are for checkpoints, and this model is in memory already"):
        Checkpoint.open(families.build("llama"), hybridgen.EngineConfig(quantization="fp8"))
    model = families.build("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(path)
    with pytest.raises(CheckpointError, match=r"safetensors: 'model.layers.1.mlp.up_proj.weight' cannot be quantised"):
        load(path, quantization="int8")
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="safetensors files alone"):
        load(path, quantization="int8", allow_pickle=True)


def test_a_config_keeps_its_quantization_config_out_of_the_model(tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    assert not hasattr(load(tmp_path).config, "quantization_config")


@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_activations_are_rounded_where_there_are_many(mode: str, tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    settings = formats.SETTINGS | {"mode": mode, "quantization": "fp8", "token_budget": 400, "max_context": 400}
    prompts = families.prompts_of((300, 20))
    found = dict(quantised_modules(load(path, quantization="fp8")))
    model = by_hand(families.build("llama", num_hidden_layers=2), "fp8", list(found))
    plain = [families.reference(model, prompt, 8)[0] for prompt in prompts]

    def rounded(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        (x,) = inputs
        if x.shape[1] <= 256:
            return None
        scales = x.abs().amax(-1, keepdim=True) / 448
        return (x / scales).to(torch.float8_e4m3fn).float() * scales

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
    wanted = [families.reference(model, prompt, 8)[0] for prompt in prompts]
    assert wanted[0] != plain[0]  # else nothing is shown
    with hybridgen.Engine.load(path, fp8_activations=True, **settings) as engine:
        assert [list(engine.generate(prompt, max_new_tokens=8).token_ids) for prompt in prompts] == wanted
        assert not engine.stats().fallbacks


def test_activations_need_weights_that_take_them(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path)
    with pytest.raises(ConfigError, match="has no FP8 weights"):
        hybridgen.Engine.load(path, fp8_activations=True, **formats.SETTINGS)
    with pytest.raises(ConfigError, match="because they are not FP8"):
        hybridgen.Engine.load(path, fp8_activations=True, quantization="int8", **formats.SETTINGS)
