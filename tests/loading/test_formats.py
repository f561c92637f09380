"""Quantised checkpoints: what they hold after unpacking, bit for bit, and Hugging Face's tokens with these values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats as formats
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel, TorchAoConfig

import hybridgen
from hybridgen.errors import CheckpointError, ConfigError, EngineError, UnsupportedModelError
from hybridgen.kernels.linear.experts import expert_values, experts
from hybridgen.loading import Checkpoint
from hybridgen.models import experts_check
from hybridgen.models.packed_experts import PackedExperts
from hybridgen.models.quantised import QuantisedLinear, quantised_modules

EditJson = Callable[..., None]
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_batch": 4,
    "page_size": 16,
    "token_budget": 96,
    "kv_memory": "16MiB",
    "max_context": 96,
}
LENGTHS = (7, 33, 1)
NEW_TOKENS = 12
DEQUANTISED = {"gptq desc_act", "ct nvfp4", "bnb nf4", "bnb nested nf4"}
ODD = {"intermediate_size": 100}
"""No multiple of 8, nor of a group."""


def sizes(name: str) -> dict[str, int]:
    fits = name.startswith("ct") and name not in ("ct mxfp4", "ct nvfp4")
    return {"num_hidden_layers": 2, **(ODD if fits else {})}


def expected(model: PreTrainedModel) -> list[list[int]]:
    return [tokens for tokens, _ in families.references(model, families.prompts_of(LENGTHS), NEW_TOKENS)]


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


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_format_is_read_bit_for_bit_and_generates_its_tokens(name: str, tmp_path: Path) -> None:
    model = formats.write_family(tmp_path, "llama", name, **sizes(name))
    found = check_values(Checkpoint.open(tmp_path).load().model, model)
    assert len(found) == (0 if name in DEQUANTISED else 14)
    wanted = expected(model)
    for mode in ("eager", "graph"):
        with hybridgen.Engine.load(tmp_path, mode=mode, **SETTINGS) as engine:
            assert tokens(engine) == wanted, mode
            assert bool(engine.stats().fallbacks) == (name in DEQUANTISED or "fp8" in name.split()[:1])


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("jit", "ct w4 zeros"),
        ("jit", "fp8 block"),
        ("jit", "ct int8 channel"),
        ("hybrid", "ct w4 zeros"),
        pytest.param("hybrid", "fp8 block", marks=pytest.mark.slow),
        pytest.param("hybrid", "ct int8 channel", marks=pytest.mark.slow),
    ],
)
def test_compiled_modes_generate_the_same(mode: str, name: str, tmp_path: Path) -> None:
    # A step is compiled with all of its layers.
    model = formats.write_family(tmp_path, "llama", name, num_hidden_layers=1 if mode == "hybrid" else 2)
    more: dict[str, Any] = {"decode_buckets": [4], "lazy_capture": False, "max_padding_ratio": 64}
    more = more if mode == "hybrid" else {}
    if mode == "jit" and name != "ct w4 zeros":  # their products are one op to Inductor, as its is
        more = {"compile_backend": "aot_eager"}
    with hybridgen.Engine.load(tmp_path, mode=mode, **SETTINGS, **more) as engine:
        assert tokens(engine) == expected(model)
        stats = engine.stats()
        if mode == "jit":
            assert stats.compiled
            assert not stats.late_compiles
        else:  # whole decode steps, which another process compiles
            assert "compiled step" in {row.owner for row in stats.graphs.graphs}
            assert any("compiled step" in kind for phase, kind, _ in stats.steps if phase == "decode")


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


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen2", "qwen3_moe", "mixtral", "phi3"])
@pytest.mark.parametrize("name", ["ct w4 group", "ct fp8 channel", "awq"])
def test_families(family: str, name: str, tmp_path: Path) -> None:
    model = formats.write_family(tmp_path, family, name)
    loaded = Checkpoint.open(tmp_path).load()
    assert check_values(loaded.model, model)
    assert any("dequantised" in note for note in loaded.notes) == (family == "mixtral")
    wanted = expected(model)
    for mode in ("eager", "graph"):
        with hybridgen.Engine.load(tmp_path, mode=mode, **SETTINGS) as engine:
            assert tokens(engine) == wanted, mode


@pytest.mark.parametrize(
    "name",
    [
        "fp8 block",
        "ct w4 zeros",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("ct fp8 channel", "ct fp8 tensor", "ct mxfp4", "awq")),
    ],
)
def test_experts_that_are_stored_one_by_one(name: str, tmp_path: Path) -> None:
    """They are run as they are stored, from one tensor for a layer."""
    model = formats.write_family(tmp_path, "qwen3_moe", name, moe_intermediate_size=96)
    loaded = Checkpoint.open(tmp_path).load()
    check_values(loaded.model, model)
    assert not any("dequantised" in note for note in loaded.notes)
    packed = {path: one for path, one in loaded.model.named_modules() if isinstance(one, PackedExperts)}
    assert len(packed) == model.config.num_hidden_layers
    for path, module in packed.items():
        stored, own = module.weights_stored, model.get_submodule(path)
        block = stored.block
        for one, wanted in ((stored.gate_up, own.gate_up_proj), (stored.down, own.down_proj)):
            for expert, values in enumerate(wanted):
                found = expert_values(one, expert, stored.kind, values.shape[1], block, False, torch.float32)
                assert torch.equal(found, values)
    wanted_tokens = expected(model)
    for mode in ("eager", "graph"):
        with hybridgen.Engine.load(tmp_path, mode=mode, **SETTINGS) as engine:
            assert tokens(engine) == wanted_tokens, mode


def write_mxfp4_experts(path: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A gpt-oss checkpoint as OpenAI writes it; the model with its values, and these by name."""
    model = families.build("gpt_oss", **families.ALIKE)
    model.save_pretrained(path)
    g = torch.Generator().manual_seed(0)
    out, plain = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            out[name] = plain[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        packed, scales, values = formats._mxfp4((experts, outputs), inputs, g)
        out[f"{name}_blocks"] = packed.view(experts, outputs, inputs // 32, 16)
        out[f"{name}_scales"] = scales
        plain[name] = values.transpose(1, 2).contiguous()
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "mxfp4"}}))
    formats.fill(model, plain)
    return model, plain


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    """They stay as they are stored, and every mode generates what their values do."""
    model, plain = write_mxfp4_experts(tmp_path)
    loaded = Checkpoint.open(tmp_path).load()
    check_values(loaded.model, model)
    assert not loaded.notes
    packed = {name: one for name, one in loaded.model.named_modules() if isinstance(one, PackedExperts)}
    assert len(packed) == 2
    for name, module in packed.items():
        stored = module.weights_stored
        for part, one, inputs in (("gate_up", stored.gate_up, 64), ("down", stored.down, 96)):
            wanted = plain[f"{name}.{part}_proj"]
            for expert in range(4):
                values = expert_values(one, expert, "mxfp4", inputs, stored.block, False, torch.float32)
                assert torch.equal(values, wanted[expert].t())
    wanted_tokens = expected(model)
    for mode in ("eager", "graph", "jit"):
        with hybridgen.Engine.load(tmp_path, mode=mode, compile_backend="eager", **SETTINGS) as engine:
            assert tokens(engine) == wanted_tokens, mode
            assert not engine.stats().fallbacks
            assert not engine.stats().late_compiles


