"""The front door: `generate()`, `stream()` and `unload()`, with models kept loaded between calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hybridgen.config import EngineConfig
from hybridgen.core import SamplingParams, TokenEvent
from hybridgen.engine import Engine
from hybridgen.errors import ConfigError, PromptError
from hybridgen.loading import Checkpoint
from hybridgen.prompts import Prompts, split_prompts
from hybridgen.requests import check_keywords, context_limit, plan_requests

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_PROMPTS = "no prompts were given; call it with (model, prompts), or with prompts= alone for the demo model"

_engines: dict[Any, Engine] = {}
_lock = threading.RLock()


def generate(
    model: str | os.PathLike[str] | PreTrainedModel | Engine | None = None,
    prompts: Prompts | None = None,
    sampling: SamplingParams | Iterable[SamplingParams] | None = None,
    *,
    config: EngineConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: Any = None,
    **fields: Any,
) -> Any:
    """Generate text with a model.

    A model stays loaded between calls: the next one with the same model and config starts at once; one with another
    config replaces it. `unload()` frees it.

    Args:
        model: a local path, a hub id, a live `PreTrainedModel`, an `Engine`, or None for the demo model.
        prompts: a string, token ids (list or tensor), chat messages, or a list of those.
        sampling: for all prompts, or a list with one per prompt.
        config: how to load and run the model.
        tokenizer: for a live model that brings none, or instead of the checkpoint's.
        streamer: a Hugging Face streamer, for one prompt.
        fields: single fields of `SamplingParams` (for all prompts) or of `EngineConfig`.

    Returns:
        A `Completion` for one prompt; for a list, a list of them in its order.

    Raises:
        HybridgenError: see `hybridgen.errors`; bad input is found before weights are read.
    """
    if prompts is None:
        raise PromptError(_NO_PROMPTS)
    engine, sampling_fields = prepare(model, prompts, sampling, config, tokenizer, fields)
    return engine.generate(prompts, sampling, streamer=streamer, **sampling_fields)


def stream(
    model: str | os.PathLike[str] | PreTrainedModel | Engine | None = None,
    prompts: Prompts | None = None,
    sampling: SamplingParams | Iterable[SamplingParams] | None = None,
    *,
    config: EngineConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **fields: Any,
) -> Iterator[TokenEvent]:
    """Generate as `generate()` does, and yield each token as it is read. See `Engine.stream`."""
    if prompts is None:
        raise PromptError(_NO_PROMPTS)
    engine, sampling_fields = prepare(model, prompts, sampling, config, tokenizer, fields)
    return engine.stream(prompts, sampling, **sampling_fields)


def unload(model: str | os.PathLike[str] | PreTrainedModel | None = None) -> None:
    """Free the models that `generate()` and `stream()` keep loaded: one of them, or all when none is named."""
    with _lock:
        for key in list(_engines) if model is None else [_key(model)]:
            engine = _engines.pop(key, None)
            if engine is not None:
                engine.close()


def prepare(
    model: Any, prompts: Any, sampling: Any, config: EngineConfig | None, tokenizer: Any, fields: dict[str, Any]
) -> tuple[Engine, dict[str, Any]]:
    """The engine for a call, and the call's sampling fields."""
    check_keywords(fields, EngineConfig.field_names() | SamplingParams.field_names())
    sampling_fields = {name: value for name, value in fields.items() if name in SamplingParams.field_names()}
    engine_fields = {name: value for name, value in fields.items() if name not in sampling_fields}
    if isinstance(model, Engine):
        if engine_fields or config is not None or tokenizer is not None:
            name = next(iter(engine_fields), "config" if config is not None else "tokenizer")
            raise ConfigError(f"{name}= cannot be changed on a loaded Engine; load another with Engine.load()")
        return model, sampling_fields
    config = (config or EngineConfig()).replace(**engine_fields)
    items, _ = split_prompts(prompts)
    with _lock:
        key = _key(model)
        kept = _engines.get(key)
        if kept is not None and not kept.closed and kept.config == config and tokenizer in (None, kept.tokenizer):
            return kept, sampling_fields
        checkpoint = Checkpoint.open(model, config, tokenizer=tokenizer)
        # Before any weight is read, so that bad input costs nothing; the cache's size is checked by the engine.
        plan_requests(items, sampling, sampling_fields, checkpoint, context_limit(checkpoint, config.max_context), None)
        if kept is not None:
            kept.close()
            del _engines[key]
        engine = _engines[key] = Engine(checkpoint, checkpoint.load(), config)
        return engine, sampling_fields


def _key(model: Any) -> Any:
    """What tells models apart: a live module by identity, a path or id by its text."""
    if model is None or isinstance(model, str):
        return model
    return os.fspath(model) if isinstance(model, os.PathLike) else id(model)
