"""Utilisation and memory, against clocks, profiler events and allocations whose right values are known."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare_cases import SMALL, Scripted, SyntheticTime, measurement

from hybridgen.comparison.data.schedule import Cell
from hybridgen.comparison.measuring.utilisation import (
    CALLS,
    Probe,
    busy,
    cpu_of,
    cpu_share,
    device_share,
    device_shares,
    device_spans,
)
from hybridgen.comparison.render import report
from hybridgen.comparison.results import Comparison
from hybridgen.device.memory import PeakMemory, taken
from hybridgen.telemetry.statistics import PhaseCounts

ON_DEVICE, ON_HOST = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("spans", "covered"),
    [([], 0), ([(0, 2), (3, 4)], 3), ([(0, 5), (1, 2)], 5), ([(3, 6), (0, 4)], 6), ([(1, 1)], 0)],
)
def test_overlapping_work_counts_once(spans: list[tuple[float, float]], covered: float) -> None:
    assert busy(spans) == covered


def event(start: float, end: float, device: Any = ON_DEVICE, *, annotation: bool = False) -> Any:
    """A profiler's event, in microseconds."""
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(device_type=device, time_range=times, is_user_annotation=annotation)


def test_a_cell_knows_how_busy_the_processor_was() -> None:
    """Calls of 2 s with 0.5 s of CPU time are at 25 %, and at 0.5 s / 3 steps a step; calls with 3 s are at 150 %."""
    time = SyntheticTime()
    config = SMALL.replace(modes=("eager",), baselines=(), prompt_lengths=(4,), budget=1e9)
    subject = Scripted("eager", lambda prompts: time.pass_by(2.0, 0.5 if len(prompts) == 1 else 3.0))
    found = measurement(config, time.clocks)
    found.run({"eager": subject}, 1e9)
    cells = {batch: found.cell_result(found.records[Cell("eager", 4, batch)]) for batch in (1, 2)}
    assert [cells[1].cpu_utilisation, cells[2].cpu_utilisation] == [0.25, 1.5]
    assert cells[1].cpu_per_step == pytest.approx(0.5 / 3)
    assert set(cells[1].walls) == {2.0}
    for cell in cells.values():
        cell.gpu_utilisation = cell.cpu_utilisation / 2  # type: ignore[operator]
    [table] = [table for table in report.tables(_comparison(list(cells.values()))) if "CPU" in table.head]
    columns = [table.head.index(name) for name in ("CPU", "GPU")]
    assert [[row[column] for column in columns] for row in table.rows] == [["25%", "12.5%"], ["150%", "75.0%"]]


def _comparison(cells: list[Any]) -> Comparison:
    from compare_cases import comparison

    return comparison(cells=cells)


def test_cpu_time_over_wall_time() -> None:
    assert cpu_share([1.0, 2.0], [4.0, 2.0]) == 0.5
    assert cpu_share([], []) is None
    time = SyntheticTime()
    assert cpu_of(lambda: time.pass_by(4.0, 1.0), 3, lambda: time.pass_by(0.0, 0.0), time.clocks) == 0.25
    # What comes after the call but before the device is done is the call's too.
    assert cpu_of(lambda: time.pass_by(1.0, 1.0), 1, lambda: time.pass_by(1.0, 0.0), time.clocks) == 0.5