def test_experts_in_mxfp4_are_refused_where_their_kernel_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mxfp4_experts(tmp_path)
    rows: list[int] = []

    def right(x: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(x.shape[0])
        return experts(x, *others)

    monkeypatch.setattr(experts_check, "wants_check", lambda device: True)
    monkeypatch.setattr(experts_check, "experts", right)
    with hybridgen.Engine.load(tmp_path, mode="graph", **SETTINGS) as engine:
        assert rows == [1, 8, 65]  # layers of a kind are checked once
        assert not engine.stats().fallbacks
    monkeypatch.setattr(experts_check, "experts", lambda x, *others: experts(x, *others) * 1.1)
    with pytest.raises(EngineError, match=r"experts in mxfp4 do not run on cpu: of 1 random tokens .* off by 0.1;"):
        hybridgen.Engine.load(tmp_path, mode="graph", **SETTINGS)
    with hybridgen.Engine.load(tmp_path, mode="eager", **SETTINGS) as engine:
        assert not engine.stats().fallbacks


@pytest.mark.parametrize("still_wrong", [False, True])
def test_a_wrong_kernel_of_one_token_is_left_to_others(
    still_wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed experts are refused where the other kernels are wrong, too."""
    refused: list[str] = []

    def refuse(kernel: str, device: torch.device) -> bool:
        refused.append(kernel)
        return len(refused) == 1

    def trial(x: torch.Tensor, *others: Any) -> torch.Tensor:
        wrong = x.shape[0] == 1 and (still_wrong or not refused)
        return experts(x, *others) * (1.05 if wrong else 1)

    monkeypatch.setattr(experts_check, "wants_check", lambda device: True)
    monkeypatch.setattr(experts_check, "experts", trial)
    monkeypatch.setattr(experts_check, "refuse", refuse)
    write_mxfp4_experts(tmp_path)
    if still_wrong:
        with pytest.raises(EngineError, match=r"off by 0\.05"):
            hybridgen.Engine.load(tmp_path, mode="graph", **SETTINGS)
        return
    with (
        pytest.warns(RuntimeWarning, match="take a slower kernel: of 1 random tokens"),
        hybridgen.Engine.load(tmp_path, mode="graph", **SETTINGS) as engine,
    ):
        assert any("experts of one token" in why for why in engine.stats().fallbacks)
    assert refused == ["experts_one"]


def test_experts_whose_code_is_another_are_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = write_mxfp4_experts(tmp_path)
    monkeypatch.setattr("hybridgen.loading.quantised.probe", lambda module: None)
    loaded = Checkpoint.open(tmp_path).load()
    check_values(loaded.model, model)
    assert sum(count for note, count in loaded.notes.items() if "experts" in note) == 4


def test_shards_and_groups_of_several_formats(tmp_path: Path) -> None:
    """Four bits for most projections, FP8 for one by its pattern, one by its name in 8 bits, one layer left alone."""
    model = families.build("llama", num_hidden_layers=3)
    w4, config = formats.FORMATS["ct w4 group"]
    fp8, other = formats.FORMATS["ct fp8 channel"]
    w8, third = formats.FORMATS["ct w8 group"]
    named = "model.layers.1.mlp.up_proj"
    config = {
        **config,
        "format": "mixed-precision",
        "ignore": ["lm_head", r"re:.*layers\.2\..*"],
        "config_groups": {
            "group_0": {**config["config_groups"]["group_0"], "format": "pack-quantized"},
            "group_1": {
                **other["config_groups"]["group_0"],
                "targets": [r"re:.*(down|up)_proj$"],
                "format": "float-quantized",
            },
            "group_2": {**third["config_groups"]["group_0"], "targets": [named], "format": "pack-quantized"},
        },
    }

    def writer(owner: str) -> formats.Writer | None:
        if not formats.projections(owner) or "layers.2." in owner:
            return None
        if owner == named:
            return w8
        return fp8 if owner.endswith(("down_proj", "up_proj")) else w4

    formats.write(tmp_path, model, writer, config, shard="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    found = check_values(Checkpoint.open(tmp_path).load().model, model)
    assert sorted(module.kind for module in found) == ["fp8"] * 3 + ["int4"] * 10 + ["int8"]
    with hybridgen.Engine.load(tmp_path, mode="graph", **SETTINGS) as engine:
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
        with hybridgen.Engine.load(path, **SETTINGS) as engine:
            assert tokens(engine) == expected(model)


def test_only_eager_steps_dequantise_by_themselves(tmp_path: Path) -> None:
    """The others go through the op, which has kernels; a live module's are its engine's, not its owner's."""
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    owned = Checkpoint.open(tmp_path, hybridgen.EngineConfig(device="cpu")).load().model
    for source in (tmp_path, owned):
        for mode in ("eager", "graph"):
            with hybridgen.Engine.load(source, mode=mode, **SETTINGS) as engine:
                modules = [module for _, module in quantised_modules(engine._runner.bound.model)]
                assert {module.dequantises for module in modules} == {mode == "eager"}
    assert not any(module.dequantises for _, module in quantised_modules(owned))


def test_joined_projections_keep_their_values(tmp_path: Path) -> None:
    """Scales of 32 x 32 stay blocks where they fit, and become rows where they do not."""
    for name in ("ct fp8 block", "ct fp8 odd block", "ct fp8 tensor"):
        model = formats.write_family(tmp_path / name, "llama", name, **sizes(name))
        with hybridgen.Engine.load(tmp_path / name, **SETTINGS) as engine:
            modules = dict(quantised_modules(engine._runner.bound.model))
            assert sum(type(module).__name__ == "QuantisedHead" for module in modules.values()) == 4
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


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


KEY = "model.layers.1.self_attn.k_proj"


def poison(part: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{KEY}.{part}"].view(-1)[1] = value

    return edit


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{KEY}.{part}"]

    return edit


def swap(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{KEY}.{part}": make(tensors[f"{KEY}.{part}"]).contiguous()})


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("ct w4 group", drop("weight_scale"), "weight_scale' is missing"),
        ("ct w4 group", swap("weight_scale", lambda t: t[:, :1]), r"weight_scale' is \[32, 1\], and must be \[32, 2\]"),
        (
            "ct w4 group",
            swap("weight_scale", lambda t: t.int()),
            "weight_scale' is I32, and must be BF16 or F16 or F32",
        ),
        ("ct w4 group", swap("weight_packed", lambda t: t[:, 1:]), r"weight_shape' holds \[32, 64\]"),
        ("ct w4 group", swap("weight_shape", lambda t: t * 2), r"weight_shape' holds \[64, 128\]"),
        ("ct w4 zeros", drop("weight_zero_point"), "weight_zero_point' is missing"),
        ("ct fp8 channel", swap("weight_scale", lambda t: t.T), r"weight_scale' is \[1, 32\]"),
        ("ct int8 channel", swap("weight", lambda t: t.view(torch.uint8)), "weight' is U8, and must be I8"),
        ("fp8 block", drop("weight_scale_inv"), "weight_scale_inv' is missing"),
        ("gptq v1", drop("qzeros"), "qzeros' is missing"),
        ("gptq desc_act", drop("g_idx"), "g_idx' is missing"),
        ("bnb nf4", drop("weight.quant_state.bitsandbytes__nf4"), "weight.quant_state.bitsandbytes__nf4' is missing"),
        (
            "bnb nf4",
            swap("weight.quant_state.bitsandbytes__nf4", lambda t: t[3:]),
            "weight.quant_state.bitsandbytes__nf4' holds no JSON",
        ),
        ("awq", swap("qweight", lambda t: t[:-32]), r"qzeros' is \[2, 4\], and must be \[1, 4\]"),
    ],
)
def test_damaged_shapes_are_found_when_a_checkpoint_is_opened(
    tmp_path: Path, name: str, edit: Callable[..., None], words: str
) -> None:
    formats.write_family(tmp_path, "llama", name, num_hidden_layers=2)
    change(tmp_path, edit)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=rf"model\.safetensors: '{KEY}\.{words}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("ct w4 group", poison("weight_scale", float("nan")), "weight_scale' holds scales that are infinite or no"),
        ("ct fp8 channel", poison("weight_scale", float("inf")), "weight_scale' holds scales that are infinite or no"),
        ("fp8 block", poison("weight_scale_inv", float("nan")), "weight_scale_inv' holds scales"),
        ("fp8 exponents", poison("weight_scale_inv", 255), "weight_scale_inv' holds the exponent 255"),
        ("ct mxfp4", poison("weight_scale", 255), "weight_scale' holds the exponent 255"),
        ("gptq v1 zeros", poison("qzeros", -1), "qzeros' holds zero points out of range: 15"),
        ("gptq v1", poison("qzeros", 0x77777778), "qzeros' holds other zero points than 7 or 8"),
        ("gptq v1", poison("g_idx", 1), "g_idx' puts inputs into other groups, and the config says desc_act=false"),
        ("gptq desc_act", poison("g_idx", 7), "g_idx' names groups outside of the 2 that there are"),
        ("awq", poison("scales", float("inf")), "scales' holds scales that are infinite or no"),
        (
            "ct nvfp4",
            swap("weight_global_scale", lambda t: t * 0),
            "weight_global_scale' holds scales that are not above",
        ),
        ("bnb int8", swap("weight_format", lambda t: t + 1), "weight_format' is not 0"),
        ("bnb nf4", swap("weight.absmax", lambda t: t[1:]), "weight.absmax' holds 31 values, not 32"),
        ("bnb nested nf4", drop("weight.nested_quant_map"), "weight.nested_quant_map' is missing"),
    ],
)
def test_damaged_values_are_found_before_any_codes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, edit: Callable[..., None], words: str
) -> None:
    formats.write_family(tmp_path, "llama", name, num_hidden_layers=2)
    change(tmp_path, edit)
    opened = Checkpoint.open(tmp_path)
    monkeypatch.setattr("hybridgen.loading.quantised.assemble", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{KEY}\.{words}"):
        opened.load()


def test_codes_that_are_no_numbers(tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", "ct fp8 channel", num_hidden_layers=2)
    change(tmp_path, lambda t: t[f"{KEY}.weight"].view(torch.uint8).view(-1)[:1].fill_(0xFF))
    with pytest.raises(CheckpointError, match=rf"'{KEY}\.weight' holds codes that are no numbers"):
        Checkpoint.open(tmp_path).load()


def test_codes_that_the_config_does_not_know_of(tmp_path: Path, edit_json: EditJson) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_json(tmp_path / "config.json", quantization_config={**config, "ignore": ["lm_head", KEY]})
    with pytest.raises(CheckpointError, match=rf"{KEY}\.weight_\w+' is of a quantised weight, and the config says"):
        Checkpoint.open(tmp_path)


def test_tensors_that_are_not_known_beside_codes(tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    change(tmp_path, lambda t: t.update({f"{KEY}.weight_g_idx": torch.arange(64)}))
    with pytest.raises(UnsupportedModelError, match=rf"not known here: {KEY}\.weight_g_idx"):
        Checkpoint.open(tmp_path)


def test_shapes_that_are_not_the_configs(tmp_path: Path, edit_json: EditJson) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    edit_json(tmp_path / "config.json", intermediate_size=128)
    with pytest.raises(CheckpointError, match="other shapes than its config"):
        Checkpoint.open(tmp_path)


W4 = formats.FORMATS["ct w4 group"][1]
GROUP: dict[str, Any] = W4["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "hqq"}, "method 'hqq'"),
        ({"bits": 4}, "method 'unknown'"),
        ({**W4, "format": "marlin-24"}, "the format 'marlin-24'"),
        ({**W4, "config_groups": {}}, "config_groups {}"),
        ({**W4, "quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ({**W4, "transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
        ({**W4, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**W4, "config_groups": {"a": {**GROUP, "targets": ["Embedding"]}}}, "targets 'Embedding'"),
        ({**W4, "config_groups": {"a": {**GROUP, "targets": ["re:("]}}}, "pattern '\\('"),
        ({**W4, "config_groups": {"a": {**GROUP, "weights": {**GROUP["weights"], "num_bits": 3}}}}, "of 3 bits"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit False, load_in_8bit False"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits 3"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version 'gemv'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(whole: Path, edit_json: EditJson, config: Any, words: str) -> None:
    edit_json(whole / "config.json", quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=words):
        Checkpoint.open(whole)


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    with pytest.raises(ConfigError, match="quantised already \\(compressed-tensors\\)"):
        Checkpoint.open(tmp_path, hybridgen.EngineConfig(quantization="fp8"))


def test_what_a_quantised_model_says_of_itself(tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 zeros", num_hidden_layers=2)
    with hybridgen.Engine.load(tmp_path, **SETTINGS) as engine:
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
