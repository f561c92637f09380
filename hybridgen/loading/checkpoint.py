"""A model's files or a live module, opened in two stages: everything but the weights first, then the weights.

So a wrong path, a missing CUDA device, an architecture that cannot run or a truncated file is reported in
moments, whatever the size of the model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hybridgen.cache import KVScales
from hybridgen.config import EngineConfig
from hybridgen.demo import model_path
from hybridgen.errors import CheckpointError, ConfigError, DeviceError, UnsupportedModelError
from hybridgen.loading import files as metadata
from hybridgen.loading import live_quantised
from hybridgen.loading.checks import validate_directory
from hybridgen.loading.device import resolve_device, without_default_device
from hybridgen.loading.expectation import check_contents, check_quantisation_files
from hybridgen.loading.formats import Format, read_format
from hybridgen.loading.kv_scales import check_kv_dtype, read_kv_scales
from hybridgen.loading.multimodal import placeholders, whole_class
from hybridgen.loading.quantised import identity_of
from hybridgen.loading.source import LocalSource, Source, load_errors, resolve_source
from hybridgen.loading.support import check_supported
from hybridgen.loading.weights import progress_bars, read_weights
from hybridgen.loading.wrappers import unwrapped
from hybridgen.models.latent import find_latents
from hybridgen.models.probe import ProbedCall, probe_config
from hybridgen.models.projections import FusedHead
from hybridgen.models.quantised import QuantisedHead
from hybridgen.models.text_part import TextPart, is_multimodal, text_config, text_part, without_encoders
from hybridgen.models.weights import ModuleWeights


@dataclass(frozen=True)
class LoadedModel:
    """A model whose weights are in memory."""

    model: PreTrainedModel
    """On the checkpoint's device; in evaluation mode, but for a live module, which is as its owner has it."""
    seconds: float
    """What reading the weights took, a download included; 0 for a live module."""
    owned: bool
    """Whether nobody else has the module. False for a live module, which stays its caller's: nothing of it is changed,
    and each call looks at what its owner did to it."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What is not as the checkpoint or the config asks for, counted by reason."""
    kv_scales: Mapping[str, KVScales] = field(default_factory=dict)
    """Of cached keys and values in 8 bits, by the names of attention modules; where they are cached so."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is known about a model before its weights are read. Made by `Checkpoint.open`."""

    name: str
    """The directory, hub id or name shown to users."""
    config: EngineConfig
    hf_config: PreTrainedConfig = field(repr=False)
    """Of the language model; of a multimodal one its text part's."""
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)
    tokenizer_problem: str | None
    """Why there is no tokenizer; None if there is one."""
    generation_config: GenerationConfig = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_context: int | None
    """The longest sequence that the model was made for, if its config says so."""
    eos_token_ids: tuple[int, ...]
    whole_config: PreTrainedConfig | None = field(default=None, repr=False)
    """Of the multimodal model whose text part is run; None for a language model."""
    placeholders: Mapping[int, str] = field(default_factory=dict)
    """Tokens that stand for images, video or sound, with the names of their fields in the config."""
    source: Source | None = None
    """Where the files are; None for a live module."""
    layout: Format | None = field(default=None, repr=False)
    """How quantised weights are stored; None where there are none."""
    formats: str = "dense"
    """The weights' formats as far as they are known before reading, for the compile cache's key."""
    attention: tuple[str, ...] = field(default=(), repr=False)
    """The names of a checkpoint's attention modules."""
    files: tuple[Path, ...] = field(default=(), repr=False)
    """The validated weight files of a local checkpoint."""
    module: PreTrainedModel | None = field(default=None, repr=False)
    """The live module, if one was given."""
    given: Any = field(default=None, repr=False, compare=False)
    """What it was given as: itself, or a PEFT model around it."""
    seconds: float = field(default=0.0, repr=False, compare=False)
    """What opening it took."""
    _probed: tuple[int, tuple[ProbedCall, ...]] | None = field(default=None, repr=False, compare=False)
    """What the attention calls see up to a context, as read off the config."""

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | PreTrainedModel | None,
        config: EngineConfig | None = None,
        tokenizer: Any = None,
    ) -> Checkpoint:
        """Finds the model and checks everything that can be checked without its weights.

        Args:
            model: a directory, a hub id (`owner/name`), a model that is already in memory (a PEFT model too), or None
                for the demo model.
            config: device, dtype and how files may be read.
            tokenizer: used instead of the checkpoint's: an object, or the directory or hub id of one.

        Raises:
            ModelNotFoundError: no such directory or hub model, or the hub cannot be reached.
            CheckpointError: files are missing, truncated or corrupt; a live module has no weights.
            UnsupportedModelError: the engine cannot run this architecture; the message names the reason.
            TokenizerError: the tokenizer given cannot be used.
            DeviceError: the device is absent, or a live module is spread over several.
            ConfigError: a field contradicts a live module or a directory, or `model` is of another type.
        """
        start = time.perf_counter()
        with without_default_device():
            found = cls._open(model, config or EngineConfig(), tokenizer)
        return replace(found, seconds=time.perf_counter() - start)

    @classmethod
    def _open(
        cls, model: str | os.PathLike[str] | PreTrainedModel | None, config: EngineConfig, tokenizer: Any
    ) -> Checkpoint:
        if model is None:
            model = model_path()
        inside = unwrapped(model)
        if isinstance(inside, PreTrainedModel):
            return replace(cls._open_live(inside, config, tokenizer), given=model)
        if not isinstance(model, (str, os.PathLike)):
            raise ConfigError(f"model={model!r}; give a directory, a hub id or a transformers PreTrainedModel")
        device = resolve_device(config.device)
        with progress_bars(config.progress):
            return cls._open_files(resolve_source(model, config), device, config, tokenizer)

    @classmethod
    def _open_files(cls, source: Source, device: torch.device, config: EngineConfig, tokenizer: Any) -> Checkpoint:
        # A checkpoint's files can hold anything: what transformers and we trip over is the checkpoint's fault.
        with load_errors(source, f"{source.name!r} cannot be used"):
            return cls._open_source(source, device, config, tokenizer)

    @classmethod
    def _open_source(cls, source: Source, device: torch.device, config: EngineConfig, tokenizer: Any) -> Checkpoint:
        trust = config.trust_remote_code
        hf_config = metadata.read_config(source, trust)
        stored = getattr(hf_config, "quantization_config", None)
        described = hf_config
        if not stored:  # as transformers does: the config of a multimodal model's text may say it
            described = text_config(hf_config)
            stored = getattr(described, "quantization_config", None)
        layout = read_format(stored)
        if layout is not None:
            check_quantization(config, layout)
            del described.quantization_config  # the weights are read here; transformers builds plain layers
        check_supported(hf_config, trust)
        whole, hf_config = hf_config, text_config(hf_config)
        model_class = _built_class(whole, source, trust)
        if model_class is not None:
            check_supported(whole, trust, model_class)
        metadata.check_heads(hf_config)
        metadata.vocabulary_size(hf_config)
        if layout is None:
            check_quantisation_files(source)
        files: list[Path] = []
        if isinstance(source, LocalSource):
            files = validate_directory(source.path, config.allow_pickle, _weights_name(whole))
            check_contents(source, files, whole, model_class, layout)
        found = cls(
            name=source.name,
            source=source,
            layout=layout,
            formats=identity_of(layout, stored, config),
            files=tuple(files),
            config=config,
            hf_config=hf_config,
            **_whole(whole),
            device=device,
            dtype=metadata.checkpoint_dtype(whole if whole.dtype is not None else hf_config, files, config.dtype),
            **_generation(
                hf_config,
                metadata.read_generation_config(whole, source),
                str(source.find("generation_config.json") or f"what the config of {source.name!r} says of generation"),
            ),
            **_tokenizer(tokenizer, whole, source, config),
        )
        # Last, because it builds the model (on the meta device), which a config that makes no sense would not survive.
        context = config.max_context or found.max_context or 0
        calls = probe_config(whole, context, model_class)
        check_kv_dtype(config.kv_dtype, device, [call.name for call in calls if call.latent])
        return replace(found, attention=tuple(call.name for call in calls), _probed=(context, calls))

    @classmethod
    def _open_live(cls, module: PreTrainedModel, config: EngineConfig, tokenizer: Any) -> Checkpoint:
        whole, hf_config = module.config, text_config(module.config)
        name = str(getattr(module, "name_or_path", "") or getattr(hf_config, "_name_or_path", "") or "")
        device = _live_device(module, config.device)
        quantised = _method(whole) in live_quantised.METHODS
        check_supported(whole, config.trust_remote_code, type(module), quantised=quantised)
        metadata.check_heads(hf_config)
        text = text_part(module)
        if text.get_output_embeddings() is None or not module.can_generate():
            raise UnsupportedModelError(f"{type(module).__name__} has no language model head; give a ...ForCausalLM")
        if config.quantization is not None or config.quantize_head is not None:
            raise CannotQuantise(
                f"quantization={config.quantization!r} and quantize_head={config.quantize_head!r} are for checkpoints, "
                "and ",
                "this model is in memory already, with weights that its owner may change; save it with "
                "save_pretrained() and give the directory",
            )
        latents = set(find_latents(module))
        check_kv_dtype(config.kv_dtype, device, [name for name, each in module.named_modules() if each in latents])
        path = Path(name).expanduser()
        source = LocalSource(path, config.local_files_only) if name and path.is_dir() else None
        generation_config = getattr(module, "generation_config", None) or GenerationConfig.from_model_config(whole)
        kind, module = type(module).__name__, text
        dtype = _live_dtype(module, config.dtype)
        return cls(
            name=name or kind,
            module=module,
            formats=_live_formats(module, dtype),
            config=config,
            hf_config=hf_config,
            **_whole(whole),
            device=device,
            dtype=dtype,
            **_generation(hf_config, generation_config, f"the generation_config of this {kind}"),
            **_tokenizer(tokenizer, whole, source, config),
        )

    def probed(self, context: int) -> tuple[ProbedCall, ...] | None:
        """What the attention calls see, for the model that is loaded from it; None where that model has to be probed
        again: another context, or code that the checkpoint brings."""
        if self._probed is None or self._probed[0] != context or self.config.trust_remote_code:
            return None
        return self._probed[1]

    @property
    def joins(self) -> bool:
        """Whether projections may be joined: a live module's are left as they are (they may be joined already)."""
        return self.module is None or any(
            isinstance(module, (FusedHead, QuantisedHead)) for module in self.module.modules()
        )

    def model_class(self) -> type[PreTrainedModel] | None:
        """The class that the model has or will have; None where transformers names none. Of the text part of a
        multimodal model, that model's."""
        if isinstance(self.module, TextPart):
            return type(self.module.whole)
        if self.module is not None:
            return type(self.module)
        if self.whole_config is not None:
            return whole_class(self.whole_config)
        if self.source is not None:
            remote = metadata.remote_model_class(self.hf_config, self.source, self.config.trust_remote_code)
            if remote is not None:
                return remote
        return metadata.known_model_class(self.hf_config)

    def built_class(self) -> type[PreTrainedModel] | None:
        """Who builds the model, a multimodal one without its encoders; None: transformers chooses."""
        assert self.source is not None
        return _built_class(self.whole_config or self.hf_config, self.source, self.config.trust_remote_code)

    @cached_property
    def encoding(self) -> dict[str, Any]:
        """What `encode_prompt` has to know of the model. Kept: a tokenizer is slow to tell its padding token."""
        return {
            "tokenizer": self.tokenizer,
            "tokenizer_problem": self.tokenizer_problem,
            "vocab_size": self.vocab_size,
            "placeholders": self.placeholders,
            "pad": getattr(self.tokenizer, "pad_token_id", None),
        }

    def fetch(self) -> list[Path]:
        """The weight files, checked; those of a hub model are downloaded first.

        Raises:
            CheckpointError: they are broken, or do not belong to the config.
            ModelNotFoundError: the hub cannot be reached.
        """
        files = list(self.files)
        if files or self.source is None:
            return files
        whole = self.whole_config or self.hf_config
        pickle, weights_name = self.config.allow_pickle, _weights_name(whole)
        with progress_bars(self.config.progress):
            files = validate_directory(self.source.fetch_weights(pickle, weights_name), pickle, weights_name)
        with without_default_device():
            model_class = self.built_class()
            check_contents(self.source, files, whole, model_class, self.layout)
        return files

    def kv_scales(self, files: list[Path]) -> dict[str, KVScales]:
        """The scales of cached keys and values that the files have, by the names of attention modules; none where
        keys and values are cached in 16 bits.

        Raises:
            CheckpointError: see `read_kv_scales`.
        """
        if self.config.kv_dtype is None:
            return {}
        return read_kv_scales(files, self.attention, getattr(self.hf_config, "num_hidden_layers", None))

    def load(self) -> LoadedModel:
        """Reads the weights; those of a hub model are downloaded and checked first.

        A live module is handed over as it is.

        Raises:
            CheckpointError: weights are missing, have other shapes than the config says, or cannot be read.
            ModelNotFoundError: the hub cannot be reached.
            OutOfMemoryError: the weights do not fit on the device.
        """
        if self.module is not None:
            return LoadedModel(self.module, 0.0, owned=False)
        assert self.source is not None
        start = time.perf_counter()
        files = self.fetch()
        whole = self.whole_config or self.hf_config
        scales = self.kv_scales(files)
        with without_default_device():
            model_class = self.built_class()
            arguments = self.source, files, whole, self.dtype, self.device, self.config
            model, notes = read_weights(*arguments, self.layout, model_class)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return LoadedModel(model, time.perf_counter() - start, owned=True, notes=notes, kv_scales=scales)


