"""Choose by measurement what only speed depends on: the persistent kernel's ring and cuts, the chain's tiles.

Candidates are timed inside CUDA graphs, because launches one by one are bound by the host and mislead, and over the
model's own weights, because a copy would be in the cache.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from hybridgen.device.timing import graph_seconds
from hybridgen.errors import DeviceError
from hybridgen.fused.chain import search
from hybridgen.fused.decode import FusedDecode
from hybridgen.fused.executors import PersistentExecutor, RowsExecutor
from hybridgen.fused.persistent import shape as one_row
from hybridgen.fused.rows import shape as columns_shape
from hybridgen.models.decoder import Unfit

logger = logging.getLogger(__name__)
Values = tuple[tuple[str, tuple[int, ...]], ...]
E = TypeVar("E", PersistentExecutor, RowsExecutor)

POSITION = 512
"""Cached positions of the row that is timed, where the context allows."""

ONE_ROW: Values = (
    ("stage", (16384, 32768, 65536)),
    ("in_flight", (2, 3, 1, 4)),
    ("short_splits", (4, 3, 2, 8)),
    ("short_least", (128, 64, 256)),
)
"""What is tried of the kernel for one row, field by field."""
COLUMNS: Values = (("in_flight", (2, 3, 4)), ("piece", (1024, 2048)), ("in_flight", (2, 3, 1)))
"""What is tried of the one for several columns. Pieces change the order of sums, and so bits, for all steps alike."""

_WORTH = 0.995
"""A candidate must take less than this share of the best one's time, or it is noise."""


def tune(fused: FusedDecode, seconds: float) -> dict[str, Any]:
    """Tune what a model's fused decode has, and make it use the result.

    Overwrites the padding slot's state and page; nothing else may run meanwhile.

    Args:
        seconds: time for all of it, a few seconds more at most; shared evenly by the persistent kernels and the chain.

    Raises:
        Unfit: what was chosen computes something else.

    Returns:
        What `build_fused(tuned=...)` takes; plain values, for JSON.
    """
    chosen: dict[str, Any] = {}
    each = seconds / max(1, sum(kind is not None for kind in (fused.persistent, fused.rows, fused.chain)))
    if fused.persistent is not None and fused.build is not None:
        fused.persistent = _tune_kernel(fused, fused.persistent, fused.build, ONE_ROW, _launch, 1, each)
        fused.try_step(fused.persistent, 1)
        chosen["persistent"] = one_row.as_document(fused.persistent.step.tuning)
    if fused.rows is not None and fused.build_rows is not None:
        columns = fused.rows.columns
        launch_rows = partial(_launch_rows, fused)
        fused.rows = _tune_kernel(fused, fused.rows, fused.build_rows, COLUMNS, launch_rows, columns, each)
        fused.try_step(fused.rows, columns)
        chosen["columns"] = columns_shape.as_document(fused.rows.step.tuning)
    if fused.chain is not None:
        chain = fused.chain.chain
        most = chain.max_rows
        rows = sorted({min(8, most), most})
        with _padding_rows(fused, most):
            chosen["chain"] = search.tune(chain, partial(_launch_chain, fused), rows=rows, seconds=each)
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


def _tune_kernel(
    fused: FusedDecode,
    best: E,
    build: Callable[..., E],
    values: Values,
    launch: Callable[[E], None],
    rows: int,
    seconds: float,
) -> E:
    """Better one field of a persistent kernel's tuning at a time, from the one that it has.

    Args:
        build: makes the executor with another `tuning`.
        values: what to try, by field.
        launch: runs a step of so many `rows`.
    """
    deadline = time.monotonic() + seconds
    with _padding_rows(fused, rows):
        candidates = _Candidates(best.step.tuning, values)
        shortest = graph_seconds(partial(launch, best))
        for candidate in candidates:
            if time.monotonic() > deadline:
                break
            try:
                other = build(tuning=candidate)
                took = graph_seconds(partial(launch, other))
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


def _launch_rows(fused: FusedDecode, executor: RowsExecutor) -> None:
    executor.logits(fused.metadata(executor.columns), None)


def _launch_chain(fused: FusedDecode, rows: int) -> None:
    if fused.chain is None:
        raise RuntimeError("there is no chain to tune")
    fused.chain.logits(fused.metadata(rows), None)


class _Candidates:
    """Neighbours of the best tuning so far, which whoever iterates sets."""

    def __init__(self, best: Any, values: Values) -> None:
        self.best = best
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        tried = {self.best}
        for field, values in self._values:
            for value in values:
                tuning = dataclasses.replace(self.best, **{field: value})
                if tuning not in tried:
                    tried.add(tuning)
                    yield tuning
