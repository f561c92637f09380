"""Damaged quantised checkpoints, and unknown ones: one error that names tensor and file, before codes are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised_formats as formats
import torch
from one_projection import KEY, Edit, find_one, write_one
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridgen.errors import CheckpointError, UnsupportedModelError
from hybridgen.loading import Checkpoint
from hybridgen.loading.formats import read_format
from hybridgen.loading.formats.compressed import ATTENTION_NOTE
from hybridgen.loading.stored import TensorFiles, find_stored
from hybridgen.models.quantised import QuantisedLinear

EditJson = Callable[..., None]
EXPONENTS = ("ct mxfp4", "fp8 exponents")
SCALES = {"weight_scale", "weight_scale_inv", "scales", "SCB", "_weight_scale", "weight.absmax", "weight_global_scale"}
OPTIONAL = {"weight_shape", "g_idx", "weight_format", "_weight_zero_point", "input_global_scale"}
"""Tensors that a file may lack."""


def poison(part: str, value: float, place: int = 0) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[part].view(-1)[place] = value

    return edit


def drop(part: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[part]

    return edit


def swap(part: str, make: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({part: make(tensors[part]).contiguous()})


def parts_of(path: Path, name: str) -> list[str]:
    write_one(path, name)
    return [full.removeprefix(f"{KEY}.") for full in load_file(path)]


@pytest.mark.parametrize("name", formats.FORMATS)
def test_each_tensor_of_each_format_has_to_be_there(name: str, tmp_path: Path) -> None:
    file = tmp_path / "part.safetensors"
    for part in parts_of(file, name):
        write_one(file, name, drop(part))
        with TensorFiles([file]) as files:
            if part in OPTIONAL and not (part == "g_idx" and name == "gptq desc_act"):
                find_one(files, name).checked(files)
                continue
            with pytest.raises(CheckpointError, match=rf"part\.safetensors: '{KEY}\.{part}' is missing"):
                find_one(files, name).checked(files)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_scales_of_each_format_are_numbers(name: str, tmp_path: Path) -> None:
    """This is seen before any codes are read, and after all shapes were."""
    file = tmp_path / "part.safetensors"
    scales = [part for part in parts_of(file, name) if part in SCALES]
    assert scales
    for part in scales:
        nested = name == "bnb nested nf4"
        wrong = (255,) if name in EXPONENTS else (float("nan"),) if "nvfp4" in name else (float("nan"), float("inf"))
        for value in wrong:
            write_one(file, name, poison("weight.nested_absmax" if nested else part, value))
            with TensorFiles([file]) as files:
                stored = find_one(files, name)
                words = "the exponent 255" if name in EXPONENTS else "scales that are infinite or no numbers"
                with pytest.raises(CheckpointError, match=rf"part\.safetensors: '{KEY}\.{part}' holds {words}"):
                    stored.checked(files)


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("ct w4 group", swap("weight_scale", lambda t: t[:, :1]), r"weight_scale' is \[32, 1\], and must be \[32, 2\]"),
        (
            "ct w4 group",
            swap("weight_scale", lambda t: t.int()),
            "weight_scale' is I32, and must be BF16 or F16 or F32",
        ),
        ("ct w4 group", swap("weight_packed", lambda t: t[:, 1:]), r"weight_shape' holds \[32, 64\]"),
        ("ct w4 group", swap("weight_shape", lambda t: t * 2), r"weight_shape' holds \[64, 128\]"),
        ("ct fp8 channel", swap("weight_scale", lambda t: t.T), r"weight_scale' is \[1, 32\]"),
        ("ct int8 channel", swap("weight", lambda t: t.view(torch.uint8)), "weight' is U8, and must be I8"),
        ("ct w4 group", swap("weight_shape", lambda t: t[0]), r"weight_shape' is \[\], and must have 1 dimensions"),
        ("ct w4 group", swap("weight_shape", lambda t: t.bool()), "weight_shape' is BOOL, and must be I64 or I32"),
        ("fp8 tensor", swap("weight", lambda t: t[:0]), r"weight' is \[0, 64\], and must hold numbers"),
        ("torchao int8 groups", swap("_weight_scale", lambda t: t[:1, :1].repeat(3, 1)), r"_weight_scale' is \[3, 1\]"),
        ("torchao fp8", swap("_weight_scale", lambda t: t.T), r"_weight_scale' is \[1, 32\]"),
        (
            "bnb nf4",
            swap("weight.quant_state.bitsandbytes__nf4", lambda t: t[3:]),
            "weight.quant_state.bitsandbytes__nf4' holds no JSON",
        ),
        ("awq", swap("qweight", lambda t: t[:-32]), r"qzeros' is \[2, 4\], and must be \[1, 4\]"),
        ("bnb nf4", swap("weight", lambda t: t[2:]), r"weight' is \[1022, 1\], and must be \[1024, 1\]"),
        ("fp8 block", lambda t: t.update(weight_scale=torch.ones(1)), "weight_scale_inv' is there beside weight_scale"),
    ],
)
def test_shapes_and_dtypes_that_are_not_the_formats(name: str, edit: Edit, words: str, tmp_path: Path) -> None:
    file = tmp_path / "part.safetensors"
    write_one(file, name, edit)
    with TensorFiles([file]) as files, pytest.raises(CheckpointError, match=rf"part\.safetensors: '{KEY}\.{words}"):
        find_one(files, name)


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("gptq v1 zeros", poison("qzeros", -1), "qzeros' holds zero points out of range: 15"),
        ("gptq 8 bits zeros", poison("qzeros", -1), "qzeros' holds zero points out of range: 255"),
        ("gptq v1", poison("qzeros", 0x77777778), "qzeros' holds other zero points than 7 or 8"),
        ("gptq v1", poison("g_idx", 1), "g_idx' puts inputs into other groups, and the config says desc_act=false"),
        ("gptq desc_act", poison("g_idx", 7), "g_idx' names groups outside of the 2 that there are"),
        (
            "ct int8 channel",
            lambda t: t.update(weight_zero_point=torch.ones(32, 1, dtype=torch.int8)),
            "weight_zero_point' holds zero points, and the config says that the weight has none",
        ),
        (
            "ct nvfp4",
            swap("weight_global_scale", lambda t: t * 0),
            "weight_global_scale' holds scales that are not above",
        ),
        ("bnb int8", swap("weight_format", lambda t: t + 1), "weight_format' is not 0"),
        ("bnb nf4", swap("weight.absmax", lambda t: t[1:]), "weight.absmax' holds 31 values, not 32"),
        (
            "ct w4 group",
            lambda t: t.update(weight_g_idx=torch.arange(64, dtype=torch.int32)),
            "weight_g_idx' names groups outside of the 2 that there are",
        ),
    ],
)
def test_values_out_of_range(name: str, edit: Edit, words: str, tmp_path: Path) -> None:
    file = tmp_path / "part.safetensors"
    write_one(file, name, edit)
    with TensorFiles([file]) as files:
        stored = find_one(files, name)
        with pytest.raises(CheckpointError, match=rf"part\.safetensors: '{KEY}\.{words}"):
            stored.checked(files)


@pytest.mark.parametrize("name", [name for name in formats.FORMATS if "fp8" in name])
def test_codes_that_are_no_numbers(name: str, tmp_path: Path) -> None:
    file = tmp_path / "part.safetensors"
    part = "_weight_qdata" if "torchao" in name else "weight"
    write_one(file, name, lambda tensors: tensors[part].view(torch.uint8).view(-1)[:1].fill_(0xFF))
    with TensorFiles([file]) as files:
        stored = find_one(files, name).checked(files)
        with pytest.raises(
            CheckpointError, match=rf"part\.safetensors: '{KEY}\.{part}' holds codes that are no numbers"
        ):
            stored.read(files, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (poison("scales", 255), "scales' holds the exponent 255"),
        (drop("scales"), "scales' is missing"),
        (swap("scales", lambda t: t[:, :, :1]), r"scales' is \[2, 64, 1\], not one for 32"),
    ],
)
def test_damaged_experts_in_mxfp4(edit: Edit, words: str, tmp_path: Path) -> None:
    file = tmp_path / "part.safetensors"
    tensors = {
        "blocks": torch.zeros(2, 64, 2, 16, dtype=torch.uint8),
        "scales": torch.full((2, 64, 2), 127, dtype=torch.uint8),
    }
    edit(tensors)
    owner = "model.layers.0.mlp.experts.down_proj"
    save_file({f"{owner}_{part}": tensor for part, tensor in tensors.items()}, file)
    layout = read_format({"quant_method": "mxfp4"})
    assert layout is not None
    with TensorFiles([file]) as files, pytest.raises(CheckpointError, match=rf"part\.safetensors: '{owner}.{words}"):
        find_stored(files, layout)[0][owner].checked(files)


def change(path: Path, edit: Edit) -> None:
    """Edit the tensors of one projection of a checkpoint."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    own = {name.removeprefix(f"{KEY}."): tensors.pop(name) for name in list(tensors) if name.startswith(f"{KEY}.")}
    edit(own)
    save_file(tensors | {f"{KEY}.{part}": tensor for part, tensor in own.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "part"), [("ct w4 zeros", "weight_scale"), ("gptq desc_act", "g_idx")])
