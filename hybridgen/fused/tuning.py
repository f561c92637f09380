"""Choose by measurement what only speed depends on: the persistent kernel's ring and cuts, the chain's tiles.

Candidates are timed inside CUDA graphs, because launches one by one are bound by the host and mislead, and over the
model's own weights, because a copy would be in the cache.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from hybridgen.device.timing import graph_seconds
from hybridgen.errors import DeviceError
from hybridgen.fused.chain import search
from hybridgen.fused.decode import FusedDecode
from hybridgen.fused.executors import PersistentExecutor
from hybridgen.fused.persistent.shape import Tuning, as_document
from hybridgen.models.decoder import Unfit

logger = logging.getLogger(__name__)

POSITION = 512
"""Cached positions of the row that is timed, where the context allows."""

_WORTH = 0.995
"""A candidate must take less than this share of the best one's time, or it is noise."""


def tune(fused: FusedDecode, seconds: float) -> dict[str, Any]:
    """Tune what a model's fused decode has, and make it use the result.

    Overwrites the padding slot's state and page; nothing else may run meanwhile.

    Args:
        seconds: time for all of it, a few seconds more at most; two thirds for the persistent kernel, if there is one
            and a chain.

    Raises:
        Unfit: what was chosen computes something else.

    Returns:
        What `fuse_decode(tuned=...)` takes; plain values, for JSON.
    """
    chosen: dict[str, Any] = {}
    share = 1.0 if fused.chain is None else 2 / 3
    if fused.persistent is not None:
        deadline = time.monotonic() + seconds * share
        fused.persistent = _tune_persistent(fused, deadline)
        fused.try_step(fused.persistent, 1)
        chosen["persistent"] = as_document(fused.persistent.step.tuning)
        seconds -= seconds * share
    if fused.chain is not None:
        chain = fused.chain.chain
        most = chain.max_rows
        rows = sorted({min(8, most), most})
        with _padding_rows(fused, most):
            chosen["chain"] = search.tune(chain, partial(_launch_chain, fused), rows=rows, seconds=seconds)
        fused.try_step(fused.chain, most)
    return chosen


@contextmanager
def _padding_rows(fused: FusedDecode, rows: int) -> Iterator[None]:
    """Meanwhile a step of this many rows has padding rows with a cached context, all of the dummy page."""
    model, inputs = fused.model, fused.inputs
    if model is None:
        raise RuntimeError("the model was not described")
    padding = inputs.padding_slot
    inputs.rows[:rows] = padding
    inputs.slots[:rows] = padding
    inputs.state[:, padding] = 0
    inputs.state[1, padding] = min(POSITION, model.max_context - 1)
    try:
        yield
    finally:
        torch.cuda.synchronize(model.device)
        inputs.state[:, padding] = 0


def _tune_persistent(fused: FusedDecode, deadline: float) -> PersistentExecutor:
    """Better one field at a time, from the tuning that it has."""
    best, build = fused.persistent, fused.build
    if best is None or build is None:
        raise RuntimeError("there is no persistent step to tune")
    with _padding_rows(fused, 1):
        candidates = _Candidates(best.step.tuning)
        shortest = graph_seconds(partial(_launch, best))
        for candidate in candidates:
            if time.monotonic() > deadline:
                break
            try:
                other = build(tuning=candidate)
                took = graph_seconds(partial(_launch, other))
            except (Unfit, DeviceError) as error:
                logger.debug("%s: %s", candidate, error)
                continue
            logger.debug("%s: %.1f us", candidate, took * 1e6)
            if took < shortest * _WORTH:
                best, other, shortest = other, best, took
                candidates.best = candidate
            other.close()
    return best


def _launch(executor: PersistentExecutor) -> None:
    executor.step()


def _launch_chain(fused: FusedDecode, rows: int) -> None:
    if fused.chain is None:
        raise RuntimeError("there is no chain to tune")
    fused.chain.logits(fused.metadata(rows), None)


class _Candidates:
    """Neighbours of the best tuning so far, which whoever iterates sets."""

    def __init__(self, best: Tuning) -> None:
        self.best = best

    def __iter__(self) -> Iterator[Tuning]:
        tried = {self.best}
        for field, values in (
            ("stage", (16384, 32768, 65536)),
            ("in_flight", (2, 3, 1, 4)),
            ("short_splits", (4, 3, 2, 8)),
            ("short_least", (128, 64, 256)),
        ):
            for value in values:
                tuning = dataclasses.replace(self.best, **{field: value})
                if tuning not in tried:
                    tried.add(tuning)
                    yield tuning
