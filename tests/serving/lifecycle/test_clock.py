"""Whether a process stood still, told by two clocks."""

from __future__ import annotations

import pytest

from hybridgen.serving.lifecycle.clock import Standstill


class Clocks:
    """Clocks that a test moves."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.standstill = Standstill(1.0, lambda: self.wall, lambda: self.cpu)

    def pass_by(self, wall: float, cpu: float) -> float:
        self.wall += wall
        self.cpu += cpu
        now, stood = self.standstill.look()
        assert now == self.wall
        return stood


@pytest.mark.parametrize("busy", [0.0, 0.3, 1.0, 8.0])
def test_a_process_that_stood_still(busy: float) -> None:
    clocks = Clocks()
    for _ in range(3):
        assert clocks.pass_by(1.0, busy) == 0
    assert clocks.pass_by(60.0, 0.7 * busy) == 60.0  # stopped in the middle of an interval
    assert clocks.pass_by(1.0, busy) == 0


@pytest.mark.parametrize("share", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("before", [0.0, 0.02])
def test_a_process_that_was_busy(share: float, before: float) -> None:
    """Also where others leave it but a part of a core."""
    clocks = Clocks()
    assert clocks.pass_by(1.0, before) == 0
    for _ in range(5):
        assert clocks.pass_by(5.0, 5.0 * share) == 0


def test_no_gap() -> None:
    clocks = Clocks()
    for wall in (0.0, 1.0, 2.9):
        assert clocks.pass_by(wall, 0.0) == 0
