"""The client for asyncio."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import pytest
from fake_server import HANG
from waiting import HANGS, until
from wire import Process

import hybridgen
from hybridgen import AsyncClient, FinishReason, PromptError, ServerBusyError, ServerError

Start = Callable[..., Process]


def at_rest(process: Process) -> bool:
    with process.client() as client:
        stats = client.stats()
        return stats["engine"]["free_pages"] == stats["engine"]["pages"] and stats["server"]["in_flight"] == 0


def test_results_equal_those_in_process(demo: Process, engine: hybridgen.Engine) -> None:
    async def run() -> tuple[Any, list[Any]]:
        async with AsyncClient(demo.path) as client:
            out = await client.generate("import os", max_new_tokens=6, logprobs=1)
            events = [event async for event in client.stream("import os", max_new_tokens=6)]
            assert (await client.ping())["healthy"]
            assert (await client.stats())["engine"]["pages"] > 0
            with pytest.raises(PromptError, match="empty string"):
                await client.generate("")
            return out, events

    out, events = asyncio.run(run())
    expected = engine.generate("import os", max_new_tokens=6, logprobs=1)
    assert (out.token_ids, out.text, out.logprobs) == (expected.token_ids, expected.text, expected.logprobs)
    assert "".join(event.text for event in events) == expected.text
    assert events[-1].completion.finish_reason is FinishReason.LENGTH


def test_brief_completions(toy: Start) -> None:
    async def run(path: Any) -> list[Any]:
        async with AsyncClient(path, brief=True) as client:
            events = [event async for event in client.stream([[5], [7]], max_new_tokens=3)]
            ended = [event.completion for event in events if event.completion is not None]
            return [await client.generate([5], max_new_tokens=3), *sorted(ended, key=lambda each: each.token_ids)]

    server = toy()
    outs = asyncio.run(run(server.path))
    assert [out.token_ids for out in outs] == [(6, 7, 8), (6, 7, 8), (8, 9, 10)]
    assert all(out.prompt_token_ids == () and out.timing.token_times == () for out in outs)
    assert all(out.timing.total == 1.0 for out in outs)


def test_many_calls_on_one_connection(toy: Start) -> None:
    async def run(path: Any) -> list[Any]:
        async with AsyncClient(path) as client:
            calls = [client.generate([n * 100], max_new_tokens=1 + n % 7) for n in range(100)]
            return await asyncio.gather(*calls)

    server = toy("--limit", "queue=8")  # most of them are busy at first
    outs = asyncio.run(run(server.path))
    assert [out.token_ids for out in outs] == [tuple(n * 100 + 1 + k for k in range(1 + n % 7)) for n in range(100)]


def test_cancelled_tasks_and_closed_streams(toy: Start) -> None:
    server = toy("--step", 0.01)

    async def run() -> None:
        async with AsyncClient(server.path) as client:
            task = asyncio.create_task(client.generate([1], max_new_tokens=10**6))
            while not client.in_flight:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            events = client.stream([1], max_new_tokens=10**6)
            assert (await anext(events)).token_id == 2
            await events.aclose()
            assert client.in_flight == ()
            waiting = asyncio.create_task(client.generate([1], max_new_tokens=10**6))
            while not client.in_flight:
                await asyncio.sleep(0.01)
            await client.cancel()
            assert (await waiting).finish_reason is FinishReason.CANCELLED

    asyncio.run(run())
    until(lambda: at_rest(server))


def test_errors(toy: Start) -> None:
    server = toy("--limit", "queue=2", "--step", 0.01)

    async def run() -> None:
        with pytest.raises(ServerError, match="no server answers"):
            await AsyncClient("/nowhere/at/all").ping()
        async with AsyncClient(server.path, wait=0, timeout=0.5) as client:
            running = asyncio.create_task(client.generate([[1], [2]], max_new_tokens=10**6))
            while not client.in_flight:
                await asyncio.sleep(0.01)
            with pytest.raises(ServerBusyError):
                await client.generate([3])
            await client.cancel()
            await running
            with pytest.raises(ServerError, match=r"sent nothing for 0.5 s"):
                await client.generate([HANG])
        with pytest.raises(ServerError, match="is closed"):
            await client.ping()

    asyncio.run(run())


def test_calls_that_end_while_it_connects_leave_no_connection(toy: Start) -> None:
    server = toy()

    async def run() -> None:
        client, closed = AsyncClient(server.path), AsyncClient(server.path)
        server.popen.send_signal(signal.SIGSTOP)
        try:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.ping(), 0.1)
            task = asyncio.create_task(closed.ping())
            await asyncio.sleep(0.1)
            await closed.close()
        finally:
            server.popen.send_signal(signal.SIGCONT)
        with pytest.raises(ServerError, match="closed while it connected"):
            await task
        with server.client() as other:
            deadline = asyncio.get_running_loop().time() + HANGS
            while other.ping()["clients"] > 1:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_killed_server(toy: Start) -> None:
    first = toy("--step", 0.01)
    client = AsyncClient(first.path)

    async def run() -> None:
        running = asyncio.create_task(client.generate([1], max_new_tokens=10**6))
        while not client.in_flight:
            await asyncio.sleep(0.01)
        first.popen.kill()
        with pytest.raises(ServerError, match="in flight is lost"):
            await running
        await asyncio.to_thread(toy, at=first.directory)
        assert (await client.generate([1], max_new_tokens=1)).token_ids == (2,)
        await client.shutdown()
        await client.close()

    asyncio.run(run())
