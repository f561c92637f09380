"""Opening and loading checkpoints: what is read when, and what is said when something is wrong."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hybridgen.loading.checkpoint
from hybridgen.config import EngineConfig
from hybridgen.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    ModelNotFoundError,
    OutOfMemoryError,
    TokenizerError,
    UnsupportedModelError,
)
from hybridgen.loading import Checkpoint
from hybridgen.loading.source import looks_like_path

EditJson = Callable[..., None]
CPU = EngineConfig(device="cpu")


def open_cpu(model: Any, **fields: Any) -> Checkpoint:
    return Checkpoint.open(model, CPU.replace(**fields))


def load_cpu(model: Any, **fields: Any) -> transformers.PreTrainedModel:
    return open_cpu(model, **fields).load().model


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if weights are asked for."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


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
    edit_json(whole / "config.json", eos_token_id=9)
    assert open_cpu(whole).eos_token_ids == (9,)


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
        (json.dumps({"model_type": "llama", "dtype": "bf17"}), "config.json cannot be used"),
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
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "vocab_size": 9}))
    with pytest.raises(UnsupportedModelError, match="'mamba' cannot run here"):
        open_cpu(tmp_path)


def test_implementations_named_by_the_config_file_are_not_used(whole: Path, edit_json: EditJson) -> None:
    """Transformers would fetch and run a hub kernel of that name."""
    edit_json(whole / "config.json", attn_implementation="owner/kernel", _attn_implementation="owner/kernel")
    checkpoint = open_cpu(whole)
    assert checkpoint.hf_config._attn_implementation is None
    assert checkpoint.load().model.config._attn_implementation in ("sdpa", "eager")


# Weights


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


# The hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that must not be asked."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture
def cached(hub_cache: Path, whole: Path) -> str:
    """The whole checkpoint as it lies in the cache after a download of branch main."""
    repo = hub_cache / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(whole, repo / "snapshots" / COMMIT)
    return "owner/name"


def snapshot(cache: Path) -> Path:
    return cache / "models--owner--name" / "snapshots" / COMMIT


def test_a_cached_hub_model_loads(cached: str) -> None:
    checkpoint = open_cpu(cached)
    assert checkpoint.name == "owner/name"
    assert checkpoint.tokenizer is not None
    loaded = checkpoint.load()
    expected = families.build("llama", num_hidden_layers=2).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert open_cpu(cached, revision=COMMIT, local_files_only=True).load().owned


def test_cached_shards_are_validated_before_they_are_read(cached: str, hub_cache: Path, sharded: Path) -> None:
    path = snapshot(hub_cache)
    (path / "model.safetensors").unlink()
    for file in sharded.glob("model*"):
        shutil.copy(file, path)
    assert open_cpu(cached).load().owned
    gone = sorted(path.glob("*.safetensors"))[0]
    gone.unlink()
    checkpoint = open_cpu(cached)  # the weights of a hub model are looked at when they are loaded
    with pytest.raises(CheckpointError, match=f"1 are missing: {gone.name}"):
        checkpoint.load()


def test_cached_weights_that_are_broken_are_named(cached: str, hub_cache: Path) -> None:
    file = snapshot(hub_cache) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        open_cpu(cached).load()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"local cache of 'owner/name' has no model\.safetensors"):
        open_cpu(cached).load()


@pytest.mark.timeout(60)  # a network that is not there is not waited for
@pytest.mark.parametrize("name", ["owner/name", "name"])
def test_offline_and_not_cached(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=rf"'{name}' cannot be loaded.*HF_HUB_OFFLINE.*local checkpoint"):
        open_cpu(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelNotFoundError, match=r"local_files_only=True"):
        open_cpu(name, local_files_only=True)


def test_a_revision_that_is_not_cached(cached: str) -> None:
    with pytest.raises(ModelNotFoundError, match="owner/name"):
        open_cpu(cached, revision="other-branch")


@pytest.mark.usefixtures("hub_cache")
def test_an_impossible_hub_id_is_no_directory_either() -> None:
    with pytest.raises(ModelNotFoundError, match="no hub id either"):
        open_cpu("no such model")


def _http_error(kind: type[Exception]) -> Exception:
    """One of the hub client's HTTP errors; it wants the response that it was made for."""
    response: Any = SimpleNamespace(headers={}, status_code=503, request=None)
    return kind("from the hub", response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", ["gated", "hf auth login"]),
        ("RepositoryNotFoundError", ["no such model", "private"]),
        ("RevisionNotFoundError", ["no revision='v9'"]),
        ("HfHubHTTPError", ["503"]),
    ],
)
def test_what_the_hub_answers_is_explained(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, error: str, words: list[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise _http_error(getattr(huggingface_hub.errors, error))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ModelNotFoundError) as caught:
        open_cpu("owner/name", revision="v9")
    assert "'owner/name'" in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_hub_that_cannot_be_reached(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for error in (
        huggingface_hub.errors.LocalEntryNotFoundError("no connection"),
        RuntimeError("the client is closed"),
        ConnectionError("refused"),
    ):

        def fail(*args: Any, error: Exception = error, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(ModelNotFoundError, match="'owner/name'"):
            open_cpu("owner/name")


@pytest.mark.parametrize("trust", [False, True])
def test_the_three_readers_get_the_same_arguments(cached: str, monkeypatch: pytest.MonkeyPatch, trust: bool) -> None:
    seen: dict[str, dict[str, Any]] = {}
    for cls in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):

        def spy(*args: Any, real: Any = cls.from_pretrained, name: str = cls.__name__, **kwargs: Any) -> Any:
            seen.setdefault(name, {"model": args[0], **kwargs})
            return real(*args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", spy)
    open_cpu(cached, trust_remote_code=trust, local_files_only=True, revision="main").load()
    assert list(seen) == ["AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"]
    for arguments in seen.values():
        assert arguments["model"] == "owner/name"
        assert arguments["trust_remote_code"] is trust
        assert arguments["local_files_only"] is True
        assert arguments["revision"] == COMMIT  # what main stood for when the model was opened
    assert seen["AutoModelForCausalLM"]["use_safetensors"] is True


# Code that comes with a checkpoint

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(whole: Path, edit_json: EditJson, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint of a model type that only its own code knows."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (whole / "mine.py").write_text(CODE)
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    edit_json(whole / "config.json", model_type="mine", auto_map=auto_map)
    return whole


@pytest.mark.usefixtures("no_weights")
def test_code_is_not_run_without_trust(with_code: Path) -> None:
    (with_code / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UnsupportedModelError, match=r"'mine' comes with the checkpoint.*trust_remote_code=True"):
        open_cpu(with_code)


def test_trusted_code_runs(with_code: Path) -> None:
    loaded = open_cpu(with_code, trust_remote_code=True).load()
    assert type(loaded.model).__name__ == "MineForCausalLM"
    expected = families.build("llama", num_hidden_layers=2)
    assert torch.equal(loaded.model.lm_head.weight, expected.lm_head.weight)


@pytest.mark.usefixtures("no_weights")
def test_trusted_code_is_checked_before_its_weights_are_read(with_code: Path) -> None:
    code = CODE.replace("LlamaForCausalLM", "PreTrainedModel").replace("MinePreTrainedModel", "MineForCausalLM")
    (with_code / "mine.py").write_text(code + "from torch import nn\nclass MineAttention(nn.Module):\n    pass\n")
    with pytest.raises(UnsupportedModelError, match="MineForCausalLM does not call its attention"):
        open_cpu(with_code, trust_remote_code=True)


@pytest.mark.usefixtures("no_weights")
def test_trusted_code_that_fails_is_our_error(with_code: Path) -> None:
    (with_code / "mine.py").write_text("raise ValueError('broken code')")
    with pytest.raises(CheckpointError, match="broken code"):
        open_cpu(with_code, trust_remote_code=True)
