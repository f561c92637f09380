"""What cannot be spread over processes is refused before weights are read and processes started."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import families
import multimodal
import pytest
import torch

import hybridgen
from hybridgen import ConfigError, DeviceError, Engine, UnsupportedModelError
from hybridgen.compilation.store.session import mode_of
from hybridgen.engine.preflight import resolve_config
from hybridgen.loading import Checkpoint
from hybridgen.parallel import ranks, start
from hybridgen.parallel.channel import Channel
from hybridgen.parallel.checks import check_parallel


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: Any) -> None:
        raise AssertionError("it was started")

    monkeypatch.setattr(start, "Ranks", begin)
    monkeypatch.setattr(Checkpoint, "load", begin)


def write(path: Path, family: str = "llama", **changes: Any) -> Path:
    families.build(family, num_hidden_layers=2, **changes).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("size", "changes", "match"),
    [
        (3, {}, "does not divide the 4 attention heads"),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96},
            "neither divides the 6 key and value",
        ),
        (4, {"intermediate_size": 98}, r"does not divide the size 98 of model\.layers\.0\.mlp\.gate_proj"),
    ],
)
def test_sizes_that_do_not_divide(size: int, changes: dict[str, int], match: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        Engine.load(write(tmp_path, **changes), device="cpu", tensor_parallel=size)


@pytest.mark.parametrize(
    ("family", "match"),
    [("gpt2", "has no tensor-parallel plan for gpt2"), ("olmo2", "olmo2 was not compared with one process")],
)
def test_models_without_a_plan_or_a_comparison(family: str, match: str, tmp_path: Path) -> None:
    families.build(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=match):
        Engine.load(tmp_path, device="cpu", tensor_parallel=2)


def test_multimodal_models_without_a_comparison(tmp_path: Path) -> None:
    path = multimodal.write("vipllava", tmp_path)
    with pytest.raises(UnsupportedModelError, match="the text part of vipllava was not compared with one process yet"):
        Engine.load(path, device="cpu", tensor_parallel=2)


class Guess:
    """A drafter of one's own."""

    name = "guess"
    begin = draft = tensors = None


@pytest.mark.parametrize(
    "fields",
    [
        {"drafter": "path/or/id"},
        {"speculation": Guess()},
        {"fp8_activations": True, "quantization": "fp8"},
        {"validate": True},
        {"check_addresses": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_not_done_over_processes_yet(fields: dict[str, Any], llama_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel=2 with"):
        Engine.load(llama_path, device="cpu", tensor_parallel=2, **fields)


def test_more_gpus_than_there_are(llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hybridgen.EngineConfig(device="cpu", tensor_parallel=4)
    checkpoint = dataclasses.replace(Checkpoint.open(llama_path, config), device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="tensor_parallel=4, but there are 2 GPUs; give at most that many"):
        check_parallel(checkpoint, config.replace(device="cuda"))
    with pytest.raises(ConfigError, match="uses the first 4 GPUs, and device='cuda:1' names one"):
        check_parallel(checkpoint, config.replace(device="cuda:1"))


@pytest.mark.parametrize(("device", "mode"), [("cuda", "hybrid"), ("cpu", "eager")])
def test_auto_is_the_mode_of_one_device(device: str, mode: str, llama_path: Path) -> None:
    """For rank 0, for what its checks go by, and in the other ranks' order."""
    config = hybridgen.EngineConfig(device="cpu", tensor_parallel=2)
    checkpoint = dataclasses.replace(Checkpoint.open(llama_path, config), device=torch.device(device))
    assert mode_of(checkpoint, config) == mode
    assert resolve_config(checkpoint, config).mode == mode
    assert start.order_of(checkpoint, config)["config"]["mode"] == mode


def test_live_modules_and_numbers_out_of_range(llama_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a live module"):
        Engine.load(families.build("llama"), device="cpu", tensor_parallel=2)
    with pytest.raises(ConfigError, match="give an integer from 1 to 64"):
        Engine.load(llama_path, device="cpu", tensor_parallel=0)


def test_shared_memory_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"shared memory in .* cannot be had"):
        Channel(tmp_path / "memory", 2, 2**60, create=True)


def test_a_process_that_cannot_be_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ranks.sys, "executable", str(tmp_path / "none"))
    monkeypatch.setattr(ranks.tempfile, "mkdtemp", lambda **_: str(tmp_path / "group"))
    (tmp_path / "group").mkdir()
    with pytest.raises(DeviceError, match="a process cannot be started"):
        ranks.Ranks({}, 2, 4096)
    assert not (tmp_path / "group").exists()
