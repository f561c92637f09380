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
from dataclasses import dataclass
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


@dataclass(eq=False)
class _Pool:
    """Memory that graphs share, and a graph that stays in it.

    Torch 2.11 gives up its pinned-memory side of a pool with the pool's last graph, and then cannot capture into it
    again. So the memory goes back to the device when no other graph is left: the anchor and the pool go, and the next
    capture opens another.
    """

    memory: torch.cuda.MemPool | None
    anchor: torch.cuda.CUDAGraph | None
    """Both None once they were given up."""
    graphs: int = 0
    """Captured in it and not released."""


class CudaGraphRecorder:
    """Captures steps on a stream of its own."""

    owner = OWNER

    def __init__(self, device: torch.device) -> None:
        self.captured: Callable[[], object] = _nothing
        """Called between a capture and its first replay; what it raises costs the recording."""
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: _Pool | None = None
        self._scratch = torch.zeros(1, device=device)
        self._wait = partial(torch.cuda.synchronize, device)

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        """Warm up, capture and time a step.

        Raises:
            Exception: whatever the step or the capture raises; earlier recordings stay usable.
        """
        with CAPTURING:
            torch.cuda.synchronize(self._device)
            pool = self._pool or self._open_pool()
            try:
                return self._record(pool, step, known)
            finally:
                self._give_back(pool)

    def _record(self, pool: _Pool, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        free = torch.cuda.mem_get_info(self._device)[0]
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(cast(Any, pool.memory), self._device):
            for _ in range(_WARM_UPS if known is None else _WARM_UPS - 1):  # the run that checks a time is one, too
                step()
            plain = checked_seconds(step, self._wait, None if known is None else known[0])
        self._wait()  # steps share buffers: no two may run at a time, and the first replay is on another stream
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        try:
            with _no_garbage_collection(), torch.cuda.stream(self._stream):
                self._capture(graph, pool, step)
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        pool.graphs += 1
        try:
            self.captured()
        except BaseException:
            graph.reset()
            pool.graphs -= 1
            raise
        graph.replay()  # the first one uploads it: not in a user's step, nor in what is timed
        seconds = checked_seconds(graph.replay, self._wait, None if known is None else known[1])
        used = max(0, free - torch.cuda.mem_get_info(self._device)[0])
        return Recorded(
            replay=graph.replay,
            release=partial(self._release, graph, pool),
            owner=OWNER,
            plain_seconds=plain,
            seconds=seconds,
            bytes=used,
            is_graph=True,
        )

    def close(self) -> None:
        """Give up the pool; its memory goes back to the device with its last graph."""
        if self._pool is not None:
            self._give_back(self._pool)
        self._pool = None

    def _release(self, graph: torch.cuda.CUDAGraph, pool: _Pool) -> None:
        """Give up a graph, and with the last of a pool the pool."""
        graph.reset()
        pool.graphs -= 1
        self._give_back(pool)

    def _give_back(self, pool: _Pool) -> None:
        """Give a pool's memory back to the device, if no graph is left in it; the next capture opens another."""
        if pool.graphs or pool.anchor is None:
            return
        with CAPTURING:  # nothing is freed while another engine captures
            if pool is self._pool:
                self._pool = None
            torch.cuda.synchronize(self._device)  # nothing that still runs may be in it
            pool.anchor.reset()
            pool.anchor = pool.memory = None
            torch.cuda.empty_cache()

    def _open_pool(self) -> _Pool:
        pool = self._pool = _Pool(torch.cuda.MemPool(), torch.cuda.CUDAGraph())
        with torch.cuda.stream(self._stream):
            self._capture(cast(torch.cuda.CUDAGraph, pool.anchor), pool, self._scratch.zero_)
        return pool

    def _capture(self, graph: torch.cuda.CUDAGraph, pool: _Pool, step: Callable[[], object]) -> None:
        memory = cast(torch.cuda.MemPool, pool.memory)
        try:
            graph.capture_begin(pool=cast(Any, memory.id), capture_error_mode="thread_local")
        except BaseException:
            self._recover(graph, pool)
            raise
        try:
            step()
        except BaseException:
            self._end(graph, pool, failed=True)
            raise
        self._end(graph, pool, failed=False)

    def _end(self, graph: torch.cuda.CUDAGraph, pool: _Pool, *, failed: bool) -> None:
        """End a capture, or what is left of one that an error invalidated."""
        try:
            graph.capture_end()
        except BaseException as error:
            self._recover(graph, pool)
            if not failed:
                raise
            logger.debug("the capture was invalid: %s", error)

    def _recover(self, graph: torch.cuda.CUDAGraph, pool: _Pool) -> None:
        """Put right what a failed `capture_end()` leaves behind in torch 2.11.

        The allocator still routes to the pool, which can be ended. The pinned-memory allocator does too, which cannot;
        it asks the graph object whether an allocation belongs to it, so that is kept, and the pool is not captured
        into again, nor given back to the device. The default generator believes that it is in a capture, until one ends
        well.
        """
        memory = cast(torch.cuda.MemPool, pool.memory)
        _kept.extend((graph, memory, pool.anchor))
        self._pool = None
        pool.anchor = pool.memory = None
        try:
            torch._C._cuda_endAllocateToPool(cast(int, self._device.index), memory.id)
        except RuntimeError as error:
            logger.debug("allocations were not routed to the pool any more: %s", error)
        healing = torch.cuda.CUDAGraph()
        healing.capture_begin(capture_error_mode="thread_local")
        self._scratch.zero_()
        healing.capture_end()
        _kept.append(healing)


def _nothing() -> None:
    return None


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
