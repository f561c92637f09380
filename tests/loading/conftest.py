"""Checkpoints written to disk, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the tiny models' vocabulary."""
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    words += [f"w{i}" for i in range(families.VOCAB - len(words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture
def whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama checkpoint with a tokenizer, in one safetensors file."""
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same model in several safetensors files with an index, without a tokenizer."""
    path = tmp_path / "sharded"
    families.build("llama", num_hidden_layers=2).save_pretrained(path, max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").is_file()
    return path


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """`edit_json(file, key=value)` sets keys of a JSON file; a value of `...` takes the key out."""

    def edit(file: Path, **changes: Any) -> None:
        values = json.loads(file.read_text())
        for key, value in changes.items():
            if value is ...:
                values.pop(key, None)
            else:
                values[key] = value
        file.write_text(json.dumps(values))

    return edit


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if weights are asked for."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
