"""CUDA graphs captured by hand, with one memory pool for all of them.

The rules, and where they come from:

- A capture sees kernels that are compiled, loaded and tuned: the step runs twice before, on the capturing thread and
  stream, with its memory from the pool (vLLM issues 46523 and 40742: Inductor tunes on a first call).
- Graphs replay one after another and leave nothing in the pool that another needs, so they share one pool.
- cuBLAS keeps a workspace per stream, and its address is baked into a graph. Cleared before the capture, the graph
  gets one of its own from the pool; cleared after it, nobody else uses that one. Inductor's cudagraph trees clear all
  workspaces whenever they record, so a graph must not depend on one from outside
  (`torch/_inductor/cudagraph_trees.py`, pytorch issues 193402 and 192061).
- `thread_local` errors: what other threads do on the device does not invalidate the capture.
- What a failed capture leaves behind in torch 2.11 is put right (pytorch pull request 180395): `_recover`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch

from hybridgen.device.capture import CAPTURING
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import Recorded, checked_seconds

logger = logging.getLogger(__name__)

OWNER = "cuda graph"
_kept: list[object] = []
"""What failed captures leave to torch, for as long as the process lives."""
_WARM_UPS = 2


class CudaGraphRecorder:
    """Captures steps on a stream of its own."""

    owner = OWNER

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: torch.cuda.MemPool | None = None
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._scratch = torch.zeros(1, device=device)
        self._wait = partial(torch.cuda.synchronize, device)

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        """Warm up, capture and time a step.

        Raises:
            Exception: whatever the step or the capture raises; earlier recordings stay usable.
        """
        with CAPTURING:
            return self._record(step, known)

    def _record(self, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        torch.cuda.synchronize(self._device)
        if self._pool is None:
            self._open_pool()
        free = torch.cuda.mem_get_info(self._device)[0]
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(cast(Any, self._pool), self._device):
            for _ in range(_WARM_UPS if known is None else _WARM_UPS - 1):  # the run that checks a time is one, too
                step()
            plain = checked_seconds(step, self._wait, None if known is None else known[0])
        self._wait()  # steps share buffers: no two may run at a time, and the first replay is on another stream
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        try:
            with _no_garbage_collection(), torch.cuda.stream(self._stream):
                self._capture(graph, step)
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        graph.replay()  # the first one uploads it: not in a user's step, nor in what is timed
        seconds = checked_seconds(graph.replay, self._wait, None if known is None else known[1])
        used = max(0, free - torch.cuda.mem_get_info(self._device)[0])
        return Recorded(
            replay=graph.replay,
            release=graph.reset,
            owner=OWNER,
            plain_seconds=plain,
            seconds=seconds,
            bytes=used,
            is_graph=True,
        )

    def close(self) -> None:
        """Give up the pool; its memory is freed with the last graph."""
        self._anchor = self._pool = None

    def _open_pool(self) -> None:
        """A pool, and a graph that stays in it.

        Torch 2.11 gives up its pinned-memory side of a pool with the pool's last graph, and then cannot capture into it
        again.
        """
        self._pool = torch.cuda.MemPool()
        self._anchor = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            self._capture(self._anchor, self._scratch.zero_)

    def _capture(self, graph: torch.cuda.CUDAGraph, step: Callable[[], object]) -> None:
        pool = cast(torch.cuda.MemPool, self._pool)
        try:
            graph.capture_begin(pool=cast(Any, pool.id), capture_error_mode="thread_local")
        except BaseException:
            self._recover(graph, pool)
            raise
        try:
            step()
        except BaseException:
            self._end(graph, pool, failed=True)
            raise
        self._end(graph, pool, failed=False)

    def _end(self, graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool, *, failed: bool) -> None:
        """End a capture, or what is left of one that an error invalidated."""
        try:
            graph.capture_end()
        except BaseException as error:
            self._recover(graph, pool)
            if not failed:
                raise
            logger.debug("the capture was invalid: %s", error)

    def _recover(self, graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool) -> None:
        """Put right what a failed `capture_end()` leaves behind in torch 2.11.

        The allocator still routes to the pool, which can be ended. The pinned-memory allocator does too, which cannot;
        it asks the graph object whether an allocation belongs to it, so that is kept, and the pool is not captured
        into again. The default generator believes that it is in a capture, until one ends well.
        """
        _kept.extend((graph, pool, self._anchor))
        self._pool = None
        try:
            torch._C._cuda_endAllocateToPool(cast(int, self._device.index), pool.id)
        except RuntimeError as error:
            logger.debug("allocations were not routed to the pool any more: %s", error)
        healing = torch.cuda.CUDAGraph()
        healing.capture_begin(capture_error_mode="thread_local")
        self._scratch.zero_()
        healing.capture_end()
        _kept.append(healing)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nothing is collected meanwhile: freeing another graph or an event inside a capture can invalidate it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