def test_the_device_s_share_is_of_events_that_overlap_and_of_nothing_else() -> None:
    """Kernels cover 300 of the 1000 us of a call, whatever the host and the program's own ranges do."""
    events = [
        event(100, 250),
        event(200, 300),  # overlaps
        event(600, 700),
        event(0, 1000, ON_HOST),
        event(0, 1000, annotation=True),
    ]
    assert sum(end - start for start, end in device_spans(events)) == pytest.approx(350e-6)
    time = SyntheticTime()
    found: dict[str, float] = {}
    seen: list[str] = []

    def record(call: Callable[[], object]) -> list[Any]:
        seen.append("profile")
        call()
        time.pass_by(9.0, 9.0)  # the profiler is slow, which is no part of the call
        return events

    def call() -> None:
        seen.append("call")
        time.pass_by(0.0006, 0.0)

    probe = Probe(lambda: time.pass_by(0.0002, 0.0), record, time.clocks)  # the device ends after the host
    # Waiting before the call is not of the call: 600 + 200 us of 800.
    assert device_shares({"a": call, "b": call}, probe, found) == []
    assert found == {"a": pytest.approx(300 / 800), "b": pytest.approx(300 / 800)}
    assert seen == ["call"] * 2 * (CALLS + 1) + ["profile", "call"] * 2  # nothing is timed after a profile


@pytest.mark.parametrize(
    ("busy", "wall", "share"),
    [(0.25, 1.0, 0.25), (1.0, 1.0, 1.0), (1.04, 1.0, 1.0), (7 * 0.25, 1.0, None), (0.1, 0.0, None)],
)
def test_more_work_than_time_is_no_share(busy: float, wall: float, share: float | None) -> None:
    assert device_share(busy, wall) == share


def test_what_cannot_be_is_named_and_what_is_known_stays() -> None:
    time = SyntheticTime()
    events = iter([[event(0, 500_000)], [event(0, 7_000_000)], RuntimeError("no profiler")])

    def record(call: Callable[[], object]) -> list[Any]:
        found = next(events)
        if isinstance(found, RuntimeError):
            raise found
        return found

    probe = Probe(lambda: None, record, time.clocks)
    shares: dict[str, float] = {}
    assert device_shares(dict.fromkeys("ab", lambda: time.pass_by(1.0, 0.0)), probe, shares) == ["b"]
    assert shares == {"a": 0.5}
    with pytest.raises(RuntimeError, match="no profiler"):
        device_shares(dict.fromkeys("c", lambda: time.pass_by(1.0, 0.0)), probe, shares)
    assert shares == {"a": 0.5}


# ------------------------------------------------------------------ memory of a CPU


def take(size: int) -> torch.Tensor:
    """So many bytes of memory that the process did not have: `malloc` would give again what other tests have freed."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1)


def test_resident_memory_is_what_the_process_has() -> None:
    before = taken(CPU)
    if before is None:
        pytest.skip("this system does not say what is resident")
    block = take(64 * 2**20)
    assert 60 * 2**20 < (taken(CPU) or 0) - before < 80 * 2**20
    del block
    assert (taken(CPU) or 0) - before < 16 * 2**20


def test_a_peak_is_seen_after_it_is_gone_and_only_once() -> None:
    memory = PeakMemory(CPU)
    if not memory._resets:
        pytest.skip("this system does not let the peak be reset")
    block = take(64 * 2**20)
    del block
    assert 60 * 2**20 < memory.growth() < 80 * 2**20
    assert PeakMemory(CPU).growth() < 16 * 2**20


def test_a_cell_knows_the_memory_of_its_calls() -> None:
    config = SMALL.replace(modes=("eager",), baselines=(), prompt_lengths=(4,))
    kept: list[torch.Tensor] = []

    def act(prompts: list[list[int]]) -> None:
        if len(prompts) == 2:
            if not kept:  # what a first call takes for good
                kept.append(take(96 * 2**20))
            take(32 * 2**20)

    found = measurement(config)
    found.run({"eager": Scripted("eager", act)}, 5.0)
    one, two = (found.records[Cell("eager", 4, batch)] for batch in (1, 2))
    assert max(one.left, one.peak) < 16 * 2**20
    assert 28 * 2**20 < two.peak < 48 * 2**20
    assert 90 * 2**20 < two.left < 140 * 2**20


def test_an_empty_rate_is_none_and_not_nan() -> None:
    assert PhaseCounts().hit_rate is None
    assert not math.isnan(PhaseCounts(hits=1).hit_rate or math.nan)
