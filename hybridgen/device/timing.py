"""Device time of calls, by events."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from hybridgen.device.capture import CAPTURING


def event_seconds(
    call: Callable[[], object], repeats: int = 5, warm_up: int = 2, before: Callable[[], object] | None = None
) -> list[float]:
    """Seconds of each of some calls on the current stream, the first ones left out.

    Args:
        before: called before each.
    """
    times = []
    for _ in range(warm_up + repeats):
        if before is not None:
            before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times[warm_up:]


def graph_seconds(
    call: Callable[[], object], repeats: int = 5, calls: int = 3, before: Callable[[], object] | None = None
) -> float:
    """Device time of a call: captured `calls` times in one CUDA graph, the median of some replays.

    Launches one by one are bound by the host, and mislead.

    Args:
        before: called before each replay.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with CAPTURING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    return statistics.median(event_seconds(graph.replay, repeats, warm_up=1, before=before)) / calls
