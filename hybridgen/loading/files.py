"""Reads what a checkpoint says about itself: config, tokenizer, generation config. No weights."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hybridgen.demo import model_path
from hybridgen.errors import (
    CheckpointError,
    HybridgenError,
    SamplingError,
    TokenizerError,
    UnsupportedModelError,
    shown,
)
from hybridgen.loading.checks import read_header, read_json
from hybridgen.loading.source import LocalSource, Source, load_errors, looks_like_path, short
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve

logger = logging.getLogger(__name__)

_LENGTH_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
    "seq_length",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_COUNTS = re.compile(r"^(?!vocab).*(?:layer|num_labels|block|expert|n_groups?$|depth)")
_MOST = 100_000
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "num_return_sequences": (1,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "remove_invalid_values": (False,),
    "watermarking_config": (),
    "token_healing": (False,),
    "max_time": (),
    "is_assistant": (False,),
}
"""What `generate()` of transformers reads and this library does not, with the values that change nothing."""
_APPLIED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "sequence_bias": ({}, []),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": ([],),
    "forced_eos_token_id": ([],),
}
"""What a model's `generation_config` changes besides how it samples, with the values that change nothing."""
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_RUNNABLE = (torch.float32, torch.bfloat16, torch.float16)


def read_config(source: Source, trust_remote_code: bool) -> PreTrainedConfig:
    """The model's config.

    Raises:
        CheckpointError: config.json is missing, broken, or has values that transformers refuses.
        UnsupportedModelError: transformers lacks the model type, or its code comes with the checkpoint.
    """
    file = source.find("config.json")
    if file is None:
        raise source.explain_missing_config()
    raw = read_json(file)
    _check_values(raw, file)
    _check_model_type(raw, file, trust_remote_code)
    with load_errors(source, f"{file} cannot be used"):
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.arguments)
    # A config file can name an attention or expert implementation, and transformers would fetch a name such
    # as "owner/kernel" from the hub and run it. Which implementation runs is not the file's choice.
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def _check_values(raw: dict[str, Any], file: Path) -> None:
    """Check what transformers takes for granted.

    Raises:
        CheckpointError: a value is of a kind, or a count of a size, that no model has.
    """
    if raw.get("auto_map") is not None and not isinstance(raw["auto_map"], dict):
        raise CheckpointError(f"{file}: auto_map={shown(raw['auto_map'])} is no object; write it again")
    name = raw.get("transformers_weights")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{file}: transformers_weights={shown(name)} is no file name; write it again")
    for values in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for field, value in values.items():
            # Config classes make lists of that length.
            if isinstance(value, (int, float)) and _COUNTS.search(field) and abs(value) > _MOST:
                raise CheckpointError(f"{file}: {field}={shown(value)} is more than any model has; write it again")
    for part in (raw, raw.get("text_config")):
        for field in ("dtype", "torch_dtype"):
            value = part.get(field) if isinstance(part, dict) else None
            if value is not None and getattr(torch, str(value).removeprefix("torch."), None) not in _FLOATS.values():
                raise CheckpointError(
                    f"{file}: {field}={shown(value)} is no dtype that a model can be built in; write float32, bfloat16 "
                    "or float16, or leave it out"
                )
    if isinstance(layers := raw.get("num_hidden_layers"), int) and layers < 1:
        raise CheckpointError(f"{file}: num_hidden_layers={layers}; a model has at least one")


def config_value(config: PreTrainedConfig, name: str) -> Any:
    """A field of the config; None where there is none, or where it differs between layers."""
    try:
        return getattr(config, name, None)
    except Exception as error:  # transformers' exception for this is newer than the oldest version supported
        if type(error).__name__ != "AmbiguousGlobalPerLayerAttributeError":
            raise
        return None


