"""Quantised checkpoints: what they hold after unpacking, bit for bit, and Hugging Face's tokens with these values."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats as formats
import torch
from one_projection import INPUTS, Edit, read_one, write_one
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel, TorchAoConfig

import hybridgen
from hybridgen.errors import ConfigError
from hybridgen.loading import Checkpoint
from hybridgen.models.quantised import QuantisedLinear, quantised_modules, stack, why_not_stacked

LENGTHS = (7, 33, 1)
NEW_TOKENS = 12
DEQUANTISED = {"gptq desc_act", "ct nvfp4", "bnb nf4", "bnb nested nf4"}
SAMPLE = {
    "qwen3": "ct w4 group",
    "gemma3_text": "ct fp8 channel",
    "qwen2": "awq",
    "qwen3_moe": "ct w4 group",
    "mixtral": "ct fp8 channel",
    "phi3": "awq",
}
"""Families with the format that each is read in in every run."""
ODD = {"intermediate_size": 100}
"""No multiple of 8, nor of a group."""


def sizes(name: str) -> dict[str, int]:
    fits = name.startswith("ct") and name not in ("ct mxfp4", "ct nvfp4")
    return {"num_hidden_layers": 1, **(ODD if fits else {})}


def expected(model: PreTrainedModel) -> list[list[int]]:
    return [families.reference(model, prompt, NEW_TOKENS)[0] for prompt in families.prompts_of(LENGTHS)]


def tokens(engine: hybridgen.Engine) -> list[list[int]]:
    outs = engine.generate(families.prompts_of(LENGTHS), max_new_tokens=NEW_TOKENS)
    return [list(out.token_ids) for out in outs]


def check_values(loaded: PreTrainedModel, model: PreTrainedModel) -> list[QuantisedLinear]:
    """Every weight of the loaded model is the other's, bit for bit; returns the quantised ones."""
    quantised = dict(quantised_modules(loaded))
    for name, module in quantised.items():
        assert torch.equal(module.weight_stored.dequantise(), model.get_submodule(name).weight), name
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    return list(quantised.values())


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the packages that made the formats can be imported."""
    for name in ("compressed_tensors", "torchao", "bitsandbytes", "gptqmodel", "optimum", "awq", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_format_is_read_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = formats.write_family(tmp_path, "llama", name, **sizes(name))
    loaded = Checkpoint.open(tmp_path).load()
    assert len(check_values(loaded.model, model)) == (0 if name in DEQUANTISED else 7)
    # One says that activations are not rounded, the other that weights are dequantised.
    assert bool(loaded.notes) == (name in DEQUANTISED or "fp8" in name.split()[:1] or name == "bnb int8")
    layer = "model.layers.0."
    for reads_one in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        if name not in DEQUANTISED:
            weights = [loaded.model.get_submodule(layer + part).weight_stored for part in reads_one]
            assert why_not_stacked(weights) is None
            values = torch.cat([model.get_submodule(layer + part).weight for part in reads_one])
            assert torch.equal(stack(weights).dequantise(), values)


def values_of(file: Path, name: str, config: Mapping[str, Any] | None = None) -> Tensor:
    weight = read_one(file, name, config)
    return weight if isinstance(weight, Tensor) else weight.dequantise()


def renamed(old: str, new: str) -> Edit:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


SPELLINGS: list[tuple[str, dict[str, Any], Edit | None]] = [
    ("ct fp8 tensor", {"format": "naive-quantized", "quantization_status": "frozen"}, None),
    (
        "fp8 tensor",
        {"weight_block_size": ..., "activation_scheme": "static"},
        renamed("weight_scale_inv", "weight_scale"),
    ),
    ("gptq v1", {"checkpoint_format": None}, None),
    ("gptq v2", {"checkpoint_format": "GPTQ_V2"}, None),
    ("awq", {"version": None, "format": "GEMM"}, None),
    ("bnb int8", {"quant_method": ...}, None),
    ("bnb nf4", {}, lambda tensors: tensors.update(weight=tensors["weight"].view(-1, 2).view(torch.bfloat16))),
]
"""Of tools and of their earlier versions: what is other in the config (`...`: absent), and in the tensors."""


@pytest.mark.parametrize(("name", "changes", "edit"), SPELLINGS, ids=[each[0] for each in SPELLINGS])
def test_what_other_versions_of_tools_write(
    name: str, changes: dict[str, Any], edit: Edit | None, tmp_path: Path
) -> None:
    values = write_one(tmp_path / "part.safetensors", name, edit)
    config = {key: value for key, value in {**formats.FORMATS[name][1], **changes}.items() if value is not ...}
    assert torch.equal(values_of(tmp_path / "part.safetensors", name, config), values)


def test_groups_of_compressed_tensors_as_earlier_versions_name_them(tmp_path: Path) -> None:
    for name, changes in (
        ("ct w4 group", {"strategy": None}),
        ("ct fp8 tensor", {"strategy": None}),
        ("ct fp8 channel", {"strategy": "CHANNEL", "type": "FLOAT"}),
        ("ct fp8 block", {"block_structure": "32x32"}),
    ):
        config = formats.FORMATS[name][1]
        group = config["config_groups"]["group_0"]
        changed = {**config, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}
        values = write_one(tmp_path / "part.safetensors", name)
        assert torch.equal(values_of(tmp_path / "part.safetensors", name, changed), values), name


@pytest.mark.parametrize("name", ["ct w4 zeros", "ct w8 group"])
def test_groups_of_inputs_that_are_no_neighbours(name: str, tmp_path: Path) -> None:
    """compressed-tensors' actorder: `weight_g_idx` says which group an input is of; -1 says nothing."""

    def turned(tensors: dict[str, Tensor]) -> None:
        for part in {"weight_scale", "weight_zero_point"} & tensors.keys():
            tensors[part] = tensors[part].flip(1)

    def named(order: Tensor) -> Edit:
        return lambda tensors: tensors.update(weight_g_idx=order.int())

    file = tmp_path / "part.safetensors"
    values = write_one(file, name, named(torch.full((INPUTS,), -1)))
    assert torch.equal(values_of(file, name), values)
    write_one(file, name, turned)
    turned_values = values_of(file, name)
    write_one(file, name, named(torch.arange(INPUTS).flip(0) // 32))
    assert torch.equal(values_of(file, name), turned_values)


@pytest.mark.parametrize("kind", ["int8", "int8 groups", "fp8"])
def test_what_torchao_writes(kind: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int8 groups": lambda: quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(32)),
        "fp8": lambda: quantization.Float8WeightOnlyConfig(),
    }[kind]()
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    theirs = AutoModelForCausalLM.from_pretrained(path, quantization_config=TorchAoConfig(config), dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "quantised")
    found = dict(quantised_modules(Checkpoint.open(tmp_path / "quantised").load().model))
    assert len(found) == 14
    for name, module in found.items():
        assert torch.equal(module.weight_stored.dequantise(), theirs.get_submodule(name).weight.dequantize()), name


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if name == sample else pytest.mark.slow)
        for family, sample in SAMPLE.items()
        for name in ("ct w4 group", "ct fp8 channel", "awq")
    ],
)
def test_families(family: str, name: str, tmp_path: Path) -> None:
    short = {"layer_types": families.FAMILIES[family]["layer_types"][:2]} if family == "gemma3_text" else {}
    model = formats.write_family(tmp_path, family, name, num_hidden_layers=2, **short)
    loaded = Checkpoint.open(tmp_path).load()
    assert check_values(loaded.model, model)
    assert any("dequantised" in note for note in loaded.notes) == (family == "mixtral")
    wanted = expected(model)
    # Compiled layers of Qwen3 only: Gemma 3's are with the other formats.
    whole = family == "qwen3" or (family == "gemma3_text" and name == "ct w4 group")
    modes = ("eager", "graph", "jit", "hybrid") if whole else ("eager", "graph")
    for mode in modes:
        with hybridgen.Engine.load(tmp_path, mode=mode, compile_backend="eager", **formats.SETTINGS) as engine:
            assert tokens(engine) == wanted, mode


