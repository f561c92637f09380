"""What is checked and decided for an engine before a model's weights are read, and the compile cache that it gets."""

from __future__ import annotations

from typing import Any

from hybridgen.cache import pages_for_tokens
from hybridgen.compilation.layers import check_backend, check_toolchain
from hybridgen.compilation.store.session import CompileCache
from hybridgen.config import EngineConfig, GraphOwner
from hybridgen.engine.requests import context_limit
from hybridgen.errors import ConfigError, DeviceError
from hybridgen.loading import Checkpoint
from hybridgen.telemetry import import_time as importing

TOKEN_BUDGET = {"cuda": 8192, "cpu": 1024}
"""Prompt tokens in one prefill call when the config says none."""

MOST_TABLE_BYTES = 2**30
"""For the numbers of the pages of all requests (int32), on the host and on the device."""


def token_budget(checkpoint: Checkpoint, config: EngineConfig) -> int:
    """Prompt tokens in one prefill call."""
    return config.token_budget or TOKEN_BUDGET[checkpoint.device.type]


def open_cache(checkpoint: Checkpoint, config: EngineConfig) -> CompileCache:
    """The compile cache for an engine of this checkpoint and config.

    Raises:
        CacheMissError: `offline_compile=True` and there is nothing usable.
    """
    return CompileCache.open(checkpoint, config, **cache_settings(checkpoint, config))


def cache_settings(checkpoint: Checkpoint, config: EngineConfig) -> dict[str, Any]:
    """What a config leaves open and the compiler sees, as an engine decides it."""
    return {
        "mode": config.mode_on(checkpoint.device.type),
        "token_budget": token_budget(checkpoint, config),
        "max_context": context_limit(checkpoint, config.max_context),
    }


def check_config(checkpoint: Checkpoint, config: EngineConfig) -> int:
    """What can be checked of a config before a model's weights are read; returns the longest prompt plus output.

    Raises:
        ConfigError: the context is above the model's limit, the compile backend is unknown, or prefill buckets are
            above what one call takes.
        DeviceError: the machine cannot run the mode.
    """
    device = checkpoint.device.type
    mode = config.mode_on(device)
    if mode.compiles:
        with importing.timed():  # it imports the first part of the compiler
            check_backend(config.compile_backend)
            check_toolchain(mode, config.compile_backend, device)
    if config.graphs is not GraphOwner.MANUAL and mode.records and device != "cuda":
        raise DeviceError(
            f'graphs="{config.graphs}" needs CUDA, and the model is on {checkpoint.device}; leave it at '
            '"manual", which has a stand-in there'
        )
    limit = context_limit(checkpoint, config.max_context)
    most = min(token_budget(checkpoint, config), limit)
    if config.prefill_buckets and config.prefill_buckets[-1] > most:
        raise ConfigError(
            f"prefill_buckets holds {config.prefill_buckets[-1]}, above the {most} tokens that one prefill call takes "
            "(token_budget, max_context); leave it out"
        )
    pages = pages_for_tokens(limit, config.page_size)
    if 4 * pages * (config.max_batch + 1) > MOST_TABLE_BYTES:
        raise ConfigError(
            f"a context of {limit} tokens with max_batch={config.max_batch} and page_size={config.page_size} takes a "
            f"table of over {MOST_TABLE_BYTES >> 30} GiB; set max_context (without it, the limit is the model's own)"
        )
    return limit