def check_heads(config: PreTrainedConfig) -> None:
    """Check that the attention heads can share the key-value heads.

    Raises:
        UnsupportedModelError: they cannot; Hugging Face's code would fail in each forward pass.
    """
    heads, shared = config_value(config, "num_attention_heads"), config_value(config, "num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(shared, int):
        return
    if shared < 1 or heads % shared:
        raise UnsupportedModelError(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={shared} in the config; each key-value "
            "head serves as many attention heads"
        )


def _check_model_type(raw: dict[str, Any], file: Path, trust_remote_code: bool) -> None:
    model_type = raw.get("model_type")
    auto_map = raw.get("auto_map")
    remote = isinstance(auto_map, dict) and "AutoConfig" in auto_map
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    if remote and trust_remote_code:
        return
    if remote:
        raise UnsupportedModelError(
            f"{file}: the code of model type {model_type!r} comes with the checkpoint; read that code, then "
            "set trust_remote_code=True to run it"
        )
    if model_type is None:
        raise CheckpointError(f"{file} has no model_type; give a checkpoint that transformers wrote")
    raise UnsupportedModelError(
        f"{file}: model type {model_type!r} is unknown to transformers {transformers_version}; "
        "a newer version may know it"
    )


def remote_model_class(
    config: PreTrainedConfig, source: Source, trust_remote_code: bool
) -> type[PreTrainedModel] | None:
    """The model class that the checkpoint brings, if it brings one and may; else None. Runs its module.

    Raises:
        CheckpointError: the code is missing or fails.
    """
    auto_map = getattr(config, "auto_map", None)
    reference = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    if reference is None or not trust_remote_code:
        return None
    with load_errors(source, f"the code {reference!r} of {source.name!r} cannot be loaded"):
        return get_class_from_dynamic_module(reference, source.name, **source.arguments)


def known_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that transformers loads for a config; None where it names none, or several."""
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None
    return found if isinstance(found, type) else None


def read_tokenizer(
    config: PreTrainedConfig, source: Source, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """The tokenizer, or None and why there is none. Without one a model still runs on token ids."""
    if isinstance(source, LocalSource) and not any(source.find(name) for name in _TOKENIZER_FILES):
        return None, f"{source.name!r} has no tokenizer files"
    return _tokenizer(source.name, config=config, trust_remote_code=trust_remote_code, **source.arguments)


def given_tokenizer(tokenizer: Any, trust_remote_code: bool, local_files_only: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that a caller gave, as an object or as a directory or hub id.

    Raises:
        TokenizerError: it is neither, or cannot be loaded.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        name = str(Path(tokenizer).expanduser())
        if looks_like_path(str(tokenizer)) and not Path(name).exists():
            raise TokenizerError(f"tokenizer={name!r}: there is no such directory; give an existing one, or a hub id")
        found, problem = _tokenizer(name, trust_remote_code=trust_remote_code, local_files_only=local_files_only)
        if found is None:
            raise TokenizerError(f"tokenizer={name!r} cannot be loaded: {problem}")
        return found
    if not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise TokenizerError(f"tokenizer={tokenizer!r} is no tokenizer; give a Hugging Face tokenizer or its directory")
    return tokenizer


def _tokenizer(name: str, **arguments: Any) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
        # Without files, some classes build a tokenizer of special tokens alone, which maps any text to <unk>. Others
        # are a pair of tokenizers, and have no length.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            return None, f"{name!r} has no vocabulary for its tokenizer"
        tokenizer("a")
        tokenizer.decode([0])
    except HybridgenError:
        raise
    except Exception as error:  # tokenizer classes raise what they like when files are missing
        return None, f"{name!r} has no tokenizer that transformers can load ({short(error)})"
    return tokenizer, None


def read_generation_config(config: PreTrainedConfig, source: Source) -> GenerationConfig:
    """The checkpoint's generation_config.json, or what its config.json says about generation.

    Raises:
        CheckpointError: the file is broken.
    """
    file = source.find("generation_config.json")
    if file is not None:
        values = read_json(file)
        with load_errors(source, f"{file} cannot be used"):
            return GenerationConfig.from_dict(values)
    file = source.find("config.json")
    if file is None:
        return GenerationConfig.from_model_config(config)
    values = read_json(file)  # a config forgets what its file says of generation
    with load_errors(source, f"{file} cannot be used"):
        return GenerationConfig.from_model_config(values)


_TELLS = ContextVar("_TELLS", default=True)


@contextmanager
def generation_untold() -> Iterator[None]:
    """Inside, nothing is said of generation configs: the model that is opened does not go by its own."""
    token = _TELLS.set(False)
    try:
        yield
    finally:
        _TELLS.reset(token)


def check_generation(generation_config: Any, eos_token_ids: tuple[int, ...], vocab_size: int, whose: str) -> None:
    """Refuse what cannot be applied, and name in one warning what is not applied.

    Args:
        whose: the file or model that it is of, for messages.

    Raises:
        CheckpointError: a value is out of its range.
    """
    try:
        resolve(SamplingParams(), generation_config, eos_token_ids, vocab_size)
    except SamplingError as error:
        raise CheckpointError(f"{whose} cannot be used: {error}") from None
    if not _TELLS.get():
        return
    applied = {
        name: value
        for name, off in _APPLIED.items()
        if (value := getattr(generation_config, name, None)) is not None and value not in off
    }
    if applied and os.path.realpath(os.path.dirname(whose)) != str(
        model_path()
    ):  # the demo model is compared with nothing
        _tell_of_applied(whose, ", ".join(f"{name}={shown(value)}" for name, value in applied.items()))
    found = not_applied(generation_config)
    if found:
        listed = ", ".join(f"{name}={shown(value)}" for name, value in found.items())
        logger.warning("%s: not applied here, so that texts can differ from Hugging Face's: %s", whose, listed)


def not_applied(generation_config: Any) -> dict[str, Any]:
    """What a generation config asks for and this library does not do, with its value."""
    found = {
        name: value
        for name, off in _NOT_APPLIED.items()
        if (value := getattr(generation_config, name, None)) is not None and value not in off
    }
    top_h = getattr(generation_config, "top_h", None)
    if top_h is not None and getattr(generation_config, "do_sample", False):
        found["top_h"] = top_h
    if getattr(generation_config, "cache_implementation", None) == "quantized":
        found["cache_implementation"] = "quantized"
    return found


@functools.cache
def _tell_of_applied(whose: str, listed: str) -> None:
    """Once for each model: whoever compares texts with another library's should know."""
    logger.warning(
        "%s: applied where a call does not say otherwise: %s; SamplingParams says how each is switched off",
        whose,
        listed,
    )


def eos_ids(generation_config: GenerationConfig, config: PreTrainedConfig) -> tuple[int, ...]:
    """The end-of-sequence token ids, from the generation config, else from the config.

    Raises:
        CheckpointError: they are no integers.
    """
    value = generation_config.eos_token_id
    if value is None:
        value = getattr(config, "eos_token_id", None)
    if value is None:
        return ()
    ids = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(
            f"eos_token_id={value!r} in the checkpoint's configs; make it an integer or a list of them"
        )
    return tuple(dict.fromkeys(token for token in ids if token >= 0))


def context_limit(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the model was made for, or None if its config does not say."""
    for field in _LENGTH_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def vocabulary_size(config: PreTrainedConfig) -> int:
    """The number of token ids.

    Raises:
        CheckpointError: the config has none.
    """
    value = getattr(config, "vocab_size", None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"vocab_size={value!r} in config.json; a language model needs a positive one")
    return value


def checkpoint_dtype(config: PreTrainedConfig, files: list[Path], asked: str) -> torch.dtype:
    """The dtype that the weights get.

    Args:
        config: the model's config, whose `dtype` counts for `auto`.
        files: weight files; their first floating tensor counts if the config has no dtype, else float32.
        asked: `EngineConfig.dtype`.

    Raises:
        UnsupportedModelError: the checkpoint's own dtype cannot run here.
    """
    if asked != "auto":
        return getattr(torch, asked)
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is None:
        names = (e.dtype for f in files if f.suffix == ".safetensors" for e in read_header(f).values())
        dtype = next((_FLOATS[name] for name in names if name in _FLOATS), torch.float32)
    if dtype not in _RUNNABLE:
        raise UnsupportedModelError(
            f"the checkpoint's dtype is {str(dtype).removeprefix('torch.')}; "
            "set dtype='float32', 'bfloat16' or 'float16'"
        )
    return dtype
