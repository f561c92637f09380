"""Checkpoints of the hub, and code that comes with a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import huggingface_hub
import pytest
import torch
import transformers
from opening import EditJson, open_cpu
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hybridgen.errors import (
    CheckpointError,
    ModelNotFoundError,
    UnsupportedModelError,
)

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
