"""Files of weights: broken, missing, too many or too large."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from opening import load_cpu, open_cpu
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybridgen.errors import (
    CheckpointError,
    OutOfMemoryError,
)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1, -5000])
def test_truncated_weights_are_found_by_open(whole: Path, cut: int) -> None:
    file = whole / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        open_cpu(whole)


@pytest.mark.usefixtures("no_weights")
def test_no_weights_and_bin_weights_are_found_by_open(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_cpu(whole)
    torch.save({}, whole / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        open_cpu(whole)


def test_bin_weights_load_with_consent(whole: Path) -> None:
    file = whole / "model.safetensors"
    state = load_file(file)
    torch.save(state, whole / "pytorch_model.bin")
    file.unlink()
    model = load_cpu(whole, allow_pickle=True)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors; `__` in a keyword stands for a dot."""
    file = path / "model.safetensors"
    state = load_file(file)
    for name, value in changes.items():
        if value is None:
            del state[name.replace("__", ".")]
        else:
            state[name.replace("__", ".")] = value
    save_file(state, file, metadata={"format": "pt"})


def test_missing_weights_are_named_instead_of_made_up(whole: Path) -> None:
    rewrite(whole, lm_head__weight=None, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match="lacks 2 weights") as caught:
        load_cpu(whole)
    assert "lm_head.weight" in str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = load_cpu(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_mismatched_shapes_are_named_with_both(whole: Path) -> None:
    rewrite(whole, model__norm__weight=torch.zeros(63))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[63\], the config says \[64\]"):
        load_cpu(whole)


def test_a_weight_missing_from_an_expert_is_reported(tmp_path: Path) -> None:
    """Experts are joined while loading, and transformers reports what fails there in its log alone."""
    path = families.write("mixtral", tmp_path, num_hidden_layers=1)
    state = load_file(path / "model.safetensors")
    name = next(name for name in state if "experts.2" in name)
    del state[name]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="mixtral"):
        load_cpu(path)


def test_unexpected_weights_are_one_warning(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(whole, model__ghost=torch.zeros(3))
    with caplog.at_level(logging.WARNING, "hybridgen"):
        load_cpu(whole)
    assert [r.getMessage() for r in caplog.records if "model.ghost" in r.getMessage()]
    assert len(caplog.records) == 1


def test_weights_that_break_between_open_and_load_are_our_error(whole: Path) -> None:
    checkpoint = open_cpu(whole)
    (whole / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_says_how_much_is_needed(
    whole: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    checkpoint = open_cpu(whole, dtype="float16")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(OutOfMemoryError, match=r"need 0\.00 GiB as torch\.float16") as caught:
        checkpoint.load()
    assert caught.value.__context__ is None  # nothing keeps the half-loaded model alive


def test_ctrl_c_passes_through(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    checkpoint = open_cpu(whole)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.load()


@pytest.mark.parametrize("wanted", [True, False, None])
def test_progress_bars_follow_the_config_and_come_back(
    whole: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool | None
) -> None:
    seen: list[bool] = []
    real = AutoModelForCausalLM.from_pretrained

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(transformers.utils.logging.is_progress_bar_enabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    before = transformers.utils.logging.is_progress_bar_enabled()
    handlers = list(logging.getLogger("transformers").handlers)
    load_cpu(whole, progress=wanted)
    assert seen == [wanted is True]  # standard error is no terminal here
    assert transformers.utils.logging.is_progress_bar_enabled() is before
    assert logging.getLogger("transformers").handlers == handlers