def test_damaged_shapes_are_found_when_a_checkpoint_is_opened(name: str, part: str, tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", name, num_hidden_layers=2)
    change(tmp_path, drop(part))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{KEY}\.{part}' is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "part", "value"), [("ct w4 group", "weight_scale", float("nan")), ("gptq v1 zeros", "qzeros", -1)]
)
def test_damaged_values_are_found_before_any_codes_are_read(
    name: str, part: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.write_family(tmp_path, "llama", name, num_hidden_layers=2)
    change(tmp_path, poison(part, value))
    opened = Checkpoint.open(tmp_path)
    monkeypatch.setattr("hybridgen.loading.quantised.assemble", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{KEY}\.{part}' holds"):
        opened.load()


def test_codes_that_the_config_does_not_know_of(tmp_path: Path, edit_json: EditJson) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_json(tmp_path / "config.json", quantization_config={**config, "ignore": ["lm_head", KEY]})
    with pytest.raises(CheckpointError, match=rf"{KEY}\.weight_\w+' is of a quantised weight, and the config says"):
        Checkpoint.open(tmp_path)


def test_tensors_that_are_not_known_beside_codes(tmp_path: Path) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    change(tmp_path, lambda tensors: tensors.update(weight_global_scale=torch.ones(1)))
    with pytest.raises(UnsupportedModelError, match=rf"not known here: {KEY}\.weight_global_scale"):
        Checkpoint.open(tmp_path)


ATTENTION = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8, "type": "float"}}


