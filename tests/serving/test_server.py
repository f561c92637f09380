"""A server with a toy model: requests, limits and faults. Every request gets its answer."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from fake_server import BREAK, BUG, FATAL_BUG, REFUSE
from places import short_directory
from waiting import HANGS, until, with_longer
from wire import Process, Raw, at_rest, joins, ping, request

from hybridgen import PromptError, ServerBusyError, ServerError

Start = Callable[..., Process]


@pytest.fixture(scope="module")
def limited() -> Iterator[Process]:
    """A toy server with small limits; tests leave it as they found it."""
    limits = ["prompt_chars=100", "batch=8", "n=4", "queue=30"]
    process = Process(short_directory(), *(part for limit in limits for part in ("--limit", limit)), fake=True)
    yield process
    process.kill()


def test_many_requests_on_one_connection(plain: Process) -> None:
    raw = Raw(plain.path)
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


def test_the_last_done_of_a_request_says_so(plain: Process) -> None:
    raw = Raw(plain.path)
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
def test_a_bad_hello(plain: Process, body: bytes, code: str) -> None:
    raw = Raw(plain.path, hello=False)
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
def test_bad_messages_end_the_connection(plain: Process, message: Any) -> None:
    raw, other = Raw(plain.path), Raw(plain.path)
    raw.send(message)
    answer = raw.receive()
    assert (answer["type"], answer["id"], answer["code"]) == ("error", None, "protocol")
    assert raw.ended()
    other.send({"type": "ping", "id": 1})
    assert other.receive()["healthy"]


def test_ids_count_up(plain: Process) -> None:
    raw = Raw(plain.path)
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
def test_requests_over_a_limit_or_wrong(limited: Process, change: dict[str, Any], code: str, words: str) -> None:
    raw = Raw(limited.path)
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


def test_half_frames_time_out(toy: Start) -> None:
    def test(seconds: float) -> None:
        server = toy("--limit", f"frame_seconds={seconds}")
        silent = Raw(server.path, hello=False)
        half_header, half_body = Raw(server.path), Raw(server.path)
        half_header.socket.sendall(b"\0\0")
        half_body.socket.sendall(struct.pack(">I", 50) + b'{"type"')
        dripping = Raw(server.path)
        idle = Raw(server.path)
        dripping.socket.sendall(struct.pack(">I", 2**20))

        def drip() -> None:
            with suppress(OSError):
                while True:
                    dripping.socket.sendall(b" ")
                    time.sleep(0.02)

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        for raw in (silent, half_header, half_body, dripping):
            assert raw.receive()["code"] == "timeout"
            assert raw.ended()
        thread.join()
        idle.send({"type": "ping", "id": 1})  # a connection with nothing half-read may be silent
        assert idle.receive()["type"] == "ping"

    with_longer(test, (0.3, 3))


def test_too_many_clients(toy: Start) -> None:
    server = toy("--limit", "clients=2")
    first, second = Raw(server.path), Raw(server.path)
    with pytest.raises(ServerError, match="2 clients, its limit") as caught:
        server.client()
    assert caught.value.code == "clients"
    first.close()
    second.send({"type": "ping", "id": 1})
    until(lambda: joins(server))


def test_a_full_queue_is_busy_with_a_hint(toy: Start) -> None:
    server = toy("--limit", "queue=3", "--step", 0.01)
    raw = Raw(server.path)
    raw.send(request(1, [10], [20], max_new_tokens=10**6))
    raw.send(request(2, [30], [40], max_new_tokens=1))
    answer = raw.receive()
    assert (answer["id"], answer["code"]) == (2, "busy")
    assert 0 < answer["retry_after"] <= 30
    with pytest.raises(ServerBusyError, match="room for 1 of 2") as caught:
        server.client(wait=0).generate([[1], [2]])
    assert caught.value.retry_after > 0
    assert server.client(wait=0).generate([5], max_new_tokens=1).token_ids == (6,)  # what fits is taken
    raw.send({"type": "cancel", "id": 1})
    with server.client(wait=HANGS) as client:  # tries again until there is room
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
        with server.client(wait=HANGS) as client:
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


def test_a_reader_that_stops_is_cut_off_after_a_while(toy: Start) -> None:
    server = toy("--limit", "write_seconds=0.3", "--step", 0.0)
    slow = Raw(server.path)
    slow.send(request(1, [10**6], max_new_tokens=100_000, stream=True))
    with server.client() as client:
        until(lambda: client.stats()["server"]["counts"]["cut_off"] == 1)
        until(lambda: at_rest(client))
    assert "has read nothing for 0.3 s" in server.log()


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
    raw = Raw(toy("--limit", "controls=3").path)
    raw.send(request(0, [1], max_new_tokens=3), *({"type": "stats", "id": key} for key in range(1, 10)))
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


def test_a_refused_prompt_and_a_bug(plain: Process) -> None:
    with plain.client() as client:
        with pytest.raises(PromptError, match="refused, says <path>"):
            client.generate([REFUSE])
        with pytest.raises(ServerError, match="its log says why") as caught:
            client.generate([BUG])
        assert caught.value.code == "internal"
        assert "secret" not in str(caught.value)
        assert client.generate([1], max_new_tokens=1).token_ids == (2,)
    assert "ZeroDivisionError" in plain.log()


@pytest.mark.parametrize("bad", [BREAK, FATAL_BUG])
def test_a_fatal_error_answers_everybody_before_the_end(toy: Start, bad: int) -> None:
    server = toy("--step", 0.01)
    raws = [Raw(server.path) for _ in range(5)]
    for number, raw in enumerate(raws):
        for key in range(6):  # more than there are slots
            raw.send(request(key, [number * 100 + key], max_new_tokens=10**6, stream=key % 2 == 0))
    until(lambda: ping(server)["in_flight"] == 30)
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
    assert server.popen.wait(HANGS) == 1
    assert not server.path.exists()
    assert "ended: " in server.log()
    assert (server.directory / "ready.json.unloaded").exists()
    with pytest.raises(ServerError, match="no server answers"):
        server.client()
