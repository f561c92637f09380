"""The lock that is handed over."""

from __future__ import annotations

import threading
import time

from hybridgen.engine.handoff import TurnLock


def test_a_busy_thread_lets_others_in() -> None:
    lock, stop, entered = TurnLock(), threading.Event(), []

    def busy() -> None:
        while not stop.is_set():
            lock.give_way()
            with lock:
                time.sleep(0.0005)

    thread = threading.Thread(target=busy)
    thread.start()
    for _ in range(20):
        with lock:
            entered.append(time.perf_counter())
    stop.set()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert len(entered) == 20


def test_it_can_be_taken_twice_by_its_owner() -> None:
    lock = TurnLock()
    with lock, lock:
        taken = []
        thread = threading.Thread(target=lambda: (lock.__enter__(), taken.append(1), lock.__exit__()))
        thread.start()
        thread.join(timeout=0.05)
        assert not taken
    thread.join(timeout=10)
    assert taken


def test_giving_way_to_nobody_returns() -> None:
    TurnLock().give_way()
