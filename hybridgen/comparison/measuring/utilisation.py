"""How busy the device is: the share of a call's time in which at least one kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Time covered by spans (start, end), which may overlap; in their unit."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > until:
            covered += end - max(start, until)
            until = end
    return covered


def device_busy(call: Callable[[], object], device: torch.device) -> float:
    """Seconds in which the device ran kernels or copies during a call, by the profiler's record of them.

    The profiler slows launches down, in this process also afterwards, so that the time of the call itself has to come
    from elsewhere, and before. The work on the device takes as long as without it.
    """
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    events = [event for event in profiler.events() or () if event.device_type == on_device]
    return busy((event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events)
