"""The key: another one when anything changes that decides what is compiled, the same whatever else does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import LlamaForCausalLM, MistralForCausalLM

import hybridgen
from hybridgen import EngineConfig
from hybridgen.compilation.store import Key
from hybridgen.compilation.store import key_parts as parts
from hybridgen.compilation.store.session import key_for
from hybridgen.engine.preflight import resolve_config
from hybridgen.loading import Checkpoint

CONFIG = EngineConfig(mode="hybrid", device="cpu")


def key(
    hf_config: Any = None, *, model_class: type = LlamaForCausalLM, config: EngineConfig = CONFIG, **kw: Any
) -> Key:
    given: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "weights": "dense"}
    given |= {"mode": "hybrid"} | kw
    return parts.key_of(hf_config or families.build("llama").config, model_class, config=config, **given)


def changed(other: Key) -> set[str]:
    return set(key().differences(other.parts))


def test_it_is_the_same_each_time() -> None:
    assert changed(key()) == set()
    assert key().digest == key().digest


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", 128), ("num_hidden_layers", 5), ("rms_norm_eps", 1e-5), ("hidden_act", "gelu")],
)
def test_the_architecture(name: str, value: Any) -> None:
    config = families.build("llama").config
    setattr(config, name, value)
    assert changed(key(config)) == {f"model.{name}"}


def test_what_a_fine_tune_changes_is_not_in_it() -> None:
    config = families.build("llama").config
    config._name_or_path, config.eos_token_id, config.initializer_range = "/elsewhere", 7, 0.5
    assert changed(key(config)) == set()


def test_dtype_quantisation_class_and_settings() -> None:
    assert changed(key(dtype=torch.bfloat16)) == {"dtype"}
    assert changed(key(weights="int4")) == {"weights"}
    assert changed(key(mode="jit")) == {"config.mode"}
    assert changed(key(model_class=MistralForCausalLM)) == {"model class", "model sources"}
    config = families.build("llama").config
    config.quantization_config = {"quant_method": "awq"}
    assert changed(key(config)) == {"quantization"}


@pytest.mark.parametrize(
    ("where", "name", "part"),
    [
        (torch, "__version__", "torch"),
        (torch.version, "cuda", "CUDA"),
        (parts, "__version__", "hybridgen"),
        (parts.transformers, "__version__", "transformers"),  # a lazy module: not always the one that is imported here
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, part: str) -> None:
    before = key()
    monkeypatch.setattr(where, name, "0.0.1")
    assert set(before.differences(key().parts)) == {part}


def test_version_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(parts, "_version", lambda name: "0.0.1" if name == "triton" else None)
    assert set(before.differences(key().parts)) == {"triton"}


def test_python_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(parts.platform, "python_version", lambda: "3.99.0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert set(before.differences(key().parts)) == {"python", "threads"}


def test_gpu_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, multi_processor_count = "H200", 9, 0, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(parts, "_driver", lambda: "570.1")
    before = key(device=torch.device("cuda", 0))
    assert {before.parts[part] for part in ("GPU", "capability", "driver", "device")} == {
        "H200", "9.0", "570.1", "cuda:0",
    }  # fmt: skip
    assert parts.device_name(torch.device("cuda", 0)) == "H200 9.0, driver 570.1"
    monkeypatch.setattr(parts, "_driver", lambda: "580.2")
    monkeypatch.setattr(Properties, "name", "H100")
    monkeypatch.setattr(Properties, "major", 10)
    after = key(device=torch.device("cuda", 1))
    assert set(before.differences(after.parts)) == {"GPU", "capability", "driver", "device"}


def test_the_assembler_that_torch_sets_itself_is_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch._inductor.runtime.compile_tasks` does at the first compilation of a process."""
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    before = key()
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(Path(torch.__file__).parent / "bin" / "ptxas"))
    assert before.differences(key().parts) == {}
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/usr/local/cuda/bin/ptxas")
    assert set(before.differences(key().parts)) == {"environment"}


def test_switches_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/anywhere")
    with (
        torch._inductor.config.patch(epilogue_fusion=False),
        torch._dynamo.config.patch(assume_static_by_default=False),
    ):
        assert set(before.differences(key().parts)) == {"environment", "Inductor", "Dynamo"}
    monkeypatch.undo()
    torch.set_float32_matmul_precision("high")
    try:
        assert set(before.differences(key().parts)) == {"float32 matmul precision"}
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_fields_of_the_config() -> None:
    """Another name here makes every entry that exists a miss."""
    assert {name.removeprefix("config.") for name in key().parts if name.startswith("config.")} == {
        "compile_backend", "fp8_activations", "fuse_projections", "graphs", "kv_dtype", "max_context",
        "metadata_copy", "mode", "page_size", "quantization", "quantize_head", "sample_in_graph", "tensor_parallel",
        "token_budget",
    }  # fmt: skip
    assert changed(key(config=CONFIG.replace(page_size=16, fuse_projections=False))) == {
        "config.page_size",
        "config.fuse_projections",
    }
    assert changed(key(config=CONFIG.replace(kv_memory="1GiB", progress=False, max_batch=3))) == set()


def test_own_sources(tmp_path: Path) -> None:
    package = Path(hybridgen.__file__).parent
    copy = tmp_path / "hybridgen"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    assert parts.source_hash(copy) == parts.source_hash()
    for name, matters in (("cli/main.py", False), ("kernels/attention/ops.py", True), ("models/projections.py", True)):
        before = parts.source_hash(copy)
        (copy / name).write_text((copy / name).read_text() + "\n# changed\n")
        assert (parts.source_hash(copy) != before) == matters


def test_a_live_model_and_its_files_have_one_key(tmp_path: Path) -> None:
    """And the weights' values are not in it. Projections are joined in one of them, if they are."""
    config = CONFIG.replace(fuse_projections=False)
    path = families.write("llama", tmp_path)
    live = families.build("llama")
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(2)
    keys = []
    for model in (path, live):
        checkpoint = Checkpoint.open(model, config)
        keys += [key_for(checkpoint, each, resolve_config(checkpoint, each)) for each in (config, CONFIG)]
    assert keys[0].differences(keys[2].parts) == {}
    assert set(keys[1].differences(keys[3].parts)) == {"config.fuse_projections"}


@pytest.mark.parametrize("name", parts._SOURCES)
def test_a_source_that_is_not_there_is_no_empty_source(tmp_path: Path, name: str) -> None:
    copy = tmp_path / "hybridgen"
    shutil.copytree(Path(hybridgen.__file__).parent, copy, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    path = copy / name
    path.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"has no source files.*_SOURCES"):
        parts.source_hash(copy)
