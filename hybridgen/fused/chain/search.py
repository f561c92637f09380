"""Finds fast tiles for a chain on its device, by timing whole steps inside CUDA graphs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import triton

from hybridgen.device.timing import graph_seconds
from hybridgen.fused.chain.step import ChainStep
from hybridgen.fused.chain.tiles import PROJECTIONS, Tile, rows_block, variants

COMPILED_AT_ONCE = max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))
"""Kernels that are compiled at the same time."""

_WORTH = 0.998
"""A tile must take less than this share of the best one's time, or it is noise."""


def tune(
    step: ChainStep,
    launch: Callable[[int], None],
    *,
    rows: Sequence[int],
    seconds: float,
    projections: Iterable[str] = PROJECTIONS,
    report: Callable[[str, Tile, float], None] | None = None,
) -> dict[str, list[int]]:
    """Find fast tiles for a step on its device, and make it use them.

    A candidate is judged by a whole step inside a CUDA graph. A projection timed alone misleads: how its programs share
    the multiprocessors with those of the kernels before and behind it decides more than its own loop.

    Args:
        launch: launches the whole step for so many rows.
        rows: batch sizes to choose for; those up to 8 share a choice, and those above.
        seconds: time for all of it; what was not tried by then keeps its tile. The first candidates of each
            projection are tried in any case.
        projections: which of `PROJECTIONS`.
        report: called with a name, a tile and the step's seconds after each.

    Returns:
        What `ChainStep(tiles=...)` takes: the fields of a `Tile` by projection and rows, such as `qkv.8`.
    """
    names = list(projections)
    blocks = sorted({rows_block(count) for count in rows})
    end = time.monotonic() + seconds
    left = len(names) * len(blocks)
    # A projection's share of the time is its share of what is left, so that the last ones are tried, too.
    for block in blocks:
        count = max(count for count in rows if rows_block(count) == block)
        search = _Search(step, lambda count=count: launch(count), count, report)  # type: ignore[misc]
        for name in names:
            begin = time.monotonic()
            deadline = begin + max(0.0, end - begin) / left
            left -= 1
            key = f"{name}.{block}"
            inner = step.shape(name)[1]
            # First how it meets its neighbours, then other kinds of tiles, then how the best of those meets them.
            search.improve(name, variants(step.tiles[key], inner), begin + (deadline - begin) / 4)
            search.improve(name, step.candidates(name, count), begin + (deadline - begin) * 3 / 4)
            search.improve(name, variants(step.tiles[key], inner), deadline)
    return {name: list(tile) for name, tile in step.tiles.items()}


class _Search:
    """The best tiles so far for one number of rows, which the step uses."""

    def __init__(
        self,
        step: ChainStep,
        launch: Callable[[], None],
        rows: int,
        report: Callable[[str, Tile, float], None] | None,
    ) -> None:
        self._step, self._launch, self._rows, self._report = step, launch, rows, report
        self._shortest = graph_seconds(launch)
        self._tried: dict[str, set[Tile]] = {}

    def improve(self, name: str, tiles: Iterable[Tile], deadline: float) -> None:
        """Try a projection's tiles until the deadline, and some in any case; none twice."""
        step, rows = self._step, self._rows
        key = f"{name}.{rows_block(rows)}"
        best = step.tiles[key]
        tried = self._tried.setdefault(key, {best})
        shared, gated = step.device.shared_memory, step.shape(name)[2]
        most, itemsize = shared * 9 // 10, step.model.dtype.itemsize
        fitting = [t for t in dict.fromkeys(tiles) if t.shared_bytes(rows_block(rows), gated, itemsize) < most]
        new = [tile for tile in fitting if tile not in tried]
        for start in range(0, len(new), COMPILED_AT_ONCE):
            group = new[start : start + COMPILED_AT_ONCE]
            with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
                list(pool.map(lambda tile: step.compile(name, rows, tile), group))
            for tile in group:
                tried.add(tile)
                step.use({key: tile})
                try:
                    took = graph_seconds(self._launch)
                except triton.runtime.errors.OutOfResources:
                    took = float("inf")
                if self._report is not None:
                    self._report(key, tile, took)
                if took < self._shortest * _WORTH:
                    best, self._shortest = tile, took
                step.use({key: best})
            if time.monotonic() > deadline:
                break
