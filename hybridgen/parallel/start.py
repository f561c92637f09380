"""Starts the other ranks of an engine."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from hybridgen.cache import pages_for_tokens
from hybridgen.config import EngineConfig, ResolvedConfig
from hybridgen.loading import Checkpoint
from hybridgen.parallel.launched import LaunchedRanks, Place
from hybridgen.parallel.lead import Lead
from hybridgen.parallel.ranks import Ranks

_RING_BYTES = 2**20
"""Of the messages' ring, besides room for some of the largest ones."""
_LEFT_OUT = ("device", "on_graph_event", "progress", "compile_cache", "revision", "offline_compile")
"""Fields that the other ranks do not need, or have another value of."""


def start(
    checkpoint: Checkpoint, config: EngineConfig, resolved: ResolvedConfig, place: Place | None = None
) -> Lead | None:
    """Start the other ranks and wait until they have opened the checkpoint; None where there are no others.

    Args:
        place: rank 0's, where torchrun started all of them.

    Raises:
        HybridgenError: a rank could not be started, with the reason.
    """
    if config.tensor_parallel == 1:
        return None
    checkpoint.fetch()  # what is on the hub is downloaded once
    pages = pages_for_tokens(resolved.max_context, config.page_size)
    largest = 8 * (pages + resolved.max_context + 16 * resolved.token_budget + 16 * config.max_batch)
    order, ring = order_of(checkpoint, config), _RING_BYTES + 2 * largest
    ranks = Ranks(order, config.tensor_parallel, ring) if place is None else LaunchedRanks(order, place, ring)
    return Lead(ranks, checkpoint.device, checkpoint.dtype)


def order_of(checkpoint: Checkpoint, config: EngineConfig) -> dict[str, Any]:
    """What `engine.rank` is told at first."""
    source = checkpoint.source
    assert source is not None
    given = {
        each.name: getattr(config, each.name)
        for each in fields(config)
        if each.name not in _LEFT_OUT and getattr(config, each.name) != each.default
    }
    path = Path(source.name).expanduser()
    given["mode"] = str(config.mode_on(checkpoint.device.type))
    given["dtype"] = str(checkpoint.dtype).removeprefix("torch.")
    given["local_files_only"] = True
    given["compile_cache"] = False
    given["progress"] = False
    revision = getattr(source, "revision", None)
    if revision is not None:
        given["revision"] = revision
    return {
        "model": os.fspath(path.resolve()) if path.is_dir() else source.name,
        "device": checkpoint.device.type,
        "config": given,
    }
