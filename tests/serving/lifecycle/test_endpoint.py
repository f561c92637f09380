"""The port of the metrics takes few at a time, not for long, and has one page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from test_lifecycle import Quiet
from waiting import HANGS

from hybridgen.errors import ServerError
from hybridgen.serving.lifecycle import endpoint as module
from hybridgen.serving.lifecycle.endpoint import CONNECTIONS, Endpoint
from hybridgen.serving.service.limits import Limits
from hybridgen.serving.service.metrics import Metrics
from hybridgen.serving.service.service import Service


def with_endpoint(test: Callable[[int], Coroutine[Any, Any, None]], accepting: bool = True) -> None:
    """Run a test with the port of an endpoint."""

    async def run() -> None:
        metrics = Metrics()
        metrics.watch(Service(Quiet, limits=Limits(), step_seconds=10))
        endpoint = Endpoint(0, metrics)
        await endpoint.serve(lambda: accepting)
        try:
            await test(endpoint.port)
        finally:
            endpoint.close()

    asyncio.run(asyncio.wait_for(run(), HANGS))


async def say(port: int, text: bytes) -> bytes:
    """What the port answers until it closes the connection; nothing if it does so without a word."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(text)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET /metrics HTTP/1.1", 200),
        ("HEAD /metrics HTTP/1.1", 200),
        ("GET /metrics?name=x HTTP/1.0", 200),
        ("POST /metrics HTTP/1.1", 405),
        ("GET / HTTP/1.1", 404),
        ("GET /metrics/ HTTP/1.1", 404),
        ("GET /favicon.ico HTTP/1.1", 404),
        ("GET", 404),
        ("\xff\x00\x01", 404),
        ("", 404),
    ],
)
def test_one_page(line: str, status: int) -> None:
    async def test(port: int) -> None:
        answer = await say(port, f"{line}\r\nHost: x\r\n\r\n".encode("latin-1"))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert (b"hybridgen_healthy 1.0" in body) == (status == 200 and line.startswith("GET"))
        assert f"Content-Length: {len(body)}\r\n".encode() in head + b"\r\n"

    with_endpoint(test)


def test_what_takes_too_long_or_is_too_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)

    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def drip() -> None:
            while True:  # each byte alone comes soon enough
                writer.write(b"x")
                await asyncio.sleep(0.02)

        task = asyncio.create_task(drip())
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        task.cancel()
        assert await say(port, b"") == b""  # says nothing
        assert await say(port, b"GET /metrics HTTP/1.1\r\n" + b"a" * 100_000) == b""
        monkeypatch.setattr(module, "SECONDS", HANGS)
        assert b"200 OK" in await say(port, b"GET /metrics HTTP/1.1\r\n\r\n")

    with_endpoint(test)


def test_few_at_once() -> None:
    async def test(port: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
        await asyncio.sleep(0.1)
        for _ in range(20):
            assert await say(port, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.1)
        assert b"200 OK" in await say(port, b"GET /metrics HTTP/1.1\r\n\r\n")

    with_endpoint(test)


def test_nobody_while_descriptors_are_short() -> None:
    async def test(port: int) -> None:
        assert await say(port, b"GET /metrics HTTP/1.1\r\n\r\n") == b""

    with_endpoint(test, accepting=False)


def test_a_port_that_is_taken() -> None:
    first = Endpoint(0, Metrics())
    with pytest.raises(ServerError, match=f"--metrics {first.port} cannot be used"):
        Endpoint(first.port, Metrics())
    first.close()
