"""What is checked and decided for an engine before a model's weights are read."""

from __future__ import annotations

from hybridgen.cache import pages_for_tokens
from hybridgen.compilation.layers import check_backend, check_toolchain
from hybridgen.compilation.steps import compiles_whole
from hybridgen.compilation.store.session import CompileCache, mode_of
from hybridgen.config import EngineConfig, GraphOwner, Mode, ResolvedConfig
from hybridgen.engine.requests import context_limit
from hybridgen.errors import ConfigError, DeviceError
from hybridgen.execution.drafting import DRAFTS
from hybridgen.loading import Checkpoint
from hybridgen.loading.adapters import check_adapter
from hybridgen.loading.support import keeps_states
from hybridgen.parallel.checks import check_parallel
from hybridgen.speculation import KEEPS_STATE
from hybridgen.telemetry import import_time

TOKEN_BUDGET = {"cuda": 8192, "cpu": 1024}
"""Prompt tokens in one prefill call when the config says none."""

_LEAST_SLOTS = 32
"""Room of the smallest buffers of steps that are compiled whole."""

MOST_TABLE_BYTES = 2**30
"""For the numbers of the pages of all requests (int32), on the host and on the device."""


def resolve_config(checkpoint: Checkpoint, config: EngineConfig) -> ResolvedConfig:
    """Decide what a config leaves open.

    Raises:
        ConfigError: the context is above the model's limit.
    """
    device, mode = checkpoint.device.type, mode_of(checkpoint, config)
    return ResolvedConfig(
        mode=mode,
        max_context=context_limit(checkpoint, config.max_context),
        token_budget=config.token_budget or TOKEN_BUDGET[device],
        query_len=_query_len(config),
        slots=_slots(config, mode, device),
    )


def _slots(config: EngineConfig, mode: Mode, device_type: str) -> int:
    """Requests that the step's buffers have room for. A step that is compiled whole has their strides in its code: few
    sizes for all `max_batch`, so that a step that is kept serves most of them."""
    if not compiles_whole(config, mode, device_type):
        return config.max_batch
    return max(_LEAST_SLOTS, 1 << (config.max_batch - 1).bit_length())


def _query_len(config: EngineConfig) -> int:
    """Tokens of a row in a decode step at most. Each draft of a model is a pass of it: few are made."""
    if config.drafter is not None:
        return 1 + DRAFTS[1]
    return 1 if config.speculation is None else 1 + DRAFTS[-1]


def open_cache(checkpoint: Checkpoint, config: EngineConfig) -> CompileCache:
    """The compile cache for an engine of this checkpoint and config.

    Raises:
        CacheMissError: `offline_compile=True` and there is nothing usable.
    """
    return CompileCache.open(checkpoint, config, resolve_config(checkpoint, config))


def cannot_draft_for(config: EngineConfig, why: str) -> ConfigError:
    """The error where drafts cannot be checked on a model."""
    return ConfigError(f"{config.drafts} with this model: {why}; leave {str(config.drafts).partition('=')[0]} out")


def check_config(checkpoint: Checkpoint, config: EngineConfig) -> ResolvedConfig:
    """Check what can be checked of a config before a model's weights are read, and decide what it leaves open.

    Raises:
        ConfigError: the context is above the model's limit, the compile backend is unknown, or prefill buckets are
            above what one call takes.
        DeviceError: the machine cannot run the mode.
    """
    if config.adapter is not None:
        if checkpoint.module is not None:
            raise ConfigError("adapter= is not for a live module; merge it there, or give the PEFT model")
        check_adapter(config.adapter)
    device = checkpoint.device.type
    mode = mode_of(checkpoint, config)
    if mode.compiles and not (config.mode is Mode.AUTO and device == "cpu"):
        with import_time.timed():  # it imports the first part of the compiler
            check_backend(config.compile_backend)
            check_toolchain(mode, config.compile_backend, device)
    if config.graphs is not GraphOwner.MANUAL and mode.records and device != "cuda":
        raise DeviceError(
            f'graphs="{config.graphs}" needs CUDA, and the model is on {checkpoint.device}; leave it at '
            '"manual", which has a stand-in there'
        )
    if config.equal_bits and device != "cuda":
        raise DeviceError(f"equal_bits=True needs CUDA, and the model is on {checkpoint.device}; leave it out there")
    if config.fp8_activations and checkpoint.formats == "dense":
        raise ConfigError(
            f"fp8_activations=True, and {checkpoint.name!r} has no FP8 weights; give quantization='fp8' or an FP8 "
            "checkpoint, or leave it out"
        )
    if config.drafts and keeps_states(checkpoint.hf_config):
        raise cannot_draft_for(config, KEEPS_STATE)
    resolved = resolve_config(checkpoint, config)
    most = resolved.max_tokens
    if config.prefill_buckets and config.prefill_buckets[-1] > most:
        raise ConfigError(
            f"prefill_buckets holds {config.prefill_buckets[-1]}, above the {most} tokens that one prefill call takes "
            "(token_budget, max_context); leave it out"
        )
    pages = pages_for_tokens(resolved.max_context, config.page_size)
    if 4 * pages * (resolved.slots + 1) > MOST_TABLE_BYTES:
        raise ConfigError(
            f"a context of {resolved.max_context} tokens with max_batch={config.max_batch} and "
            f"page_size={config.page_size} takes a table of over {MOST_TABLE_BYTES >> 30} GiB; set max_context "
            "(without it, the limit is the model's own)"
        )
    check_parallel(checkpoint, config)
    return resolved
