"""Who stands still is found by what ranks say, and nobody who only takes long."""

from __future__ import annotations

import numpy as np
import pytest

from hybridgen.parallel.progress import LONG_SECONDS, STEP_SECONDS, Progress, State, Watch

AWAY, STEP, LONG, WAITS = State


class Clock:
    """Looks ten times a second."""

    def __init__(self, size: int = 2) -> None:
        self.watch, self.now = Watch(size), 0.0
        self.words = [(AWAY, 0)] * size

    def go_on(self, seconds: float, **states: State) -> str | None:
        """What is found within so many seconds after ranks went into states, by `r0=`, `r1=`, ..."""
        for name, state in states.items():
            rank = int(name[1:])
            self.words[rank] = state, self.words[rank][1] + 1
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            found = self.watch.look(self.words, self.now)
            if found is not None:
                return found
        return None


def test_a_rank_that_hangs_in_a_step_while_the_other_waits_for_it() -> None:
    clock = Clock()
    assert clock.go_on(STEP_SECONDS - 1, r0=WAITS, r1=STEP) is None
    found = clock.go_on(2)
    assert found is not None
    assert found.startswith("rank 1 has stood still in a step for 1")


def test_steps_may_take_four_times_as_long_as_any_before() -> None:
    clock = Clock()
    for _ in range(3):
        assert clock.go_on(6, r1=STEP) is None
    assert clock.go_on(STEP_SECONDS + 4 * 6 - 1, r1=STEP) is None
    assert clock.go_on(3) is not None


def test_what_compiles_or_is_idle_takes_as_long_as_it_takes() -> None:
    clock = Clock()
    for _ in range(int(LONG_SECONDS) // 10):
        assert clock.go_on(20, r0=WAITS, r1=LONG) is None  # it uses the processor, so that its count changes
    assert clock.go_on(3600, r0=AWAY, r1=AWAY) is None
    assert "has done nothing for" in str(clock.go_on(LONG_SECONDS + 1, r0=WAITS, r1=LONG))


def test_all_wait_or_one_did_not_begin() -> None:
    clock = Clock(3)
    assert clock.go_on(STEP_SECONDS - 1, r0=WAITS, r1=WAITS, r2=LONG) is None
    assert clock.go_on(STEP_SECONDS - 1, r2=WAITS) is None
    assert str(clock.go_on(2)).endswith("for each other")
    clock = Clock(3)
    assert "for rank 2, which did not begin" in str(clock.go_on(STEP_SECONDS + 1, r0=WAITS, r1=WAITS))


def test_rank_zero_is_not_blamed_nor_a_rank_while_rank_zero_was_stopped() -> None:
    clock = Clock()
    assert clock.go_on(600, r0=STEP, r1=WAITS) is None
    clock.go_on(1, r0=WAITS, r1=STEP)
    clock.now += 600
    assert clock.go_on(STEP_SECONDS - 2) is None
    assert clock.go_on(2) is not None


def test_contexts_nest() -> None:
    words = np.zeros(2, dtype=np.int64)
    progress = Progress(words)
    states = []
    with progress.long:
        with progress.step, progress.waits:
            states.append(progress.state)
        states.append(progress.state)
    assert [*states, progress.state] == [WAITS, LONG, AWAY]
    assert words[1] == 6
    with pytest.raises(RuntimeError), progress.step:
        raise RuntimeError
    assert progress.state is AWAY
