"""The front door: `generate()`, `stream()` and `unload()`, with models kept loaded between calls; `compare()`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard, overload

from hybridgen.arguments import (
    SCORES,
    ManyPrompts,
    OnePrompt,
    Sampling,
    check_keywords,
    end_streamer,
    prompt_list,
    returns_errors,
    sampling_list,
    scoring_pairs,
)
from hybridgen.config import EngineConfig
from hybridgen.core import Completion, TokenEvent
from hybridgen.demo import model_path
from hybridgen.errors import ConfigError, PromptError, shown
from hybridgen.params import SamplingParams
from hybridgen.serving.client import Client
from hybridgen.serving.client.exchange import Call
from hybridgen.serving.unix.address import SCHEME, socket_path
from hybridgen.telemetry import import_time

# What needs torch is imported where it is used: a call of a server does without.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hybridgen.comparison.config import CompareConfig
    from hybridgen.comparison.results import Comparison
    from hybridgen.engine import Engine
    from hybridgen.text.prompts import Prompts

_NO_PROMPTS = "no prompts were given; call it with (model, prompts), or with prompts= alone for the demo model"

Model: TypeAlias = "str | os.PathLike[str] | PreTrainedModel | Engine | None"
"""A path, a hub id, `"unix:PATH"`, a live module, an engine, or None for the demo model."""
Tokenizer: TypeAlias = "PreTrainedTokenizerBase | str | os.PathLike[str]"
"""A tokenizer, or the directory or hub id of one."""


class _Kept(NamedTuple):
    engine: Engine
    tokenizer: Any
    """The key of what its call gave as `tokenizer=`; None if it gave none."""


_engines: dict[Any, _Kept] = {}
_lock = threading.RLock()


@overload
def generate(  # type: ignore[overload-overlap]  # a string is one prompt
    model: Model = None,
    prompts: OnePrompt = ...,
    sampling: Sampling = None,
    *,
    config: EngineConfig | None = None,
    tokenizer: Tokenizer | None = None,
    streamer: Any = None,
    errors: str = "raise",
    **fields: Any,
) -> Completion: ...


@overload
def generate(
    model: Model = None,
    prompts: ManyPrompts = ...,
    sampling: Sampling = None,
    *,
    config: EngineConfig | None = None,
    tokenizer: Tokenizer | None = None,
    streamer: Any = None,
    errors: str = "raise",
    **fields: Any,
) -> list[Completion]: ...


@overload
def generate(
    model: Model = None,
    prompts: Any = ...,
    sampling: Sampling = None,
    *,
    config: EngineConfig | None = None,
    tokenizer: Tokenizer | None = None,
    streamer: Any = None,
    errors: str = "raise",
    **fields: Any,
) -> Any: ...


def generate(
    model: Model = None,
    prompts: Prompts | None = None,
    sampling: Sampling = None,
    *,
    config: EngineConfig | None = None,
    tokenizer: Tokenizer | None = None,
    streamer: Any = None,
    errors: str = "raise",
    **fields: Any,
) -> Any:
    """Generate text with a model.

    A model stays loaded between calls: the next one with the same model and config starts at once; one with another
    config or another `tokenizer=` replaces it. A tokenizer given holds for its call: without `tokenizer=`, the next
    one loads the model again, with its own. `unload()` frees it.

    Args:
        model: a local path, a hub id, a live `PreTrainedModel`, an `Engine`, `"unix:PATH"` for a server on that
            socket (`"unix:"` for the default one), or None for the demo model.
        prompts: a string, token ids (list or tensor), chat messages or `{"messages": ..., "tools": ...}`, or any number
            of those: a list, an array, a column of a table, a generator.
        sampling: for all prompts, or a list with one per prompt.
        config: how to load and run the model; a server has its own.
        tokenizer: for a live model that brings none, or instead of the checkpoint's; an object, or the directory or
            hub id of one.
        streamer: a Hugging Face streamer, for one prompt.
        errors: `"raise"`, or `"return"`: a prompt that cannot be run becomes a completion with its error, and the
            others run.
        fields: single fields of `SamplingParams` (for all prompts) or of `EngineConfig`.

    Returns:
        A `Completion` for one prompt; for a list, a list of them in its order.

    Raises:
        HybridgenError: see `hybridgen.errors`; bad input is found before weights are read.
    """
    try:
        if prompts is None:
            raise PromptError(_NO_PROMPTS)
        prompts, sampling = prompt_list(prompts), sampling_list(sampling)
        server = model if _is_server(model) else None
        if server is not None:
            _check_server_fields(config, tokenizer, fields)
            generator: Any = Client(server)
        else:
            generator, fields = prepare(model, prompts, sampling, config, tokenizer, fields, errors)
    except BaseException:
        end_streamer(streamer)
        raise
    # From here on the call ends its streamer.
    if server is None:
        return generator.generate(prompts, sampling, streamer=streamer, errors=errors, **fields)
    with generator as client:
        return client.generate(prompts, sampling, streamer=streamer, errors=errors, **fields)


def score(
    model: Model = None,
    prompts: Prompts | None = None,
    completions: Any = None,
    *,
    config: EngineConfig | None = None,
    tokenizer: Tokenizer | None = None,
    cache_salt: str | None = None,
    **fields: Any,
) -> Any:
    """How likely a model finds each completion behind its prompt; see `Engine.score`.

    Args:
        model, config, tokenizer: as for `generate()`.
        prompts, completions, cache_salt: as for `Engine.score`.
        fields: single fields of `EngineConfig`.

    Returns:
        A `Score`; for a list of prompts or completions, a list of them in its order.

    Raises:
        HybridgenError: see `hybridgen.errors`; bad input is found before weights are read.
    """
    if prompts is None:
        raise PromptError(_NO_PROMPTS)
    prompts, completions = prompt_list(prompts), prompt_list(completions)
    check_keywords(fields, EngineConfig.field_names())
    if _is_server(model):
        _check_server_fields(config, tokenizer, fields)
        with Client(model) as client:
            return client.score(prompts, completions, cache_salt=cache_salt)
    from hybridgen.text.prompts import split_prompts

    split = None if completions is None else split_prompts(completions)
    pairs, _ = scoring_pairs(split_prompts(prompts), split)
    engine, _ = prepare(model, pairs, SCORES, config, tokenizer, fields)
    return engine.score(prompts, completions, cache_salt=cache_salt)


def stream(
    model: Model = None,
    prompts: Prompts | None = None,
    sampling: Sampling = None,
    *,
    config: EngineConfig | None = None,
    tokenizer: Tokenizer | None = None,
    errors: str = "raise",
    **fields: Any,
) -> Iterator[TokenEvent]:
    """Generate as `generate()` does, and yield each token as it is read. See `Engine.stream`."""
    if prompts is None:
        raise PromptError(_NO_PROMPTS)
    prompts, sampling = prompt_list(prompts), sampling_list(sampling)
    if _is_server(model):
        _check_server_fields(config, tokenizer, fields)
        return _stream_from(socket_path(model), Call(prompts, sampling, fields, errors))
    engine, sampling_fields = prepare(model, prompts, sampling, config, tokenizer, fields, errors)
    return engine.stream(prompts, sampling, errors=errors, **sampling_fields)


def compare(
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    config: CompareConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **fields: Any,
) -> Comparison:
    """Run the same prompts on the same weights in every mode, and report times, memory and agreement of tokens.

    One engine per mode, all on one copy of the weights; their calls take turns in random order, until the medians are
    known to within the tolerance or the budget ends. A cell that fails or runs out of memory is reported as such.

    Args:
        model: a local path, a hub id, a live `PreTrainedModel`, or None for the demo model.
        config: what to run, such as `hybridgen.comparison.results.read(path).config` of an earlier run.
        tokenizer: for a live model that brings none. Prompts are token ids; it is not needed.
        output: a directory for tables, plots and the whole result, see `Comparison.save`.
        progress: a bar: on, off, or (None) on when standard error is a terminal.
        fields: single fields of `hybridgen.comparison.config.CompareConfig` (`modes`, `prompt_lengths`, `batch_sizes`,
            `new_tokens`, `baselines`, `ablate`, `budget`, ...), or of `EngineConfig`, for every engine.

    Returns:
        A `Comparison`; `print()` shows it as a table.

    Raises:
        ConfigError: a value is unknown or out of its range, or the lengths are above the model's context; with
            `output`, also that it cannot be written to. All of it before weights are read.
        HybridgenError: the model cannot be loaded; see `hybridgen.errors`.
    """
    from hybridgen.comparison.config import CompareConfig

    if config is None:
        config = CompareConfig()
    if not isinstance(config, CompareConfig):
        raise ConfigError(f"config={shown(config)} is not a CompareConfig; give one, or its fields as keywords")
    check_keywords(fields, EngineConfig.field_names() | CompareConfig.field_names())
    own = {name: value for name, value in fields.items() if name in CompareConfig.field_names()}
    engine_fields = {name: value for name, value in fields.items() if name not in own}
    given = own.get("engine", {})
    if engine_fields and isinstance(given, Mapping):  # anything else is refused by `CompareConfig`
        own["engine"] = {**config.engine, **given, **engine_fields}
    from hybridgen.comparison.run import run_comparison

    return run_comparison(model, config.replace(**own), tokenizer=tokenizer, output=output, progress=progress)


def _is_server(model: Any) -> TypeGuard[str]:
    return isinstance(model, str) and model.startswith(SCHEME)


def _check_server_fields(config: Any, tokenizer: Any, fields: dict[str, Any]) -> None:
    """Check that a call of a server sets nothing but sampling fields.

    Raises:
        ConfigError: it does.
    """
    check_keywords(fields, EngineConfig.field_names() | SamplingParams.field_names())
    given = [name for name in fields if name not in SamplingParams.field_names()]
    given += ["config"] * (config is not None) + ["tokenizer"] * (tokenizer is not None)
    if given:
        raise ConfigError(f"{given[0]}= cannot be changed on a server; give it to hybridgen serve")


def _stream_from(path: Path, call: Call) -> Iterator[TokenEvent]:
    """Connects with the first `next()`, so that one that is never iterated holds no connection."""
    with Client(path) as client:
        yield from client.stream_call(call)


def unload(model: str | os.PathLike[str] | PreTrainedModel | Engine | None = None) -> None:
    """Free the models that `generate()` and `stream()` keep loaded: one of them, or all when none is named.

    Args:
        model: as it was given to `generate()`; any name of a directory will do. An `Engine` is closed, whoever loaded
            it.

    Raises:
        ConfigError: no such model is loaded; the message names those that are.
    """
    if not _engines and model is None:
        return
    from hybridgen.engine import Engine

    with _lock:
        if isinstance(model, Engine):
            for key in [key for key, kept in _engines.items() if kept.engine is model]:
                del _engines[key]
            model.close()
            return
        if model is not None and _key(model) not in _engines:
            names = [shown(kept.engine.checkpoint.name) for kept in _engines.values()]
            loaded = f"loaded are {', '.join(names[:2])}{', ...' if len(names) > 2 else ''}" if names else "none is"
            raise ConfigError(f"model={shown(model)} is not loaded; {loaded}; unload() frees all")
        for key in list(_engines) if model is None else [_key(model)]:
            _engines.pop(key).engine.close()


def prepare(
    model: Any,
    prompts: Any,
    sampling: Any,
    config: EngineConfig | None,
    tokenizer: Any,
    fields: dict[str, Any],
    errors: str = "raise",
) -> tuple[Engine, dict[str, Any]]:
    """The engine for a call, and the call's sampling fields.

    An iterator in `sampling` is used up; give what `hybridgen.arguments.sampling_list` makes of it.
    """
    with import_time.timed():
        from hybridgen.engine import Engine
        from hybridgen.engine.preflight import check_config
        from hybridgen.engine.requests import make_requests
        from hybridgen.loading import Checkpoint
        from hybridgen.text.prompts import split_prompts

    sampling = sampling_list(sampling)
    check_keywords(fields, EngineConfig.field_names() | SamplingParams.field_names())
    sampling_fields = {name: value for name, value in fields.items() if name in SamplingParams.field_names()}
    engine_fields = {name: value for name, value in fields.items() if name not in sampling_fields}
    if isinstance(model, Engine):
        if engine_fields or config is not None or tokenizer is not None:
            name = next(iter(engine_fields), "config" if config is not None else "tokenizer")
            raise ConfigError(f"{name}= cannot be changed on a loaded Engine; load another with Engine.load()")
        return model, sampling_fields
    config = EngineConfig.of(config, engine_fields)
    items, _ = split_prompts(prompts)
    with _lock:
        key = _key(model)
        kept = _engines.get(key)
        given = None if tokenizer is None else _key(tokenizer)
        if kept is not None and not kept.engine.closed and kept.engine.config == config and given == kept.tokenizer:
            return kept.engine, sampling_fields
        checkpoint = Checkpoint.open(model, config, tokenizer=tokenizer)
        # Before any weight is read or a kept engine closed, so that bad input costs nothing; the cache's size is
        # checked by the engine.
        limit = check_config(checkpoint, config).max_context
        make_requests(items, sampling, sampling_fields, checkpoint, limit, None, {} if returns_errors(errors) else None)
        if kept is not None:
            kept.engine.close()
            del _engines[key]
        engine = Engine.start(checkpoint, config)
        _engines[key] = _Kept(engine, given)
        return engine, sampling_fields


def _key(model: Any) -> Any:
    """What tells models and tokenizers apart: an object by identity, a directory by its resolved path, a hub id by its
    text.
    """
    from hybridgen.loading.source import looks_like_path

    if model is None:
        model = model_path()
    if not isinstance(model, (str, os.PathLike)):
        return id(model)
    text = os.fspath(model)
    path = os.path.expanduser(text)
    is_path = not isinstance(model, str) or os.path.isdir(path) or looks_like_path(text)
    return os.path.realpath(path) if is_path else text
