"""`hybridgen quantize`: what it writes is read here, and by compressed-tensors where that is there."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hybridgen
from hybridgen.cli.main import main
from hybridgen.loading import Checkpoint, export
from hybridgen.models.quantised import quantised_modules
from hybridgen.models.rounding import quantise


def written(path: Path, tmp_path: Path, form: str) -> Path:
    out = tmp_path / form
    assert main(["quantize", str(path), str(out), "--format", form, "--device", "cpu"]) == 0
    return out


@pytest.mark.parametrize(("form", "kind"), [("ct-w4a16", "int4"), ("ct-fp8", "fp8")])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_what_it_writes_has_the_values_of_rounding(
    form: str, kind: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = families.write(family, tmp_path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    out = written(path, tmp_path, form)
    said = capsys.readouterr()
    assert f"projections in {form}" in said.out
    assert ("weights of experts stay as they are" in said.err) == (family == "qwen3_moe")
    assert (out / "chat_template.jinja").exists()
    model = families.build(family)
    loaded = Checkpoint.open(out, hybridgen.EngineConfig(device="cpu")).load().model
    found = quantised_modules(loaded)
    assert len(found) == sum(name.endswith("_proj") for name, _ in model.named_modules())
    for name, module in found:
        values = model.get_submodule(name).weight
        wanted = quantise(values, kind, torch.float32, group=module.block.inputs, symmetric=True)
        assert torch.equal(module.weight_stored.dequantise(), wanted.dequantise()), name
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("form", export.FORMATS)
def test_compressed_tensors_reads_the_same(form: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    out = written(families.write("llama", tmp_path), tmp_path, form)
    kept = json.loads((out / "config.json").read_text())["quantization_config"]
    kept.pop("quant_method")
    oracle = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(**kept, dequantize=True)
    )
    loaded = Checkpoint.open(out, hybridgen.EngineConfig(device="cpu")).load().model
    for name, module in quantised_modules(loaded):
        weight = oracle.get_submodule(name).weight
        torch.testing.assert_close(module.weight_stored.dequantise().to(weight.dtype), weight, rtol=0, atol=0)


def test_shards_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = families.write("llama", tmp_path)
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    out = written(path, tmp_path, "ct-fp8")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    Checkpoint.open(out, hybridgen.EngineConfig(device="cpu")).load()


def test_what_it_does_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    out = written(path, tmp_path, "ct-fp8")
    odd = families.write("qwen3", tmp_path, num_hidden_layers=2, intermediate_size=100)
    for arguments, words in (
        ([str(path), str(out)], "is there already"),
        ([str(out), str(tmp_path / "twice")], "is quantised already"),
        ([str(odd), str(tmp_path / "odd")], "100 inputs, which are no multiple of 32; use ct-fp8"),
    ):
        assert main(["quantize", *arguments, "--format", "ct-w4a16", "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "odd").exists()


def test_nothing_half_written_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(export, "SHARD_BYTES", 10_000)
    for out, words in ((tmp_path / "a" / "b", "cannot be quantised"), (tmp_path / "file" / "x", "cannot be written")):
        assert main(["quantize", str(path), str(out), "--format", "ct-fp8", "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "file").exists()


def test_the_formats_of_the_command_are_those_that_are_written() -> None:
    from hybridgen.cli import quantize

    assert quantize._FORMATS == export.FORMATS