def test_shards_and_groups_of_several_formats(tmp_path: Path) -> None:
    """Four bits for most projections, FP8 for one by its pattern, one by its name in 8 bits, one layer left alone."""
    parts = {
        "group_0": ("ct w4 group", "Linear"),
        "group_1": ("ct fp8 channel", r"re:.*(down|up)_proj$"),
        "group_2": ("ct w8 group", "model.layers.1.mlp.up_proj"),
    }
    model = families.build("llama", num_hidden_layers=3)
    formats.write_parts(tmp_path, model, parts, ("lm_head", r"re:.*layers\.2\..*"), shard="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    found = check_values(Checkpoint.open(tmp_path).load().model, model)
    assert sorted(module.kind for module in found) == ["fp8"] * 3 + ["int4"] * 10 + ["int8"]
    with hybridgen.Engine.load(tmp_path, mode="graph", **formats.SETTINGS) as engine:
        assert tokens(engine) == expected(model)


def test_a_quantised_head_and_tied_embeddings(tmp_path: Path) -> None:
    writer, config = formats.FORMATS["ct fp8 channel"]
    for tied in (False, True):
        model = families.build("llama", num_hidden_layers=2, tie_word_embeddings=tied)
        path = tmp_path / str(tied)
        wanted = {**config, "ignore": []}
        formats.write(path, model, lambda n: writer if formats.projections(n) or n == "lm_head" else None, wanted)
        loaded = Checkpoint.open(path).load().model
        assert isinstance(loaded.get_output_embeddings(), QuantisedLinear) != tied
        check_values(loaded, model)
        with hybridgen.Engine.load(path, **formats.SETTINGS) as engine:
            assert tokens(engine) == expected(model)


def test_joined_projections_keep_their_values(tmp_path: Path) -> None:
    """Scales of 32 x 32 stay blocks where they fit, and become rows where they do not."""
    for name in ("ct fp8 block", "ct fp8 odd block", "ct fp8 tensor"):
        model = formats.write_family(tmp_path / name, "llama", name, **sizes(name))
        with hybridgen.Engine.load(tmp_path / name, **formats.SETTINGS) as engine:
            modules = dict(quantised_modules(engine._runner.bound.model))
            assert sum(type(module).__name__ == "QuantisedHead" for module in modules.values()) == 2
            for at, module in modules.items():
                assert torch.equal(module.weight_stored.dequantise(), model.get_submodule(at).weight), (name, at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_dequantises_fine_grained_fp8_alike(tmp_path: Path, dtype: torch.dtype) -> None:
    formats.write_family(tmp_path, "qwen3", "fp8 block", num_hidden_layers=2)
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    oracle.to(dtype)
    loaded = Checkpoint.open(tmp_path, hybridgen.EngineConfig(dtype=str(dtype), device="cpu")).load().model
    check_values(loaded, oracle)


@pytest.mark.parametrize("name", ["bnb nf4", "bnb nested nf4"])
def test_bitsandbytes_dequantises_alike(tmp_path: Path, name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    model = formats.write_family(tmp_path, "llama", name, num_hidden_layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    start = "model.layers.0.mlp.up_proj.weight"
    parts = {at.removeprefix(f"{start}."): tensor for at, tensor in tensors.items() if at.startswith(f"{start}.")}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    state.dtype = torch.float32
    values = functional.dequantize_4bit(tensors[start], state)
    torch.testing.assert_close(model.get_parameter(start), values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in formats.FORMATS if name.startswith("ct") and "short" not in name])
def test_compressed_tensors_dequantises_alike(tmp_path: Path, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    formats.write_family(tmp_path, "llama", name, num_hidden_layers=1)
    kept = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    kept.pop("quant_method")
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(**kept, dequantize=True)
    )
    loaded = Checkpoint.open(tmp_path, hybridgen.EngineConfig(dtype="bfloat16", device="cpu")).load().model
    check_values(loaded, oracle)


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    with pytest.raises(ConfigError, match="quantised already \\(compressed-tensors\\)"):
        Checkpoint.open(tmp_path, hybridgen.EngineConfig(quantization="fp8"))


def test_what_a_quantised_model_says_of_itself(tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 zeros", num_hidden_layers=2)
    with hybridgen.Engine.load(tmp_path, **formats.SETTINGS) as engine:
        shown = str(engine._runner.bound.model)
        assert "int4 float32 in blocks of 1x32, 4.75 bits a weight" in shown
        stats = engine.stats()
        projections = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
        others = (64 * families.VOCAB + 5 * 64) * 4
        assert engine.traffic.weights == projections * 4.75 / 8 + others
        assert stats.weights == {
            "int4 float32 in blocks of 1x32": (14, 4.75, None),
            "dense float32": (1, 32.0, None),
        }
        assert "14 projections int4 float32 in blocks of 1x32, 4.75 bits a weight" in str(stats)
