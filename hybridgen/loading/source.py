"""Where a checkpoint's files are: a directory, or a model on the Hugging Face hub.

Both sources answer the same three questions: where is this small file, where are the weights, and what do
transformers' `from_pretrained` methods get.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub

from hybridgen.config import EngineConfig
from hybridgen.errors import CheckpointError, ConfigError, HybridgenError, LoadError, ModelNotFoundError
from hybridgen.loading.checks import read_json, weight_names

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class LocalSource:
    """A checkpoint directory."""

    path: Path
    local_files_only: bool

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords for `from_pretrained(self.name, ...)`; they matter for remote code that lies elsewhere."""
        return {"revision": None, "local_files_only": self.local_files_only}

    def find(self, filename: str) -> Path | None:
        """The path of a file, or None."""
        file = self.path / filename
        return file if file.is_file() else None

    def fetch_weights(self, allow_pickle: bool, weights_name: str | None) -> Path:
        """The directory with the weights."""
        return self.path

    def explain_missing_config(self) -> LoadError:
        """Why there is no config.json, as far as the other files tell."""
        if (self.path / "adapter_config.json").is_file():
            return CheckpointError(f"{self.path} holds an adapter (adapter_config.json); merge it into its base model")
        if any(self.path.glob("*.gguf")):
            return CheckpointError(f"{self.path} holds GGUF files and no config.json; give the original checkpoint")
        return CheckpointError(f"{self.path} has no config.json; give the directory that save_pretrained() wrote")


