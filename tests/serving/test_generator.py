"""The generator thread and the server around it, with models that break in its hands."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from places import short_directory

from hybridgen import SamplingParams
from hybridgen.errors import EngineError
from hybridgen.serving.address import Lease
from hybridgen.serving.generator import Ended, Generator, Key, Outcome, Submit
from hybridgen.serving.limits import Limits
from hybridgen.serving.server import Server


class Broken:
    """A model whose events cannot be read; `where` says what else fails."""

    description: ClassVar[dict[str, Any]] = {"max_context": 100}

    def __init__(self, where: str = "") -> None:
        self.where = where
        self.runs = 0
        self.closed = False

    def submit(self, prompts: list[Any], sampling: list[SamplingParams], *, events: bool) -> list[int]:
        self.runs = 1
        return [1]

    def prompt_ids(self, handle: int) -> tuple[int, ...]:
        return ()

    def events(self, handle: int) -> Iterator[Any]:
        raise RuntimeError("events")

    def step(self) -> None:
        return

    def cancel(self, handles: list[int]) -> None:
        return

    def busy(self) -> bool:
        return bool(self.runs)

    def idle(self) -> bool:
        if self.where == "idle":
            raise RuntimeError("idle")
        return False

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True
        if self.where == "close":
            raise SystemExit  # ends a thread silently


def submit(key: int) -> Submit:
    return Submit(Key(1, key), [[1]], [SamplingParams()], True, False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["", "idle", "close"])
def test_the_end_is_told_whatever_breaks(where: str) -> None:
    model, outcomes = Broken(where), list[Outcome]()
    generator = Generator(lambda: model, outcomes.extend, lambda client, frames: None)
    generator.start()
    generator.send(submit(1))
    generator.join(5)
    assert not generator.is_alive()
    assert model.closed
    assert isinstance(outcomes[-1], Ended)
    assert isinstance(outcomes[-1].error, RuntimeError)


def server_with(model: Broken) -> Server:
    lease = Lease(short_directory() / "s" / "x.sock")
    return Server(lease, lambda: model, limits=Limits(frame_seconds=0.4), step_seconds=10, drain_seconds=10)


def test_a_thread_that_died_without_a_word_ends_the_server() -> None:
    server = server_with(Broken())
    server.generator._wind_up = server.generator._flush = lambda *_: None  # type: ignore[assignment]
    server.generator._load = lambda: 1 / 0  # type: ignore[assignment,return-value]
    error = asyncio.run(asyncio.wait_for(server.run(), 5))
    assert isinstance(error, EngineError)


def test_a_server_that_was_told_to_end_does_not_become_ready() -> None:
    server = server_with(Broken())

    async def run(before: bool) -> None:
        server._finished = asyncio.Event()
        server.state = "loading"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(short_directory() / "x"))
        listener.listen()
        if before:
            server.drain("a test asks for it")
        task = asyncio.create_task(server._listen(listener))
        if not before:
            asyncio.get_running_loop().call_soon(server.drain, "a test asks for it")
        await task
        assert server.state == "ended"

    for before in (True, False):
        asyncio.run(run(before))
