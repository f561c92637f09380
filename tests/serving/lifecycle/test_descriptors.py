"""Open files: the limit, the reserve, and what is logged when they run out."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
from collections.abc import Iterator
from typing import Any

import pytest

from hybridgen import ConfigError
from hybridgen.serving.lifecycle.descriptors import RESERVE, AcceptErrors, Reserve, require_descriptors


@pytest.fixture
def limit() -> Iterator[tuple[int, int]]:
    """The process's limit of open files, put back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def opened() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_enough_are_required(limit: tuple[int, int]) -> None:
    hard = limit[1]
    require_descriptors(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit
    if hard != resource.RLIM_INFINITY:
        with pytest.raises(ConfigError, match=r"lower --limit-clients, or raise the limit \(ulimit -n \d+\)"):
            require_descriptors(hard)
    small = opened() + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (small, hard))
    require_descriptors(200)  # it may raise its limit itself
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > small


def test_the_reserve_is_there_when_nothing_else_is(limit: tuple[int, int]) -> None:
    before = opened()
    reserve = Reserve()
    assert opened() == before + RESERVE
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened() + 40, limit[1]))
    with pytest.raises(OSError, match="open files"):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    reserve.spend()
    assert not reserve.full
    taken += [os.open(os.devnull, os.O_RDONLY) for _ in range(RESERVE)]
    reserve.fill()  # there are none
    assert not reserve.full
    for descriptor in taken:
        os.close(descriptor)
    reserve.fill()
    assert reserve.full
    reserve.spend()
    assert opened() == before


def test_errors_of_accepting_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now, out = [100.0], []
    handler = AcceptErrors(lambda: out.append(1), lambda: now[0])
    context: dict[str, Any] = {
        "message": "socket.accept() out of system resource",
        "exception": OSError(errno.EMFILE, "Too many open files"),
        "socket": None,
    }
    loop = asyncio.new_event_loop()
    with caplog.at_level(logging.ERROR):
        for _ in range(50):
            handler(loop, context)
            now[0] += 1
        assert [record.getMessage() for record in caplog.records] == [
            "a connection could not be accepted: Too many open files"
        ]
        now[0] += 60
        handler(loop, context)
    assert caplog.records[-1].getMessage().endswith("(49 times more since the last time this was said)")
    assert len(out) == 51
    handler(loop, {"message": "something else", "exception": ValueError("x")})
    assert "something else" in caplog.text
    loop.close()