class CannotQuantise(ConfigError):
    """A model that is to be quantised while it is read is in memory, or is quantised already."""

    def __init__(self, asked: str, why: str) -> None:
        """
        Args:
            asked: the setting, up to the reason.
            why: the reason, and what to do.
        """
        super().__init__(asked + why)
        self.why = why


def check_quantization(config: EngineConfig, layout: Format) -> None:
    """Raise if a checkpoint that is quantised is to be quantised again.

    Raises:
        ConfigError: it is.
    """
    if config.quantization is not None:
        why = f"the checkpoint's weights are quantised already ({layout.method}); leave it out"
        raise CannotQuantise(f"quantization={config.quantization!r}, and ", why)


def _whole(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields about a multimodal model."""
    return {"whole_config": config, "placeholders": placeholders(config)} if is_multimodal(config) else {}


def _built_class(config: PreTrainedConfig, source: Source, trust: bool) -> type[PreTrainedModel] | None:
    """The class to build the model with: a multimodal one's without its encoders, or of code that the checkpoint
    brings; None for the one that transformers has."""
    if is_multimodal(config):
        found = whole_class(config)
        return None if found is None else without_encoders(found)
    return metadata.remote_model_class(config, source, trust)


def _weights_name(hf_config: PreTrainedConfig) -> str | None:
    return getattr(hf_config, "transformers_weights", None)


def _generation(hf_config: PreTrainedConfig, generation_config: GenerationConfig, whose: str) -> dict[str, Any]:
    vocab_size = metadata.vocabulary_size(hf_config)
    eos = metadata.eos_ids(generation_config, hf_config)
    metadata.check_generation(generation_config, eos, vocab_size, whose)
    return {
        "generation_config": generation_config,
        "vocab_size": vocab_size,
        "max_context": metadata.context_limit(hf_config),
        "eos_token_ids": eos,
    }


def _tokenizer(given: Any, hf_config: PreTrainedConfig, source: Source | None, config: EngineConfig) -> dict[str, Any]:
    if given is not None:
        found = metadata.given_tokenizer(given, config.trust_remote_code, config.local_files_only)
        return {"tokenizer": found, "tokenizer_problem": None}
    if source is None:
        problem = "the model was given in memory, without a directory to read a tokenizer from; pass tokenizer=..."
        return {"tokenizer": None, "tokenizer_problem": problem}
    tokenizer, why = metadata.read_tokenizer(hf_config, source, config.trust_remote_code)
    return {"tokenizer": tokenizer, "tokenizer_problem": why}


def _method(config: PreTrainedConfig) -> str | None:
    """The `quant_method` of a live module's config."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _live_formats(module: PreTrainedModel, dtype: torch.dtype) -> str:
    """What is known of the formats of a live module's weights, for the compile cache's key.

    Raises:
        UnsupportedModelError: some are quantised in a way that is not read from live modules.
    """
    identity = ModuleWeights(module).identity
    if _method(module.config) not in live_quantised.METHODS:
        return identity
    return f"{identity}, live {sorted(live_quantised.formats_of_live(module, dtype).items())}"


def _live_device(module: PreTrainedModel, asked: str) -> torch.device:
    """The one device of a live module.

    Raises:
        CheckpointError: parameters have no values (meta device).
        DeviceError: the module is spread over devices or processes, or on neither a CPU nor a CUDA device.
        ConfigError: `EngineConfig.device` names another device.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    meta = [name for name, tensor in tensors if tensor.is_meta]
    if meta:
        raise CheckpointError(f"the model has {len(meta)} tensors without values (meta device), such as {meta[0]}")
    if any(hasattr(tensor, "device_mesh") for _, tensor in tensors):
        raise DeviceError("the model's parameters are distributed tensors; give a model that is whole on one device")
    devices = sorted({str(tensor.device) for _, tensor in tensors})
    if len(devices) != 1:
        raise DeviceError(f"the model lies on {', '.join(devices) or 'no device'}; move it to one with model.to(...)")
    device = torch.device(devices[0])
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"the model lies on {device}; move it to the CPU or a CUDA device with model.to(...)")
    if asked != "auto" and asked not in (device.type, str(device)):
        raise ConfigError(
            f"device={asked!r}, but the model given lies on {device}; leave device out, or move the model"
        )
    return device


def _live_dtype(module: PreTrainedModel, asked: str) -> torch.dtype:
    """The dtype of a live module.

    Raises:
        UnsupportedModelError: it is none of float32, bfloat16 and float16.
        ConfigError: `EngineConfig.dtype` names another dtype.
    """
    name = str(module.dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise UnsupportedModelError(f"the model given is {name}; convert it with model.to(torch.float32)")
    if asked not in ("auto", name):
        raise ConfigError(f"dtype={asked!r}, but the model given is {name}; leave dtype out, or convert the model")
    return module.dtype
