"""The door's event loop."""

from __future__ import annotations

import asyncio
import selectors
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from hybridgen.serving.http import event_loop

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="epoll is Linux's")


def test_the_first_request_is_far_before_the_last_is_read() -> None:
    """Each connection's message takes two turns of the loop. All are there at the beginning."""
    count, seen = 40, list[str]()

    def arrived(receiver: socket.socket) -> None:
        receiver.recv(1)
        seen.append("read")
        loop.call_soon(lambda: loop.call_soon(passed_on))

    def passed_on() -> None:
        seen.append("passed on")
        if seen.count("passed on") == count:
            loop.stop()

    with ExitStack() as undo:
        loop = event_loop.new_event_loop()
        undo.callback(loop.close)
        for _ in range(count):
            sender, receiver = map(undo.enter_context, socket.socketpair())
            sender.send(b"x")
            loop.add_reader(receiver, arrived, receiver)
        loop.call_later(10, loop.stop)
        loop.run_forever()
    assert seen.count("read") == seen.count("passed on") == count
    assert seen.index("passed on") <= 3 * event_loop.AT_ONCE


def test_all_get_their_turn_beside_connections_that_always_have_something() -> None:
    with ExitStack() as undo:
        selector = undo.enter_context(event_loop.FewAtOnce(2))
        pairs = [tuple(map(undo.enter_context, socket.socketpair())) for _ in range(7)]
        for sender, receiver in pairs:
            sender.send(b"x")
            selector.register(receiver, selectors.EVENT_READ, receiver)
        told = [key.data for _ in range(8) for key, _ in selector.select(1.0)]
    assert {receiver for _, receiver in pairs} == set(told)
    assert len(told) == 16


def test_what_is_told_is_what_epoll_tells() -> None:
    with ExitStack() as undo:
        selector = undo.enter_context(event_loop.FewAtOnce(8))
        one, other = map(undo.enter_context, socket.socketpair())
        assert selector.select(0) == selector.select(-1) == []
        selector.register(one, selectors.EVENT_READ | selectors.EVENT_WRITE)
        assert [events for _, events in selector.select()] == [selectors.EVENT_WRITE]
        other.send(b"x")
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        assert [events for _, events in selector.select()] == [both]
        selector.modify(one, selectors.EVENT_READ)
        other.close()
        assert [events for _, events in selector.select()] == [selectors.EVENT_READ]
        selector.unregister(one)
        assert selector.select(0) == []


def test_it_closes_what_it_opened() -> None:
    async def nothing() -> None:
        await asyncio.sleep(0)

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for _ in range(3):
        with asyncio.Runner(loop_factory=event_loop.new_event_loop) as runner:
            runner.run(nothing())
    assert descriptors() == before