@dataclass(frozen=True)
class HubSource:
    """A model on the hub, or in the hub's local cache, at one commit."""

    repo: str
    revision: str | None
    local_files_only: bool

    @property
    def name(self) -> str:
        return self.repo

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords for `from_pretrained(self.name, ...)`."""
        return {"revision": self.revision, "local_files_only": self.local_files_only}

    def find(self, filename: str) -> Path | None:
        """The path of a file in the cache, downloaded if need be; None if the model has no such file.

        Raises:
            ModelNotFoundError: the model cannot be found or reached.
        """
        with load_errors(self, f"{filename} of {self.repo!r} cannot be fetched", ModelNotFoundError):
            try:
                return Path(huggingface_hub.hf_hub_download(self.repo, filename, **self.arguments))
            except hub.EntryNotFoundError as error:
                # Offline, "not in the cache" is all that can be known; the config tells if the rest is.
                unknown = isinstance(error, hub.LocalEntryNotFoundError)
                if unknown and (filename == "config.json" or not self.offline):
                    raise
                return None

    @property
    def offline(self) -> bool:
        """Whether the hub must not be asked."""
        return self.local_files_only or huggingface_hub.is_offline_mode()

    def pinned(self) -> HubSource:
        """The same model at the commit that its revision stands for now, so that all files are of one."""
        file = self.find("config.json")
        if file is None or not _COMMIT.fullmatch(file.parent.name):
            return self
        return HubSource(self.repo, file.parent.name, self.local_files_only)

    def fetch_weights(self, allow_pickle: bool, weights_name: str | None) -> Path:
        """The cache's directory for the commit, with the weights in it. Downloads them if need be.

        Raises:
            ModelNotFoundError: the model cannot be reached.
            CheckpointError: it has no weights of a kind that may be read.
        """
        names = weight_names(allow_pickle, weights_name)
        for name in names:
            file = self.find(name)
            if file is None:
                continue
            if name.endswith(".json"):
                self._fetch_shards(file)
            return file.parents[len(Path(name).parts) - 1]
        lacks = f"{'the local cache of ' if self.offline else ''}{self.repo!r} has no {' or '.join(names)}"
        if self.offline:
            raise CheckpointError(f"{lacks}; download the weights first, or allow the hub to be asked")
        if not allow_pickle:
            lacks += "; if it has .bin weights and you trust them, set allow_pickle=True"
        raise CheckpointError(lacks)

    def _fetch_shards(self, index: Path) -> None:
        """Downloads the shards that the cache lacks. What is wrong with the index, or missing offline, is left to
        `validate_directory`, which names the file.
        """
        weight_map = read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        shards = sorted({name for name in names if isinstance(name, str) and not (index.parent / name).is_file()})
        if not shards or self.offline:
            return
        with load_errors(self, f"the weights of {self.repo!r} cannot be fetched", ModelNotFoundError):
            huggingface_hub.snapshot_download(self.repo, allow_patterns=shards, **self.arguments)

    def explain_missing_config(self) -> LoadError:
        """What to say when the model has no config.json."""
        return CheckpointError(f"{self.repo!r} has no config.json on the hub; choose a model for transformers")


Source = LocalSource | HubSource


def resolve_source(model: str | os.PathLike[str], config: EngineConfig) -> Source:
    """Tells directories from hub ids.

    A name is a directory if it exists, or is written like a path: absolute, starting with `.` or `~`, ending
    with a separator, or with more than one separator. Any other name is a hub id, `name` or `owner/name`.

    Raises:
        ModelNotFoundError: it is written like a path and does not exist, or is not a possible hub id.
        CheckpointError: it is a file.
        ConfigError: a revision was given for a directory.
    """
    text = os.fspath(model)
    if not isinstance(text, str) or not text.strip():
        raise ModelNotFoundError(f"model={text!r} is no name; give a directory or a hub id such as owner/name")
    path = Path(text).expanduser()
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory with config.json and the weights")
    if path.is_dir():
        if config.revision is not None:
            raise ConfigError(
                f"revision={config.revision!r} is for hub models, and {path} is a directory; leave it out"
            )
        return LocalSource(path, config.local_files_only)
    if not isinstance(model, str) or looks_like_path(text):
        raise ModelNotFoundError(f"there is no directory {str(path)!r}; give an existing one, or a hub id owner/name")
    source = HubSource(text, config.revision, config.local_files_only)
    return source.pinned()


def looks_like_path(text: str) -> bool:
    """Whether a name is written like a path rather than a hub id."""
    separators = {os.sep, os.altsep or os.sep}
    count = sum(text.count(separator) for separator in separators)
    return os.path.isabs(text) or text.startswith((".", "~")) or text[-1:] in separators or count > 1


@contextmanager
def load_errors(source: Source, failed: str, kind: type[LoadError] = CheckpointError) -> Iterator[None]:
    """Turns whatever transformers and the hub client raise into our exceptions.

    Args:
        source: what is being loaded.
        failed: the beginning of the message for errors that are not the hub's, such as "x cannot be read".
        kind: our exception for those errors; the hub's become `ModelNotFoundError`.
    """
    try:
        yield
    except HybridgenError:
        raise
    except Exception as error:
        raise explain(error, source, failed, kind) from error


def explain(error: BaseException, source: Source, failed: str, kind: type[LoadError] = CheckpointError) -> LoadError:
    """Our exception for one of transformers or the hub client. Looks through the chain of causes, because
    transformers wraps the hub client's exceptions in an OSError that can name the wrong cause.
    """
    causes = list(_chain(error))
    reason = next((text for cause in causes if (text := _hub_reason(cause, source)) is not None), None)
    if reason is not None:
        return ModelNotFoundError(f"{source.name!r} cannot be loaded: {reason}")
    return kind(f"{failed}: {short(error)}")


def short(error: BaseException) -> str:
    """The class and the first lines of an exception's text, on one line."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _hub_reason(error: BaseException, source: Source) -> str | None:
    """What a hub client's exception means for the user, and what to do."""
    revision = getattr(source, "revision", None)
    page = f"https://huggingface.co/{source.name}"
    if isinstance(error, hub.GatedRepoError):
        return f"it is gated; accept its terms at {page} and log in with `hf auth login`"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "the hub has no such model, or it is private; check the id, or log in with `hf auth login`"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"it has no revision={revision!r}; choose a branch, tag or commit listed at {page}"
    if isinstance(error, hub.HFValidationError):
        return "that is no directory here, and no hub id either; give an existing directory or owner/name"
    if isinstance(error, hub.LocalEntryNotFoundError):
        if source.local_files_only or huggingface_hub.is_offline_mode():
            switch = "local_files_only=True" if source.local_files_only else "HF_HUB_OFFLINE is set"
            return (
                f"there is no such directory, it is not in the hub's local cache, and {switch}; "
                "give the path of a local checkpoint, or download it first"
            )
        return (
            "there is no such directory, it is not in the hub's local cache, and the hub cannot be reached; "
            "check the network, or give the path of a local checkpoint"
        )
    if isinstance(error, hub.OfflineModeIsEnabled):
        return "it is not in the local cache, and HF_HUB_OFFLINE is set; unset it, or give a local path"
    if isinstance(error, hub.HfHubHTTPError) and not isinstance(error, hub.EntryNotFoundError):
        status = getattr(error.response, "status_code", "an error")
        return f"the hub answered {status}; try again, or give a local path"
    # The HTTP client's own exceptions; which client it is depends on the version of huggingface_hub.
    if type(error).__module__.split(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "requests",
        "urllib3",
    ):
        return f"the hub cannot be reached ({type(error).__name__}); check the network, or give a local path"
    return None