def test_a_group_of_attention_alone_is_noted(tmp_path: Path, edit_json: EditJson) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    scale = KEY.rpartition(".")[0] + ".q_scale"
    change(tmp_path, lambda tensors: tensors.update({scale: torch.ones(1)}))
    edit_json(
        tmp_path / "config.json",
        quantization_config={**W4, "config_groups": {"attention": ATTENTION, **W4["config_groups"]}},
    )
    loaded = Checkpoint.open(tmp_path).load()
    assert loaded.notes[ATTENTION_NOTE] == 1
    assert sum(isinstance(each, QuantisedLinear) for each in loaded.model.modules()) == 14


def test_classes_of_other_engines(tmp_path: Path, edit_json: EditJson) -> None:
    formats.write_family(tmp_path, "llama", "ct w4 group", num_hidden_layers=2)
    group = {**GROUP, "targets": ["QKVParallelLinear", "MergedColumnParallelLinear"]}
    edit_json(tmp_path / "config.json", quantization_config={**W4, "config_groups": {"a": group}})
    with pytest.raises(UnsupportedModelError, match=r"class 'QKVParallelLinear', .* is a Linear: no group says"):
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
        ({**W4, "quantization_status": "calibration"}, "quantization_status 'calibration'"),
        ({**W4, "transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
        ({**W4, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**W4, "config_groups": {"a": {**GROUP, "targets": ["Embedding"]}}}, "targets 'Embedding'"),
        ({**W4, "config_groups": {"a": {**GROUP, "targets": ["re:("]}}}, "pattern '\\('"),
        ({**W4, "config_groups": {"a": {**GROUP, "weights": {**GROUP["weights"], "num_bits": 3}}}}, "of 3 bits"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit False, load_in_8bit False"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits 3"),
        ({"quant_method": "gptq", "bits": 4.0, "group_size": 128}, "bits 4.0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": ["mlp"]}, r"dynamic \['mlp'\]"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:mlp": None}},
            r"dynamic \{'\+:mlp': None",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "format": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "backend": "llm-awq"}, "version 'llm-awq'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(whole: Path, edit_json: EditJson, config: Any, words: str) -> None:
    edit_json(whole / "config.json", quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=words):
        Checkpoint.open(whole)
