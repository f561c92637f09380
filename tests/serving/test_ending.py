"""A server with a toy model that hangs, is told to end, is killed or starts again."""

from __future__ import annotations

import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from fake_server import HANG
from wire import Process, Raw, at_rest, ping, request, until

from hybridgen import Client, ServerError

Start = Callable[..., Process]


@pytest.mark.apart
def test_a_step_that_hangs(toy: Start) -> None:
    server = toy("--step-timeout", 0.5)
    with server.client() as client:
        healthy = client.ping()
        raw = Raw(server.path)
        raw.send(request(1, [HANG], max_new_tokens=3, stream=True))
        until(lambda: client.ping()["work_age"] > 0.1)
        raw.send(request(2, [50], max_new_tokens=1))
        raw.send({"type": "stats", "id": 3})
        until(lambda: not client.ping()["healthy"])
        sick = client.ping()
        assert sick["working"]
        assert sick["work_age"] > 0.5
        assert sick["steps"] == healthy["steps"]
        codes = {message["id"]: message.get("code") for message in (raw.receive() for _ in range(3))}
        assert codes == {1: "stuck", 2: "stuck", 3: "stuck"}
        with pytest.raises(ServerError, match="has not finished a step") as caught:
            client.generate([1])
        assert caught.value.code == "stuck"
        until(lambda: client.ping()["healthy"])  # the step ended after all
        until(lambda: at_rest_or_stuck(client))
        assert client.generate([1], max_new_tokens=1).token_ids == (2,)
        raw.send({"type": "ping", "id": 4})
        assert raw.receive()["id"] == 4  # nothing of the lost requests came late


def at_rest_or_stuck(client: Client) -> bool:
    try:
        return at_rest(client)
    except ServerError:
        return False


def test_sigterm_while_a_step_hangs(toy: Start) -> None:
    server = toy("--step-timeout", 0.3)
    raw = Raw(server.path)
    raw.send(request(1, [HANG], max_new_tokens=1))
    assert raw.receive()["code"] == "stuck"
    assert server.end() == 0


def test_sigterm_drains(toy: Start) -> None:
    server = toy("--step", 0.02)
    raw = Raw(server.path)
    raw.send(request(1, *[[i * 100] for i in range(8)], max_new_tokens=20))
    raw.send(request(2, [5], max_new_tokens=30, stream=True))
    until(lambda: ping(server)["in_flight"] == 9)
    server.popen.send_signal(signal.SIGTERM)
    until(lambda: not server.path.exists())
    with pytest.raises(ServerError, match="no server answers"):
        server.client()
    raw.send(request(3, [1]))
    done, errors = set(), {}
    while len(done) < 9 or not errors:
        message = raw.receive()
        if message["type"] == "done":
            assert message["completion"]["finish_reason"] == "length"
            done.add((message["id"], message["index"]))
        elif message["type"] == "error":
            errors[message["id"]] = message["code"]
    assert errors == {3: "shutting_down"}
    assert raw.ended()
    assert server.popen.wait(20) == 0
    assert not server.ready.exists()
    assert not list(server.path.parent.iterdir())
    assert (server.directory / "ready.json.unloaded").exists()


def test_a_second_sigterm_aborts(toy: Start) -> None:
    server = toy("--step", 0.02)
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=10**6))
    until(lambda: ping(server)["in_flight"] == 1)
    server.popen.send_signal(signal.SIGTERM)
    until(lambda: not server.path.exists())
    assert server.popen.poll() is None
    server.popen.send_signal(signal.SIGTERM)
    assert raw.receive()["code"] == "shutting_down"
    assert raw.ended()
    assert server.popen.wait(20) == 1


def test_a_drain_has_an_end(toy: Start) -> None:
    server = toy("--drain-timeout", 0.3, "--step-timeout", 4)
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=10**6))
    until(lambda: ping(server)["in_flight"] == 1)
    server.popen.send_signal(signal.SIGTERM)
    assert raw.receive()["code"] == "shutting_down"
    assert server.popen.wait(20) == 1


@pytest.mark.apart
def test_sigterm_while_it_loads(toy: Start) -> None:
    server = toy("--load", 30, wait=False)
    until(lambda: (server.path.parent / "x.sock.lock").exists())
    time.sleep(0.3)  # the handlers come right after the lock
    server.popen.send_signal(signal.SIGTERM)
    assert server.popen.wait(10) == 0
    assert not list(server.path.parent.iterdir())


def test_a_load_that_fails(toy: Start) -> None:
    server = toy("--load-error", wait=False)
    assert server.popen.wait(20) == 2
    assert "refused: there is no toy" in server.log()
    assert not server.ready.exists()


