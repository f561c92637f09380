"""A server with a toy model that hangs, is told to end, is killed or starts again."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from fake_server import HANG
from waiting import HANGS, until, with_longer
from wire import Process, Raw, at_rest, ping, request

from hybridgen import ServerError

Start = Callable[..., Process]


def test_a_step_that_hangs(toy: Start) -> None:
    server = toy("--step-timeout", 0.5)
    with server.client() as client:
        healthy = client.ping()
        raw = Raw(server.path)
        raw.send(request(1, [HANG], max_new_tokens=3, stream=True))
        until(lambda: client.ping()["work_age"] > 0.1)
        raw.send(request(2, [50], max_new_tokens=1), {"type": "stats", "id": 3})
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
        server.go_on()
        until(lambda: client.ping()["healthy"])  # the step ended after all
        until(lambda: not stuck(lambda: at_rest(client)))
        until(lambda: not stuck(lambda: client.generate([1], max_new_tokens=1).token_ids == (2,)))
        raw.send({"type": "ping", "id": 4})
        assert raw.receive()["id"] == 4  # nothing of the lost requests came late


def stuck(holds: Callable[[], bool]) -> bool:
    """Whether something does not hold, or a step takes too long once more."""
    try:
        return not holds()
    except ServerError:
        return True


def test_sigterm_while_a_step_hangs(toy: Start) -> None:
    server = toy("--step-timeout", 0.3)
    raw = Raw(server.path)
    raw.send(request(1, [HANG], max_new_tokens=1))
    assert raw.receive()["code"] == "stuck"
    server.popen.send_signal(signal.SIGTERM)
    until(lambda: not server.path.exists())
    server.go_on()
    assert server.popen.wait(HANGS) == 0


def test_sigterm_drains(toy: Start) -> None:
    server = toy()
    raw = Raw(server.path)
    raw.send(request(1, [HANG], *[[i * 100] for i in range(1, 8)], max_new_tokens=20))
    raw.send(request(2, [5], max_new_tokens=30, stream=True))
    until(lambda: ping(server)["in_flight"] == 9)
    server.popen.send_signal(signal.SIGTERM)
    until(lambda: not server.path.exists())
    with pytest.raises(ServerError, match="no server answers"):
        server.client()
    raw.send(request(3, [1]))
    server.go_on()
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
    assert server.popen.wait(HANGS) == 0
    assert not server.ready.exists()
    assert not list(server.path.parent.iterdir())
    assert server.note("unloaded").exists()


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
    assert server.popen.wait(HANGS) == 1


def test_a_drain_has_an_end(toy: Start) -> None:
    server = toy("--drain-timeout", 0.3, "--limit", "write_seconds=0.8")
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=10**6))
    until(lambda: ping(server)["in_flight"] == 1)
    server.popen.send_signal(signal.SIGTERM)
    assert raw.receive()["code"] == "shutting_down"
    assert server.popen.wait(HANGS) == 1


def test_sigterm_while_it_loads(toy: Start) -> None:
    server = toy("--load", 30, wait=False)
    until(server.note("loading").exists)
    server.popen.send_signal(signal.SIGTERM)
    assert server.popen.wait(HANGS) == 0
    assert not list(server.path.parent.iterdir())


def test_a_load_that_fails(toy: Start) -> None:
    server = toy("--load-error", wait=False)
    assert server.popen.wait(HANGS) == 2
    assert "refused: there is no toy" in server.log()
    assert not server.ready.exists()


def test_shutdown_by_a_client(toy: Start) -> None:
    server = toy()
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=10), {"type": "shutdown", "id": 2})
    kinds = {message["id"]: message["type"] for message in (raw.receive(), raw.receive())}
    assert kinds == {1: "done", 2: "shutdown"}
    assert server.popen.wait(HANGS) == 0


def test_idle_exit(toy: Start) -> None:
    def test(seconds: float) -> None:
        server = toy("--idle-exit", seconds)
        raw = Raw(server.path)
        raw.send(request(1, [HANG], max_new_tokens=1))
        until(lambda: ping(server)["in_flight"] == 1)
        time.sleep(1.5 * seconds)  # longer than the idle time, and not idle
        server.go_on()
        assert raw.receive()["type"] == "done"
        time.sleep(0.4 * seconds)  # the idle time begins now
        assert ping(server)["state"] == "ready"
        assert server.popen.wait(HANGS) == 0
        with pytest.raises(ServerError):
            server.client()

    with_longer(test, (0.5, 4))


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
    thread.join(HANGS)
    assert len(error) == 1
    assert "in flight is lost" in str(error[0])
    assert first.path.exists()
    with pytest.raises(ServerError, match="no server answers"):
        client.ping()
    second = toy(at=first.directory)
    assert client.generate([1], max_new_tokens=1).token_ids == (2,)  # connects again
    assert client.ping()["pid"] == second.popen.pid


def test_stats_do_not_hold_up_a_drain(toy: Start) -> None:
    server = toy()
    raw = Raw(server.path)
    raw.send(request(0, [1], max_new_tokens=2), request(1, [HANG], max_new_tokens=1))
    until(lambda: ping(server)["in_flight"] >= 1)
    raw.send(*({"type": kind, "id": key} for key, kind in enumerate(["stats", "shutdown", "stats"], 2)))
    raw.send({"type": "cancel", "id": 1})
    until(lambda: not server.path.exists())
    server.go_on()
    answers = {}
    with suppress(EOFError):
        while True:
            message = raw.receive()
            answers[message["id"]] = message.get("code", message["type"])
    assert answers == {0: "done", 1: "done", 2: "stats", 3: "shutdown", 4: "shutting_down"}
    assert server.popen.wait(HANGS) == 0
    alone = toy()
    Raw(alone.path).send({"type": "stats", "id": 0}, {"type": "shutdown", "id": 1})
    assert alone.popen.wait(HANGS) == 0


def test_a_drain_waits_for_a_slow_reader(toy: Start) -> None:
    """Longer than after an abort."""
    server = toy("--step", 0.0, "--close-seconds", 0.1)
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=8000, stream=True))  # more than the socket holds
    until(lambda: ping(server)["steps"] >= 8000)
    server.popen.send_signal(signal.SIGTERM)
    until(lambda: not server.path.exists())
    time.sleep(0.5)
    while not (message := raw.receive()).get("last"):
        pass
    assert len(message["completion"]["token_ids"]) == 8000
    assert server.popen.wait(HANGS) == 0


def test_signals_while_it_cleans_up(toy: Start) -> None:
    server = toy("--close-hangs")
    server.popen.send_signal(signal.SIGTERM)
    until(server.note("closing").exists)
    time.sleep(0.2)
    server.popen.send_signal(signal.SIGTERM)
    server.popen.send_signal(signal.SIGINT)
    server.go_on()
    assert server.popen.wait(HANGS) == 0
    assert not server.ready.exists()
    assert not list(server.path.parent.iterdir())


def test_what_cannot_be_used_is_found_before_the_model_is_loaded(toy: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = toy("--load", 60, "--metrics", taken.getsockname()[1], wait=False)
        assert server.popen.wait(HANGS) == 2
    assert "cannot be used" in server.log()
    server = toy("--load", 60, "--ready-file", server.directory / "none" / "ready", wait=False)
    assert server.popen.wait(HANGS) == 2
    assert "cannot be written" in server.log()


def test_a_process_that_stood_still_does_not_hang(toy: Start) -> None:
    def test(seconds: float) -> None:
        limits = (part for name in ("frame", "write") for part in ("--limit", f"{name}_seconds={seconds}"))
        server = toy("--step-timeout", seconds, *limits)
        half = Raw(server.path)
        half.socket.sendall(b"\0\0")
        raw = Raw(server.path)
        raw.send(request(1, [HANG], max_new_tokens=5))
        until(lambda: ping(server)["in_flight"] == 1)
        server.popen.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * seconds)
        server.popen.send_signal(signal.SIGCONT)
        server.go_on()
        assert raw.receive()["type"] == "done"
        assert "stood still" in server.log()

    with_longer(test, (0.6, 4))
