"""What is done to an engine between calls: another adapter, and its cache given back and taken again."""

from __future__ import annotations

import os

from hybridgen.engine.assembly import Parts
from hybridgen.errors import ConfigError, EngineError
from hybridgen.execution.following import release_cache, resume_cache, use_adapter
from hybridgen.loading.adapters import check_adapter

_RELEASED = "the KV cache is released; call resume() first"


def set_adapter(parts: Parts, adapter: str | os.PathLike[str] | None) -> None:
    """See `Engine.set_adapter`."""
    loop, runner, adapters = parts.built.loop, parts.built.runner, parts.adapters
    if parts.config.tensor_parallel > 1:
        raise ConfigError("adapters are not merged into parts of weights yet; leave tensor_parallel out")
    if adapters is None:
        raise ConfigError("the engine's model is a live module; merge the adapter there, or give the PEFT model")
    if runner.following.released:
        raise EngineError(_RELEASED)
    name = None if adapter is None else check_adapter(adapter)
    if name is None and adapters.current is None:
        return

    def work() -> None:
        try:
            use_adapter(runner, adapters, name)
        finally:
            loop.weights_changed()

    loop.pause(work, None)


def release(parts: Parts) -> None:
    """See `Engine.release_cache`."""
    loop, runner = parts.built.loop, parts.built.runner
    if parts.config.tensor_parallel > 1:
        raise ConfigError("the cache of other processes is not released yet; close() the engine, or leave it")
    if runner.following.released:
        return

    def work() -> None:
        loop.scheduler.pages.clear()
        release_cache(runner)

    loop.pause(work, EngineError(_RELEASED))


def resume(parts: Parts) -> None:
    """See `Engine.resume`."""
    loop, runner = parts.built.loop, parts.built.runner
    if runner.following.released:
        loop.pause(lambda: resume_cache(runner), None)