def test_shutdown_by_a_client(toy: Start) -> None:
    server = toy("--step", 0.02)
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=10))
    raw.send({"type": "shutdown", "id": 2})
    kinds = {message["id"]: message["type"] for message in (raw.receive(), raw.receive())}
    assert kinds == {1: "done", 2: "shutdown"}
    assert server.popen.wait(20) == 0


def test_idle_exit(toy: Start) -> None:
    server = toy("--idle-exit", 0.5, "--step", 0.05)
    with server.client() as client:
        client.generate([1], max_new_tokens=20)  # longer than the idle time, and not idle
        assert server.popen.wait(20) == 0
        with pytest.raises(ServerError):
            client.generate([1])


def test_a_killed_server_is_replaced_on_the_same_path(toy: Start) -> None:
    first = toy("--step", 0.01)
    client, error = first.client(), []

    def wait() -> None:
        try:
            client.generate([1], max_new_tokens=10**6)
        except ServerError as problem:
            error.append(problem)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: client.ping()["in_flight"])
    first.popen.kill()
    first.popen.wait()
    thread.join(20)
    assert len(error) == 1
    assert "in flight is lost" in str(error[0])
    assert first.path.exists()
    with pytest.raises(ServerError, match="no server answers"):
        client.ping()
    second = toy(at=first.directory)
    assert client.generate([1], max_new_tokens=1).token_ids == (2,)  # connects again
    assert client.ping()["pid"] == second.popen.pid


def test_stats_do_not_hold_up_a_drain(toy: Start) -> None:
    server = toy("--step", 0.3, "--drain-timeout", 8)
    raw = Raw(server.path)
    raw.send(request(0, [1], max_new_tokens=2))
    until(lambda: ping(server)["in_flight"] == 1)
    raw.send(request(1, [HANG], max_new_tokens=1))
    for key, kind in enumerate(["stats", "shutdown", "stats"], 2):
        raw.send({"type": kind, "id": key})
    raw.send({"type": "cancel", "id": 1})
    answers = {}
    with suppress(EOFError):
        while True:
            message = raw.receive()
            answers[message["id"]] = message.get("code", message["type"])
    assert answers == {0: "done", 1: "done", 2: "stats", 3: "shutdown", 4: "shutting_down"}
    assert server.popen.wait(5) == 0
    alone = toy()
    raw = Raw(alone.path)
    stats, shutdown = (json.dumps({"type": kind, "id": key}).encode() for key, kind in enumerate(["stats", "shutdown"]))
    raw.socket.sendall(b"".join(struct.pack(">I", len(body)) + body for body in (stats, shutdown)))
    assert alone.popen.wait(10) == 0


def test_a_drain_waits_for_a_slow_reader(toy: Start) -> None:
    server = toy("--step", 0.0)
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=20_000, stream=True))
    until(lambda: ping(server)["steps"] >= 20_000)
    server.popen.send_signal(signal.SIGTERM)
    time.sleep(5.7)
    while not (message := raw.receive()).get("last"):
        pass
    assert len(message["completion"]["token_ids"]) == 20_000
    assert server.popen.wait(20) == 0


@pytest.mark.apart
def test_signals_while_it_cleans_up(toy: Start) -> None:
    server = toy("--close", 1.5)
    server.popen.send_signal(signal.SIGTERM)
    until(lambda: not server.path.exists())
    time.sleep(0.5)
    server.popen.send_signal(signal.SIGTERM)
    server.popen.send_signal(signal.SIGINT)
    assert server.popen.wait(20) == 0
    assert not server.ready.exists()
    assert not list(server.path.parent.iterdir())


def test_what_cannot_be_used_is_found_before_the_model_is_loaded(toy: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = toy("--load", 60, "--metrics", taken.getsockname()[1], wait=False)
        assert server.popen.wait(20) == 2
    assert "cannot be used" in server.log()
    server = toy("--load", 60, "--ready-file", server.directory / "none" / "ready", wait=False)
    assert server.popen.wait(20) == 2
    assert "cannot be written" in server.log()


@pytest.mark.apart
def test_idle_time_begins_with_the_end_of_a_request(toy: Start) -> None:
    server = toy("--idle-exit", 1.5, "--step", 0.05, "--limit", "frame_seconds=0.8")
    with server.client() as client:
        client.generate([1], max_new_tokens=50)
        time.sleep(0.6)
        client.generate([1], max_new_tokens=1)
    assert server.popen.wait(20) == 0


@pytest.mark.apart
def test_a_process_that_stood_still_does_not_hang(toy: Start) -> None:
    server = toy("--step", 0.02, "--step-timeout", 1, "--limit", "frame_seconds=1", "--limit", "write_seconds=1")
    half = Raw(server.path)
    half.socket.sendall(b"\0\0")
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=50))
    until(lambda: ping(server)["in_flight"] == 1)
    server.popen.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    server.popen.send_signal(signal.SIGCONT)
    assert raw.receive()["type"] == "done"
    assert "stood still" in server.log()
