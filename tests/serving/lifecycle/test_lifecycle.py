"""A server's start and end, in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from places import short_directory
from waiting import HANGS

from hybridgen import SamplingParams
from hybridgen.errors import EngineError
from hybridgen.serving.lifecycle import lifecycle
from hybridgen.serving.lifecycle.lifecycle import Lifecycle
from hybridgen.serving.service.intake import Request
from hybridgen.serving.service.limits import Limits
from hybridgen.serving.service.service import Service
from hybridgen.serving.unix.address import Lease


class Quiet:
    """A model that has nothing to do."""

    description: ClassVar[dict[str, Any]] = {"max_context": 100}

    def read_grammar(self, params: Any) -> None:
        """Nothing: no grammar is asked for."""

    def encode(self, prompt: Any, index: int) -> Any:
        return prompt

    def submit(self, prompts: list[Any], sampling: list[Any], *, events: bool) -> list[int]:
        return [1]

    def prompt_ids(self, handle: int) -> tuple[int, ...]:
        return ()

    def events(self) -> Iterator[Any]:
        return iter(())

    def step(self) -> None:
        return

    def cancel(self, handles: list[int]) -> None:
        return

    def busy(self) -> bool:
        return False

    def idle(self) -> bool:
        return False

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        return


def server(drain_seconds: float = 10) -> tuple[Service, Lifecycle]:
    service = Service(Quiet, limits=Limits(frame_seconds=0.4), step_seconds=10)
    lease = Lease(short_directory() / "s" / "x.sock")
    return service, Lifecycle(lease, service, step_seconds=10, drain_seconds=drain_seconds)


def test_a_thread_that_died_without_a_word_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    service, life = server()
    monkeypatch.setattr(service.generator, "run", lambda: None)
    error = asyncio.run(asyncio.wait_for(life.run(), HANGS))
    assert isinstance(error, EngineError)


@pytest.mark.parametrize("before", [True, False])
def test_a_server_that_was_told_to_end_does_not_listen(before: bool) -> None:
    """Whether it is told before it makes its socket, or while it does."""
    service, life = server()
    states = []

    def ready() -> None:
        if before:
            life.drain("a test asks for it")
        Lifecycle.ready(life)
        if not before:
            asyncio.get_running_loop().call_soon(life.drain, "a test asks for it")

    life.ready = ready  # type: ignore[method-assign]
    life._on_ready = lambda: states.append(service.state)
    assert asyncio.run(asyncio.wait_for(life.run(), HANGS)) is None
    assert states == []
    assert service.state == "ended"


class Still:
    """A process that stands still all the time."""

    longest = 1.0

    def look(self) -> tuple[float, float]:
        return time.monotonic(), 100.0


def test_the_end_of_a_drain_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clocks say, who waits for the server to end waits as long as was said."""
    service, life = server(drain_seconds=0.2)
    monkeypatch.setattr(lifecycle, "Standstill", lambda interval: Still())
    failed: list[BaseException] = []

    class Outlet:
        def failed(self, key: int, error: BaseException) -> None:
            failed.append(error)

    def ready() -> None:
        member = service.join(Outlet())  # type: ignore[arg-type]
        service.submit(member, 1, Request([[1]], [SamplingParams()], False, False, 10))
        life.drain("a test asks for it")

    life._on_ready = ready
    error = asyncio.run(asyncio.wait_for(life.run(), HANGS))
    assert "still running 0.2 s after" in str(error)
    assert failed == [error]
