"""Opening and loading checkpoints: what is read when, and what is said when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from opening import CPU, EditJson, open_cpu
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hybridgen.loading.checkpoint
from hybridgen.config import EngineConfig
from hybridgen.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedModelError,
)
from hybridgen.loading import Checkpoint
from hybridgen.loading.source import looks_like_path

# A checkpoint that is whole


@pytest.mark.usefixtures("no_weights")
def test_open_reads_everything_but_the_weights(whole: Path, edit_json: EditJson) -> None:
    edit_json(whole / "generation_config.json", eos_token_id=[2, 5], temperature=0.5, do_sample=True)
    checkpoint = open_cpu(whole)
    assert checkpoint.name == str(whole)
    assert checkpoint.hf_config.model_type == "llama"
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer("w1 w2").input_ids == [5, 6]
    assert checkpoint.tokenizer_problem is None
    assert checkpoint.generation_config.temperature == 0.5
    assert checkpoint.device == torch.device("cpu")
    assert checkpoint.dtype == torch.float32
    assert checkpoint.vocab_size == families.VOCAB
    assert checkpoint.max_context == 512
    assert checkpoint.eos_token_ids == (2, 5)


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_load_gives_the_saved_weights(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    loaded = open_cpu(path).load()
    expected = families.build("llama", num_hidden_layers=2).state_dict()
    state = loaded.model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert loaded.owned
    assert loaded.seconds > 0
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_a_relative_path_and_a_home_path(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole.parent)
    assert open_cpu("llama").vocab_size == families.VOCAB
    assert open_cpu("./llama/").vocab_size == families.VOCAB
    monkeypatch.setenv("HOME", str(whole.parent))
    assert open_cpu("~/llama").vocab_size == families.VOCAB


@pytest.mark.parametrize(
    ("eos_in_generation", "eos_in_config", "expected"),
    [(7, 2, (7,)), (None, 2, (2,)), (None, [2, 3, 2], (2, 3)), (None, None, ())],
)
def test_eos_ids(
    whole: Path, edit_json: EditJson, eos_in_generation: Any, eos_in_config: Any, expected: tuple[int, ...]
) -> None:
    edit_json(whole / "generation_config.json", eos_token_id=eos_in_generation)
    edit_json(whole / "config.json", eos_token_id=eos_in_config)
    assert open_cpu(whole).eos_token_ids == expected


def test_without_a_generation_config_the_config_counts(whole: Path, edit_json: EditJson) -> None:
    (whole / "generation_config.json").unlink()
    edit_json(whole / "config.json", eos_token_id=9, repetition_penalty=1.3, suppress_tokens=[11])
    checkpoint = open_cpu(whole)
    assert checkpoint.eos_token_ids == (9,)
    said = checkpoint.generation_config  # of fields that transformers' configs forget, too
    assert (said.repetition_penalty, said.suppress_tokens) == (1.3, [11])


@pytest.mark.parametrize(("family", "context"), [("gpt2", 512), ("opt", 512)])
def test_context_and_vocabulary_of_families_with_other_field_names(tmp_path: Path, family: str, context: int) -> None:
    checkpoint = open_cpu(families.write(family, tmp_path))
    assert (checkpoint.max_context, checkpoint.vocab_size) == (context, families.VOCAB)
    assert checkpoint.load().model(torch.tensor([[5, 6]])).logits.shape == (1, 2, families.VOCAB)


# Dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_converts(whole: Path, dtype: str) -> None:
    checkpoint = open_cpu(whole, dtype=dtype)
    model = checkpoint.load().model
    assert checkpoint.dtype == getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {checkpoint.dtype}


def test_dtype_auto_is_the_checkpoints(tmp_path: Path, edit_json: EditJson) -> None:
    path = tmp_path / "bf16"
    families.build("llama", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(path)
    assert open_cpu(path).dtype == torch.bfloat16
    edit_json(path / "config.json", dtype=...)  # then the weights decide
    checkpoint = open_cpu(path)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.load().model.dtype == torch.bfloat16


def test_a_dtype_that_cannot_run_is_named(whole: Path, edit_json: EditJson) -> None:
    edit_json(whole / "config.json", dtype="float64")
    with pytest.raises(UnsupportedModelError, match=r"float64; set dtype='float32'"):
        open_cpu(whole)
    assert open_cpu(whole, dtype="float32").dtype == torch.float32


# Paths and configs


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("/a/b", True), ("./a", True), ("../a", True), ("~/a", True), ("a/b/c", True), ("a/", True),
        (".", True), ("gpt2", False), ("owner/name", False),
    ],
)  # fmt: skip
def test_names_written_like_paths(name: str, is_path: bool) -> None:
    assert looks_like_path(name) is is_path


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c", "nowhere/"])
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        open_cpu(name)
    assert str(Path(name).expanduser()) in str(caught.value)
    assert "there is no directory" in str(caught.value)


def test_a_missing_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(ModelNotFoundError, match="no directory 'gpt2'"):
        open_cpu(Path("gpt2"))


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="is no name"):
        open_cpu(name)


@pytest.mark.parametrize("model", [3, b"gpt2", {"model": "x"}])
def test_other_types_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="give a directory, a hub id"):
        open_cpu(model)


def test_no_name_is_the_demo_model(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybridgen.loading.checkpoint, "model_path", lambda: whole)
    assert open_cpu(None).name == str(whole)


def test_a_file_is_no_checkpoint(whole: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; give the directory"):
        open_cpu(whole / "model.safetensors")


def test_a_revision_of_a_directory_is_refused(whole: Path) -> None:
    with pytest.raises(ConfigError, match="revision='v1'"):
        open_cpu(whole, revision="v1")


def test_directories_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_cpu(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF"):
        open_cpu(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        open_cpu(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON list"),
        ("{}", "no model_type"),
        (json.dumps({"model_type": "llama", "num_attention_heads": "x"}), "config.json cannot be used"),
        (json.dumps({"model_type": "llama", "dtype": "bf17"}), "dtype='bf17' is no dtype"),
        (json.dumps({"model_type": "llama", "torch_dtype": "float8_e4m3fn"}), "torch_dtype='float8_e4m3fn' is no"),
        (json.dumps({"model_type": "llama", "num_hidden_layers": 0}), "num_hidden_layers=0; a model has at least one"),
        (json.dumps({"model_type": "llama", "vocab_size": 0}), "vocab_size=0"),
    ],
)
def test_broken_configs_are_named(whole: Path, text: str, problem: str) -> None:
    (whole / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_cpu(whole)
    assert "config.json" in str(caught.value)


def test_an_unknown_model_type_is_named(whole: Path, edit_json: EditJson) -> None:
    edit_json(whole / "config.json", model_type="quux9")
    with pytest.raises(UnsupportedModelError, match=r"config\.json: model type 'quux9' is unknown"):
        open_cpu(whole)


def test_a_broken_generation_config_is_named(whole: Path) -> None:
    (whole / "generation_config.json").write_text("{,")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        open_cpu(whole)


def test_eos_ids_that_are_no_integers_are_refused(whole: Path, edit_json: EditJson) -> None:
    edit_json(whole / "config.json", eos_token_id="</s>")
    edit_json(whole / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(CheckpointError, match=r"</s>"):
        open_cpu(whole)


@pytest.mark.usefixtures("no_weights")
def test_an_architecture_that_cannot_run_is_refused_before_its_files_are_looked_at(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv", "vocab_size": 9}))
    with pytest.raises(UnsupportedModelError, match="'rwkv' cannot run here"):
        open_cpu(tmp_path)


def test_implementations_named_by_the_config_file_are_not_used(whole: Path, edit_json: EditJson) -> None:
    """Transformers would fetch and run a hub kernel of that name."""
    edit_json(whole / "config.json", attn_implementation="owner/kernel", _attn_implementation="owner/kernel")
    checkpoint = open_cpu(whole)
    assert checkpoint.hf_config._attn_implementation is None
    assert checkpoint.load().model.config._attn_implementation in ("sdpa", "eager")


# Tokenizer


def test_no_tokenizer_is_no_error(sharded: Path) -> None:
    checkpoint = open_cpu(sharded)
    assert checkpoint.tokenizer is None
    assert "has no tokenizer files" in str(checkpoint.tokenizer_problem)


def test_a_broken_tokenizer_says_why(whole: Path) -> None:
    (whole / "tokenizer.json").write_text("{}")
    checkpoint = open_cpu(whole)
    assert checkpoint.tokenizer is None
    assert "no tokenizer that transformers can load" in str(checkpoint.tokenizer_problem)


def test_a_tokenizer_of_special_tokens_alone_does_not_count(sharded: Path) -> None:
    """Some classes make one up when their files are missing."""
    (sharded / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    checkpoint = open_cpu(sharded)
    assert checkpoint.tokenizer is None
    assert checkpoint.tokenizer_problem


def test_a_given_tokenizer_is_used(sharded: Path, whole: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert Checkpoint.open(sharded, CPU, tokenizer=tokenizer).tokenizer is tokenizer
    by_path = Checkpoint.open(sharded, CPU, tokenizer=whole).tokenizer
    assert by_path is not None
    assert by_path("w1").input_ids == [5]
    with pytest.raises(TokenizerError, match="/nowhere"):
        Checkpoint.open(sharded, CPU, tokenizer="/nowhere")
    with pytest.raises(TokenizerError, match="tokenizer=3 is no tokenizer"):
        Checkpoint.open(sharded, CPU, tokenizer=3)


# Devices


def test_cuda_asked_for_and_absent(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:3"):
        with pytest.raises(DeviceError, match=rf"device='{name}'.*use device='cpu'"):
            Checkpoint.open(whole, EngineConfig(device=name))
    assert Checkpoint.open(whole, EngineConfig(device="auto")).device == torch.device("cpu")


def test_cuda_devices_are_counted(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(DeviceError, match=r"device='cuda:2', but there are 2 CUDA devices; choose cuda:0 to cuda:1"):
        Checkpoint.open(whole, EngineConfig(device="cuda:2"))
    for name, index in (("auto", 1), ("cuda", 1), ("cuda:0", 0)):
        assert Checkpoint.open(whole, EngineConfig(device=name)).device == torch.device("cuda", index)


def test_a_bad_device_is_reported_before_the_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError):
        Checkpoint.open("/nowhere", EngineConfig(device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_loading_to_cuda(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    loaded = Checkpoint.open(path, EngineConfig(device="cuda", dtype="bfloat16")).load()
    assert {(p.device, p.dtype) for p in loaded.model.parameters()} == {(torch.device("cuda:0"), torch.bfloat16)}
    assert {b.device for b in loaded.model.buffers()} == {torch.device("cuda:0")}
    expected = families.build("llama", num_hidden_layers=2).lm_head.weight.to(torch.bfloat16)
    assert torch.equal(loaded.model.lm_head.weight.cpu(), expected)


# Live modules


def test_a_live_module_is_taken_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    model = families.build("llama", num_hidden_layers=1).to(torch.bfloat16).train()
    checkpoint = Checkpoint.open(model, EngineConfig(), tokenizer=tokenizer)
    assert (checkpoint.dtype, checkpoint.device) == (torch.bfloat16, torch.device("cpu"))
    assert checkpoint.name == "LlamaForCausalLM"
    assert checkpoint.tokenizer is tokenizer
    assert model.training
    loaded = checkpoint.load()
    assert loaded.model is model
    assert (loaded.owned, loaded.seconds) == (False, 0.0)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_live_modules_tokenizer_comes_from_where_it_was_loaded(whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole)
    checkpoint = open_cpu(model)
    assert checkpoint.name == str(whole)
    assert checkpoint.tokenizer is not None
    unnamed = open_cpu(families.build("llama", num_hidden_layers=1))
    assert unnamed.tokenizer is None
    assert "pass tokenizer=" in str(unnamed.tokenizer_problem)


def test_a_live_module_and_a_config_that_contradict_each_other() -> None:
    model = families.build("llama", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="dtype='bfloat16', but the model given is float32"):
        Checkpoint.open(model, EngineConfig(dtype="bfloat16"))
    with pytest.raises(ConfigError, match="device='cuda', but the model given lies on cpu"):
        Checkpoint.open(model, EngineConfig(device="cuda"))
    assert open_cpu(model, dtype="float32").dtype == torch.float32


def test_live_modules_that_cannot_run() -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(families.build("llama").config)
    with pytest.raises(CheckpointError, match="meta device"):
        Checkpoint.open(empty)
    spread = families.build("llama", num_hidden_layers=1)
    spread.lm_head.to("meta")
    with pytest.raises(CheckpointError, match=r"1 tensors without values.*lm_head\.weight"):
        Checkpoint.open(spread)
    with pytest.raises(UnsupportedModelError, match="float64"):
        Checkpoint.open(families.build("llama", num_hidden_layers=1).double())
    headless = families.build("llama", num_hidden_layers=1).model
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no language model head"):
        Checkpoint.open(headless)
