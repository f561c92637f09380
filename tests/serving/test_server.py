"""A server with a toy model: limits, faults, hanging and ending. Every request gets its answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_server import BREAK, BUG, FATAL_BUG, HANG, REFUSE
from wire import Process, Raw, until

import hybridgen
from hybridgen import Client, FinishReason, Interrupted, PromptError, SamplingError, ServerBusyError, ServerError
from hybridgen.cli.main import main
from hybridgen.errors import EngineError

Start = Callable[..., Process]


def request(key: int, *prompts: list[int], **sampling: Any) -> dict[str, Any]:
    stream = sampling.pop("stream", False)
    return {"type": "request", "id": key, "prompts": list(prompts), "sampling": sampling, "stream": stream}


def at_rest(client: Client) -> bool:
    stats = client.stats()
    return stats["engine"]["free_pages"] == stats["engine"]["pages"] and stats["server"]["in_flight"] == 0


def test_many_requests_on_one_connection(toy: Start) -> None:
    raw = Raw(toy().path)
    for key in range(20):
        raw.send(request(key, [key * 100], max_new_tokens=3 + key % 5, stream=key % 2 == 0))
    tokens: dict[int, list[int]] = {key: [] for key in range(20)}
    done: dict[int, list[int]] = {}
    while len(done) < 20:
        message = raw.receive()
        if message["type"] == "token":
            tokens[message["id"]].append(message["token_id"])
        else:
            assert message["type"] == "done"
            done[message["id"]] = message["completion"]["token_ids"]
            if "token_id" in message:
                tokens[message["id"]].append(message["token_id"])
    for key in range(20):
        assert done[key] == [key * 100 + 1 + i for i in range(3 + key % 5)]
        assert tokens[key] == (done[key] if key % 2 == 0 else [])


def test_the_last_done_of_a_request_says_so(toy: Start) -> None:
    raw = Raw(toy().path)
    raw.send(request(5, [10], [20], [30], n=2, max_new_tokens=2))
    messages = [raw.receive() for _ in range(6)]
    assert [message["last"] for message in messages] == [False] * 5 + [True]
    assert {(m["index"], m["choice"]) for m in messages} == {(i, c) for i in range(3) for c in range(2)}


def test_cancel(toy: Start) -> None:
    raw = Raw(toy("--step", 0.01).path)
    raw.send(request(1, [10], max_new_tokens=10_000, stream=True))
    assert raw.receive()["token_id"] == 11
    raw.send({"type": "cancel", "id": 1})
    raw.send({"type": "cancel", "id": 77})  # not in flight: no answer
    while (message := raw.receive())["type"] == "token":
        pass
    assert message["last"]
    assert message["completion"]["finish_reason"] == "cancelled"
    raw.send({"type": "ping", "id": 2})
    assert raw.receive()["type"] == "ping"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"type": "hello", "version": 2}', "version"),
        (b'{"type": "hello", "version": true}', "version"),
        (b'{"type": "ping", "id": 1}', "protocol"),
        (b"garbage", "protocol"),
        (b"[]", "protocol"),
    ],
)
def test_a_bad_hello(toy: Start, body: bytes, code: str) -> None:
    raw = Raw(toy().path, hello=False)
    raw.send_body(body)
    assert raw.receive()["code"] == code
    assert raw.ended()


@pytest.mark.parametrize(
    "message",
    [
        {"type": "ping"},
        {"type": "ping", "id": -1},
        {"type": "ping", "id": 2**53},
        {"type": "ping", "id": True},
        {"type": "ping", "id": "1"},
        {"type": "ping", "id": [1]},
        {"type": "pong", "id": 1},
        {"type": ["ping"], "id": 1},
        {"id": 1},
        {},
        {"type": "hello", "version": 1},
    ],
)
def test_bad_messages_end_the_connection(toy: Start, message: Any) -> None:
    server = toy()
    raw, other = Raw(server.path), Raw(server.path)
    raw.send(message)
    answer = raw.receive()
    assert (answer["type"], answer["id"], answer["code"]) == ("error", None, "protocol")
    assert raw.ended()
    other.send({"type": "ping", "id": 1})
    assert other.receive()["healthy"]


def test_ids_count_up(toy: Start) -> None:
    raw = Raw(toy().path)
    raw.send(request(5, [1]))
    raw.send({"type": "ping", "id": 5})
    messages = []
    while (message := raw.receive())["type"] != "error":
        messages.append(message)
    assert "not above the one before" in message["message"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"prompts": []}, "prompt", "at least one prompt"),
        ({"prompts": "text"}, "prompt", "not a list"),
        ({"prompts": [7]}, "prompt", "give text, a list of token ids"),
        ({"prompts": ["x" * 101]}, "limit", "101 characters"),
        ({"prompts": [[{"role": "user", "content": "x" * 98}]]}, "limit", "characters"),
        ({"prompts": [[1]] * 9}, "limit", "9 prompts"),
        ({"prompts": [[1] * 100_001]}, "prompt", "over the context"),
        ({"sampling": {"n": 5}}, "limit", "n=5"),
        ({"prompts": [[1]] * 8, "sampling": {"n": 4}}, "limit", "never fit the queue"),
        ({"sampling": {"temperature": -1}}, "sampling", "temperature=-1"),
        ({"sampling": {"what": 1}}, "sampling", "unknown keyword"),
        ({"sampling": [{}, {}]}, "sampling", "2 entries for 1"),
        ({"sampling": 3}, "sampling", "not an object"),
        ({"stream": 1}, "request_message", "true or false"),
        ({"extra": 1}, "request_message", "unknown field"),
    ],
)
def test_requests_over_a_limit_or_wrong(toy: Start, change: dict[str, Any], code: str, words: str) -> None:
    limits = ["prompt_chars=100", "batch=8", "n=4", "queue=30"]
    raw = Raw(toy(*(part for limit in limits for part in ("--limit", limit))).path)
    raw.send(request(1, [1]) | change)
    answer = raw.receive()
    assert (answer["type"], answer["id"], answer["code"]) == ("error", 1, code)
    assert words in answer["message"]
    raw.send(request(2, [1], max_new_tokens=1))  # the connection goes on
    assert raw.receive()["completion"]["token_ids"] == [2]


def test_an_oversized_frame_is_refused_before_it_is_read(toy: Start) -> None:
    server = toy("--limit", "frame=1000")
    before = server.resident()
    for _ in range(20):
        raw = Raw(server.path)
        raw.socket.sendall(struct.pack(">I", 2**32 - 1))
        answer = raw.receive()
        assert answer["code"] == "protocol"
        assert "over the limit of 1000" in answer["message"]
        assert raw.ended()
    assert server.resident() - before < 2**26


@pytest.mark.apart
def test_half_frames_time_out(toy: Start) -> None:
    server = toy("--limit", "frame_seconds=0.4")
    silent = Raw(server.path, hello=False)
    half_header, half_body = Raw(server.path), Raw(server.path)
    half_header.socket.sendall(b"\0\0")
    half_body.socket.sendall(struct.pack(">I", 50) + b'{"type"')
    dripping = Raw(server.path)
    idle = Raw(server.path)
    dripping.socket.sendall(struct.pack(">I", 500))

    def drip() -> None:
        try:
            for _ in range(200):
                dripping.socket.sendall(b" ")
                time.sleep(0.02)
        except OSError:
            return

    thread = threading.Thread(target=drip)
    thread.start()
    for raw in (silent, half_header, half_body, dripping):
        assert raw.receive()["code"] == "timeout"
        assert raw.ended()
    thread.join()
    idle.send({"type": "ping", "id": 1})  # a connection with nothing half-read may be silent
    assert idle.receive()["type"] == "ping"


def test_too_many_clients(toy: Start) -> None:
    server = toy("--limit", "clients=2")
    first, second = Raw(server.path), Raw(server.path)
    with pytest.raises(ServerError, match="2 clients, its limit") as caught:
        server.client()
    assert caught.value.code == "clients"
    first.close()
    second.send({"type": "ping", "id": 1})
    until(lambda: _joins(server))


def _joins(server: Process) -> bool:
    try:
        server.client().close()
    except ServerError:
        return False
    return True


def test_a_full_queue_is_busy_with_a_hint(toy: Start) -> None:
    server = toy("--limit", "queue=3", "--step", 0.01)
    raw = Raw(server.path)
    raw.send(request(1, [10], [20], max_new_tokens=1000))
    raw.send(request(2, [30], [40], max_new_tokens=1))
    answer = raw.receive()
    assert (answer["id"], answer["code"]) == (2, "busy")
    assert 0 < answer["retry_after"] <= 30
    with pytest.raises(ServerBusyError, match="room for 1 of 2") as caught:
        server.client(wait=0).generate([[1], [2]])
    assert caught.value.retry_after > 0
    assert server.client(wait=0).generate([5], max_new_tokens=1).token_ids == (6,)  # what fits is taken
    raw.send({"type": "cancel", "id": 1})
    with server.client(wait=30) as client:  # tries again until there is room
        assert len(client.generate([[1], [2]])) == 2
        assert client.stats()["server"]["counts"]["busy"] >= 2


def test_prompts_that_take_too_much_memory_wait(toy: Start) -> None:
    server = toy("--limit", "held=1000", "--step", 0.01)
    raw = Raw(server.path)
    raw.send(request(1, [1] * 200, max_new_tokens=10**6))  # one alone may always come
    raw.send(request(2, [1]))
    answer = raw.receive()
    assert (answer["id"], answer["code"]) == (2, "busy")
    assert "too much memory" in answer["message"]
    raw.send({"type": "cancel", "id": 1})
    assert raw.receive()["id"] == 1
    for key in range(3, 6):  # what has ended no longer counts
        raw.send(request(key, [1] * 80, max_new_tokens=1))
        assert raw.receive()["type"] == "done"


def test_all_requests_of_many_clients_pass_through_a_short_queue(toy: Start) -> None:
    server = toy("--limit", "queue=4")
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        with server.client(wait=60) as client:
            results[number] = [client.generate([number * 1000 + i], max_new_tokens=2).token_ids for i in range(10)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [(n * 1000 + i + 1, n * 1000 + i + 2) for i in range(10)] for n in range(1, 9)}


def test_a_slow_reader_is_cut_off_and_others_go_on(toy: Start) -> None:
    server = toy("--limit", "unsent=100000", "--step", 0.0)
    slow = Raw(server.path)
    slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.send(request(1, *[[10**6]] * 4, max_new_tokens=50_000, stream=True))
    with server.client() as client:
        for i in range(50):
            assert client.generate([i * 10], max_new_tokens=2).token_ids == (i * 10 + 1, i * 10 + 2)
        until(lambda: client.stats()["server"]["counts"]["cut_off"] == 1)
        until(lambda: at_rest(client))
    assert slow.ended()
    assert "too much unread" in server.log()


@pytest.mark.apart
def test_a_reader_that_stops_is_cut_off_after_a_while(toy: Start) -> None:
    server = toy("--limit", "write_seconds=0.4", "--step", 0.0)
    slow = Raw(server.path)
    slow.send(request(1, [10**6], max_new_tokens=100_000, stream=True))
    with server.client() as client:
        until(lambda: client.stats()["server"]["counts"]["cut_off"] == 1)
        until(lambda: at_rest(client))
    assert "has read nothing for 0.4 s" in server.log()


def test_a_flood_of_pings_without_reading_is_cut_off(toy: Start) -> None:
    server = toy("--limit", "unsent=100000")
    raw = Raw(server.path)
    body = b"".join(
        struct.pack(">I", len(ping)) + ping
        for ping in (json.dumps({"type": "ping", "id": key}).encode() for key in range(100_000))
    )
    with pytest.raises(OSError, match=r"reset|Broken"):
        raw.socket.sendall(body)
    with server.client() as client:
        assert client.stats()["server"]["counts"]["cut_off"] == 1


def test_too_many_stats_wait(toy: Start) -> None:
    server = toy("--limit", "controls=3", "--step", 0.3)
    raw = Raw(server.path)
    raw.send(request(0, [1], max_new_tokens=3))
    for key in range(1, 10):
        raw.send({"type": "stats", "id": key})
    answers = [raw.receive() for _ in range(10)]
    assert sum(answer["type"] == "stats" for answer in answers) >= 3
    assert {answer.get("code") for answer in answers if answer["type"] == "error"} == {"busy"}


def test_a_client_that_goes_away_frees_its_slots(toy: Start) -> None:
    server = toy("--step", 0.005)
    raw = Raw(server.path)
    raw.send(request(1, *[[i] for i in range(8)], max_new_tokens=10**6, stream=True))
    raw.receive()
    with server.client() as client:
        assert not at_rest(client)
        raw.close()
        until(lambda: at_rest(client))
        assert client.ping()["clients"] == 1


def test_a_refused_prompt_and_a_bug(toy: Start) -> None:
    server = toy()
    with server.client() as client:
        with pytest.raises(PromptError, match="refused, says <path>"):
            client.generate([REFUSE])
        with pytest.raises(ServerError, match="its log says why") as caught:
            client.generate([BUG])
        assert caught.value.code == "internal"
        assert "secret" not in str(caught.value)
        assert client.generate([1], max_new_tokens=1).token_ids == (2,)
    assert "ZeroDivisionError" in server.log()


@pytest.mark.parametrize("bad", [BREAK, FATAL_BUG])
def test_a_fatal_error_answers_everybody_before_the_end(toy: Start, bad: int) -> None:
    server = toy("--step", 0.01)
    raws = [Raw(server.path) for _ in range(5)]
    for number, raw in enumerate(raws):
        for key in range(6):  # more than there are slots
            raw.send(request(key, [number * 100 + key], max_new_tokens=10**6, stream=key % 2 == 0))
    until(lambda: raw_stats(server)["in_flight"] == 30)
    killer = Raw(server.path)
    killer.send(request(0, [bad]))
    for number, raw in enumerate([*raws, killer]):
        answered = set()
        with suppress(EOFError):
            while True:
                message = raw.receive()
                if message["type"] in ("error", "done"):
                    answered.add(message["id"])
                    assert "secret" not in json.dumps(message)
        assert answered == (set(range(6)) if number < 5 else {0})
    assert server.popen.wait(20) == 1
    assert not server.path.exists()
    assert "ended: " in server.log()
    assert (server.directory / "ready.json.unloaded").exists()
    with pytest.raises(ServerError, match="no server answers"):
        server.client()


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
    until(lambda: raw_stats(server)["in_flight"] == 9)
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


def raw_stats(server: Process) -> dict[str, Any]:
    with server.client() as client:
        return client.ping()


def test_a_second_sigterm_aborts(toy: Start) -> None:
    server = toy("--step", 0.02)
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=10**6))
    until(lambda: raw_stats(server)["in_flight"] == 1)
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
    until(lambda: raw_stats(server)["in_flight"] == 1)
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
    until(lambda: raw_stats(server)["in_flight"] == 1)
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
    until(lambda: raw_stats(server)["steps"] >= 20_000)
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
    until(lambda: raw_stats(server)["in_flight"] == 1)
    server.popen.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    server.popen.send_signal(signal.SIGCONT)
    assert raw.receive()["type"] == "done"
    assert "stood still" in server.log()


def test_a_half_closed_client_is_gone(toy: Start) -> None:
    server = toy("--step", 0.0)
    raw = Raw(server.path)
    raw.send(request(1, [10**6], max_new_tokens=10**7, stream=True))
    with server.client() as client:
        until(lambda: client.ping()["steps"] > 10_000)  # more than the socket holds
        raw.socket.shutdown(socket.SHUT_WR)
        until(lambda: at_rest(client), 5)
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
    until(lambda: raw_stats(server)["in_flight"] == 0)
    assert raw_stats(server)["clients"] == 1
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
        until(lambda: raw_stats(server)["in_flight"] == 0, 5)


def test_a_stream_that_is_never_read_has_no_connection(toy: Start) -> None:
    server = toy()
    events = hybridgen.stream(f"unix:{server.path}", [1], max_new_tokens=3)
    assert raw_stats(server)["clients"] == 1
    assert [event.token_id for event in events] == [2, 3, 4]
    with pytest.raises(SamplingError):
        hybridgen.stream("unix:/nowhere/at/all", [1], temperature=-1)
    with pytest.raises(ServerError, match="no server answers"):
        next(hybridgen.stream("unix:/nowhere/at/all", [1]))


def test_two_servers_on_one_path(toy: Start) -> None:
    first = toy()
    second = toy(at=first.directory, wait=False)
    assert second.popen.wait(20) == 2
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
    until(lambda: _joins(winner))
    with winner.client() as client:
        assert client.ping()["pid"] == winner.popen.pid


def test_cancelled_by_another_thread(toy: Start) -> None:
    with toy("--step", 0.01).client() as client:
        results = []
        thread = threading.Thread(target=lambda: results.append(client.generate([1], max_new_tokens=10**6)))
        thread.start()
        until(lambda: client.in_flight and client.ping()["in_flight"])
        client.cancel()
        thread.join(20)
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
    assert server.popen.wait(20) == 1


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
