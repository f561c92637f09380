"""How busy the processor and the device are: the share of a call's time in which they work.

Shares are of wall time. CPU time is of all threads of the process, so that 1 is one busy core and 2 are two. A device
is busy while at least one kernel or copy runs on it, so that its share is at most 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

CALLS = 3
"""Calls whose median time the device's busy time is compared with."""
_SLACK = 1.1
"""A device cannot be busy for longer than a call takes, but the call under the profiler is another than the timed
ones."""

Key = TypeVar("Key")
Call = Callable[[], object]


class Clocks(NamedTuple):
    """Where times come from; tests put others in their place."""

    wall: Callable[[], float] = time.perf_counter
    """Seconds."""
    cpu: Callable[[], float] = time.process_time
    """CPU seconds of the process, all threads."""


class Probe(NamedTuple):
    """How a device is watched; tests put others in its place."""

    wait: Call
    """Wait until the device is done."""
    record: Callable[[Call], Iterable[Any]]
    """The profiler's events of a call."""
    clocks: Clocks = Clocks()


def cuda_probe(device: torch.device) -> Probe:
    """A CUDA device, watched by torch's profiler."""
    return Probe(partial(torch.cuda.synchronize, device), partial(_profiled, device))


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Time covered by spans (start, end), which may overlap; in their unit."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > until:
            covered += end - max(start, until)
            until = end
    return covered


def device_spans(events: Iterable[Any]) -> Iterator[tuple[float, float]]:
    """Start and end, in seconds, of what ran on the device, by the profiler's events, which count microseconds.

    Ranges that a program names (`record_function`) are no work: they span the gaps too.
    """
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device and not getattr(event, "is_user_annotation", False):
            yield event.time_range.start / 1e6, event.time_range.end / 1e6


def device_busy(call: Call, probe: Probe) -> float:
    """Seconds in which the device works during a call, by the profiler. Nothing is to be timed after this."""
    return busy(device_spans(probe.record(call)))


def cpu_share(cpu: Iterable[float], wall: Iterable[float]) -> float | None:
    """CPU seconds of some calls over their wall seconds; 1 is one busy core. None where there was no call."""
    seconds = sum(wall)
    return sum(cpu) / seconds if seconds else None


def device_share(busy_seconds: float, wall_seconds: float) -> float | None:
    """Busy seconds over wall seconds, at most 1; None where they cannot be of the same call, and so mean nothing."""
    if wall_seconds <= 0 or busy_seconds > _SLACK * wall_seconds:
        return None
    return min(1.0, busy_seconds / wall_seconds)


def cpu_of(call: Call, calls: int, wait: Call, clocks: Clocks = Clocks()) -> float | None:  # noqa: B008
    """`cpu_share` of so many calls, each until the device is done."""
    cpu, wall = [], []
    for _ in range(calls):
        wait()
        before = clocks.cpu(), clocks.wall()
        call()
        wait()
        cpu.append(clocks.cpu() - before[0])
        wall.append(clocks.wall() - before[1])
    return cpu_share(cpu, wall)


def device_shares(
    calls: Mapping[Key, Call],
    probe: Probe,
    found: MutableMapping[Key, float],
    show: Callable[[str, float, float], None] = lambda what, done, total: None,
) -> list[Key]:
    """How busy the device is in each of these calls: the times of all first, then all of them under the profiler.

    The profiler slows launches down, in this process also afterwards, so that nothing is to be timed after this. The
    work on the device takes as long as without it.

    Args:
        found: gets the share of each call, one by one, so that what is known stays when a call raises.

    Returns:
        The calls that the profiler saw more of than they take, which have no share.
    """
    took: dict[Key, float] = {}
    for index, (key, call) in enumerate(calls.items()):
        show("utilisation: times", index, len(calls))
        call()
        took[key] = statistics.median(_seconds(call, probe) for _ in range(CALLS))
    wrong = []
    for index, (key, call) in enumerate(calls.items()):
        show("utilisation: profiles", index, len(calls))
        share = device_share(device_busy(call, probe), took[key])
        if share is None:
            wrong.append(key)
        else:
            found[key] = share
    return wrong


def _seconds(call: Call, probe: Probe) -> float:
    probe.wait()
    start = probe.clocks.wall()
    call()
    probe.wait()
    return probe.clocks.wall() - start


def _profiled(device: torch.device, call: Call) -> list[Any]:
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return list(profiler.events() or ())
