"""Clients of a server with a toy model: forks, threads, broken connections, and waiting for a start."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import BREAK, HANG, REFUSE
from waiting import HANGS, until
from wire import Process, Raw, at_rest, joins, ping, request

import hybridgen
from hybridgen import FinishReason, Interrupted, PromptError, SamplingError, ServerError
from hybridgen.cli.main import main
from hybridgen.errors import EngineError

Start = Callable[..., Process]


def test_a_half_closed_client_is_gone(toy: Start) -> None:
    server = toy("--step", 0.0)
    raw = Raw(server.path)
    raw.send(request(1, [10**6], max_new_tokens=10**7, stream=True))
    with server.client() as client:
        until(lambda: client.ping()["steps"] > 4_000)  # more than the socket holds
        raw.socket.shutdown(socket.SHUT_WR)
        until(lambda: at_rest(client))
        assert client.ping()["clients"] == 1


def test_errors_are_counted(toy: Start) -> None:
    raw = Raw(toy("--limit", "n=2").path)
    raw.send(request(1, [1], n=3))
    raw.send(request(2, [1], temperature=-1))
    raw.send(request(3, [REFUSE]))
    assert [raw.receive()["type"] for _ in range(3)] == ["error"] * 3
    raw.send({"type": "stats", "id": 4})
    assert raw.receive()["server"]["counts"]["errors"] == 3


def test_a_fork_leaves_the_connection_of_its_parent_alone(toy: Start) -> None:
    with toy("--step", 0.01).client() as client:
        events = client.stream([1], max_new_tokens=60)
        next(events)
        child = os.fork()
        if child == 0:
            try:
                events.close()  # type: ignore[attr-defined]
                client.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        rest = list(events)
        assert len(rest) == 59
        assert rest[-1].completion.finish_reason is FinishReason.LENGTH


def test_a_deep_prompt_harms_nobody_else(toy: Start) -> None:
    def nest(levels: int) -> Any:
        return 1 if levels == 0 else {"a": nest(levels - 1)}

    with toy("--step", 0.01).client() as client:
        other = client.stream([1], max_new_tokens=20)
        next(other)
        with pytest.raises(PromptError, match="prompt 0 nests more than 14 levels"):
            client.generate([{"role": "user", "content": "x", "more": nest(13)}])
        assert len(list(other)) == 19
        with pytest.raises(PromptError, match="refused"):  # as deep as can be
            client.generate([{"role": "user", "content": "refuse", "more": nest(12)}])


def test_a_broken_connection_is_ended_for_the_server_too(toy: Start) -> None:
    server = toy("--step", 0.01)
    client = server.client()
    events = client.stream([1], max_new_tokens=10**6)
    next(events)
    link = client._link

    def interrupt(message: Any) -> None:
        raise KeyboardInterrupt

    link._hand_out = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        next(events)
    until(lambda: ping(server)["in_flight"] == 0)
    assert ping(server)["clients"] == 1
    assert link.closed


def test_a_request_that_is_interrupted_just_after_it_was_sent_is_cancelled(toy: Start) -> None:
    server = toy("--step", 0.01)
    with server.client() as client:
        link = client._link
        write = link._write

        def interrupted(data: bytes) -> None:
            link._write = write  # type: ignore[method-assign]
            write(data)
            raise KeyboardInterrupt

        link._write = interrupted  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            client.generate([1], max_new_tokens=10**6)
        assert not link.closed
        until(lambda: ping(server)["in_flight"] == 0)


def test_a_stream_that_is_never_read_has_no_connection(toy: Start) -> None:
    server = toy()
    events = hybridgen.stream(f"unix:{server.path}", [1], max_new_tokens=3)
    assert ping(server)["clients"] == 1
    assert [event.token_id for event in events] == [2, 3, 4]
    with pytest.raises(SamplingError):
        hybridgen.stream("unix:/nowhere/at/all", [1], temperature=-1)
    with pytest.raises(ServerError, match="no server answers"):
        next(hybridgen.stream("unix:/nowhere/at/all", [1]))


def test_two_servers_on_one_path(toy: Start) -> None:
    first = toy()
    second = toy(at=first.directory, wait=False)
    assert second.popen.wait(HANGS) == 2
    assert "another server has" in second.log()
    with first.client() as client:
        assert client.ping()["pid"] == first.popen.pid


def test_ten_servers_race_for_a_stale_path(toy: Start) -> None:
    stale = toy()
    stale.popen.kill()
    stale.popen.wait()
    servers = [toy(at=stale.directory, wait=False) for _ in range(10)]
    until(lambda: sum(server.popen.poll() is None for server in servers) == 1)
    (winner,) = [server for server in servers if server.popen.poll() is None]
    assert {server.popen.poll() for server in servers} == {None, 2}
    until(lambda: winner.path.exists())
    until(lambda: joins(winner))
    with winner.client() as client:
        assert client.ping()["pid"] == winner.popen.pid


def test_cancelled_by_another_thread(toy: Start) -> None:
    with toy("--step", 0.01).client() as client:
        results = []
        thread = threading.Thread(target=lambda: results.append(client.generate([1], max_new_tokens=10**6)))
        thread.start()
        until(lambda: client.in_flight and client.ping()["in_flight"])
        client.cancel()
        thread.join(HANGS)
        assert results[0].finish_reason is FinishReason.CANCELLED
        assert client.in_flight == ()


def test_a_closed_stream_is_cancelled(toy: Start) -> None:
    with toy("--step", 0.01).client() as client:
        events = client.stream([1], max_new_tokens=10**6)
        assert next(events).token_id == 2
        events.close()
        until(lambda: at_rest(client))


def test_threads_share_a_client(toy: Start) -> None:
    with toy().client() as client:
        results: dict[int, Any] = {}

        def work(number: int) -> None:
            for i in range(20):
                prompt = [number * 1000 + i]
                if i % 2:
                    results[number, i] = client.generate(prompt, max_new_tokens=3).token_ids
                else:
                    results[number, i] = tuple(e.token_id for e in client.stream(prompt, max_new_tokens=3))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 160
        for (number, i), ids in results.items():
            assert ids == tuple(number * 1000 + i + 1 + k for k in range(3))
        assert client.in_flight == ()


def test_more_prompts_than_one_request_holds(toy: Start) -> None:
    with toy("--limit", "batch=7", "--limit", "queue=10", "--limit", "frame=2000").client() as client:
        prompts = [[i * 10] * (1 + i % 30) for i in range(50)]
        outs = client.generate(prompts, max_new_tokens=2)
        assert [out.token_ids for out in outs] == [(i * 10 + 1, i * 10 + 2) for i in range(50)]
        assert [out.prompt_token_ids for out in outs] == [tuple(prompt) for prompt in prompts]
        indices = {event.index for event in client.stream(prompts, max_new_tokens=2)}
        assert indices == set(range(50))
        with pytest.raises(PromptError, match="prompt 1 takes"):
            client.generate([[1], [10**6] * 1000])


def test_a_client_after_a_fork(toy: Start) -> None:
    with toy().client() as client:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if client.generate([1], max_new_tokens=1).token_ids == (2,) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.generate([5], max_new_tokens=1).token_ids == (6,)


def test_a_timeout_of_the_client(toy: Start) -> None:
    with toy().client(timeout=0.3) as client:
        with pytest.raises(ServerError, match=r"sent nothing for 0.3 s") as caught:
            client.generate([HANG], max_new_tokens=1)
        assert caught.value.code == "timeout"


def test_a_closed_client(toy: Start) -> None:
    client = toy().client()
    client.close()
    client.close()
    with pytest.raises(ServerError, match="this client is closed"):
        client.ping()


def test_the_error_of_a_failed_request_is_raised_or_kept(toy: Start) -> None:
    server = toy("--step", 0.01)
    with server.client() as client, pytest.raises(EngineError, match="the device failed: it is at <path>"):
        client.generate([BREAK])
    assert server.popen.wait(HANGS) == 1


def test_a_client_waits_for_a_server_that_starts(
    toy: Callable[..., Process], capsys: pytest.CaptureFixture[str]
) -> None:
    starting = toy(wait=False)
    with starting.client(patience=60.0) as client:
        assert client.generate([1], max_new_tokens=2).error is None
    starting = toy(wait=False)

    async def wanted() -> dict[str, Any]:
        async with hybridgen.AsyncClient(starting.path, patience=60.0) as client:
            return await client.ping()

    assert asyncio.run(wanted())["healthy"]
    starting = toy(wait=False)
    assert main(["client", "--socket", str(starting.path), "--wait", "60", "--ping"]) == 0
    assert "healthy" in capsys.readouterr().out


def test_a_client_does_not_wait_for_what_is_no_server(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(hybridgen.ServerError, match="is not a socket"):
        hybridgen.Client(file, patience=600.0)
    with pytest.raises(hybridgen.ServerError, match="no server answers"):
        hybridgen.Client(tmp_path / "none", patience=0.2)
