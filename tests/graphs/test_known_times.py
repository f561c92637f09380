"""Times of an earlier process: kept where they are still about right, else measured again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from store_cases import Harness, decode

from hybridgen.graphs import Recorded, StandInRecorder, recorder
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import checked_seconds


class Clock:
    """Time that passes only in steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, step: float) -> None:
        self.now, self.step, self.runs = 0.0, step, 0
        monkeypatch.setattr(recorder.time, "perf_counter", lambda: self.now)

    def run(self) -> None:
        self.now += self.step
        self.runs += 1


@pytest.mark.parametrize(
    ("step", "known", "found", "runs"),
    [(1.0, None, 1.0, 3), (1.2, 1.0, 1.0, 1), (0.8, 1.0, 1.0, 1), (1.5, 1.0, 1.5, 4), (0.5, 1.0, 0.5, 4)],
)
def test_one_run_checks_what_is_known(
    monkeypatch: pytest.MonkeyPatch, step: float, known: float | None, found: float, runs: int
) -> None:
    clock = Clock(monkeypatch, step=step)
    assert checked_seconds(clock.run, lambda: None, known) == pytest.approx(found)
    assert clock.runs == runs


def test_a_run_that_was_held_up_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, step=9.0)

    def run() -> None:
        clock.run()
        clock.step = 1.0

    assert checked_seconds(run, lambda: None, 1.0) == 1.0


@pytest.mark.parametrize(("known", "found"), [((1.1, 1.2), (1.1, 1.2)), ((4.0, 2.0), (1.0, 1.0)), (None, (1.0, 1.0))])
def test_the_stand_in(monkeypatch: pytest.MonkeyPatch, known: tuple[float, float], found: tuple[float, float]) -> None:
    clock = Clock(monkeypatch, step=1.0)
    recorded = StandInRecorder().record(decode(1), clock.run, known)
    assert (recorded.plain_seconds, recorded.seconds) == pytest.approx(found)


class Measuring:
    """A recorder on a device where every step takes `seconds`."""

    owner = "fake"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.knew: list[tuple[GraphKey, tuple[float, float] | None]] = []

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None = None) -> Recorded:
        self.knew.append((key, known))
        seconds = self.seconds if known is None or known[0] != self.seconds else known[0]
        return Recorded(step, lambda: None, self.owner, seconds, seconds / 2, 0)

    def close(self) -> None:
        return None


def test_a_time_that_proves_wrong_casts_doubt_on_the_others() -> None:
    harness = Harness()
    harness.recorder = device = Measuring(2.0)  # type: ignore[assignment]
    store = harness.store
    store.know({decode(size): (1.0, 0.5) for size in (1, 2, 8)})
    # Known to take 1 s without a graph: bucket 8, which takes 1 s too, would serve it as well.
    assert store.timings.estimate(decode(1)) == 1.0
    store.capture([decode(2), decode(8)])
    assert device.knew == [(decode(8), (1.0, 0.5)), (decode(2), None)]
    assert store.times_changed
    # The old figure is not compared with the new ones.
    assert store.timings.estimate(decode(1)) == 2.0


def test_times_that_hold_stay() -> None:
    harness = Harness()
    harness.recorder = device = Measuring(1.0)  # type: ignore[assignment]
    store = harness.store
    store.know({decode(size): (1.0, 0.5) for size in (1, 2, 8)})
    store.capture([decode(2), decode(8)])
    assert [known for _, known in device.knew] == [(1.0, 0.5)] * 2
    assert not store.times_changed
    # Once it is recorded here, it is measured here: what an eviction drops comes back with times of its own.
    store.drop(store.recordings[0])
    store.capture([decode(8)])
    assert device.knew[-1] == (decode(8), None)
