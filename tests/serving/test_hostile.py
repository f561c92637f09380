"""Clients that try to stop the others, with a toy model: what they send is refused, or waits beside the steps."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import short_directory
from waiting import HANGS, until
from wire import FAKE, Process, Raw, environment, joins, ping, request

from hybridgen import Client, FinishReason, PromptError, ServerError

Start = Callable[..., Process]
FRAME = 4 * 2**20 - 200


@pytest.fixture(scope="module")
def small() -> Iterator[Process]:
    """A toy server that holds little; tests leave it as they found it."""
    process = Process(short_directory(), "--limit", "held=1000000", "--step", "0.01", fake=True)
    yield process
    process.kill()


def body(piece: bytes, last: bytes = b"1") -> bytes:
    """A message of 4 MiB."""
    return b'{"type":"ping","id":1,"x":[' + piece * (FRAME // len(piece)) + last + b"]}"


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"[[[[]]]],", b"1,", b'"",', b'"\\"[",', b'{"a":1},'])
def test_frames_of_many_values_are_refused(plain: Process, piece: bytes) -> None:
    other = Raw(plain.path)
    raw = Raw(plain.path)
    raw.send_body(body(piece))
    answer = raw.receive()
    assert (answer["id"], answer["code"]) == (None, "protocol")
    assert "over the limit of 524288" in answer["message"]
    assert raw.ended()
    other.send({"type": "ping", "id": 1})
    assert other.receive()["healthy"]


@pytest.mark.parametrize(
    "message",
    [
        b'{"type":"ping","id":' + b"1" * FRAME + b"}",  # one number
        b'{"type":"ping",' + b'"a":1,' * (FRAME // 6) + b'"id":1}',  # one key again and again
        b'{"type":"ping","x":"' + b"\\\\" * (FRAME // 2),  # a string without an end
        b'{"type":"ping","id":1' + b" " * FRAME + b"}",
    ],
)
def test_frames_that_take_long_to_read_are_answered_at_once(plain: Process, message: bytes) -> None:
    other, raw = Raw(plain.path), Raw(plain.path)
    start = time.monotonic()
    raw.send_body(message)
    assert raw.receive()["type"] in ("error", "ping")
    other.send({"type": "ping", "id": 1})
    assert other.receive()["healthy"]
    assert time.monotonic() - start < HANGS / 2  # reading such a number takes minutes without a limit of its digits


def test_halves_of_a_length_hold_nobody_up(plain: Process) -> None:
    before = plain.descriptors()
    halves = []
    for _ in range(40):
        halves.append(socket.socket(socket.AF_UNIX))
        halves[-1].connect(str(plain.path))
        halves[-1].sendall(b"\x00\x3f")
    assert ping(plain)["healthy"]
    for half in halves:
        half.close()
    until(lambda: plain.descriptors() <= before)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"stop": ["x" * 10**6] * 4}, "characters, the limit"),
        ({"stop": [f"s{number:05x}" for number in range(300_000)]}, "stop strings of a request are over"),
        ({"stop_token_ids": list(range(400_000))}, "ids and biases, the limit"),
        ({"logit_bias": {str(token): 1 for token in range(200_000)}}, "ids and biases, the limit"),
        ({"stop": [["x"] * 400_000]}, "ids and biases, the limit"),
    ],
)
def test_sampling_that_would_take_long_is_refused(plain: Process, sampling: dict[str, Any], words: str) -> None:
    raw = Raw(plain.path)
    before = plain.resident()
    for key in range(3):
        raw.send(request(key, [1], **sampling))
        answer = raw.receive()
        assert (answer["id"], answer["code"]) == (key, "limit")
        assert words in answer["message"]
    raw.send(request(9, [1], max_new_tokens=1, stop=["x" * 8000]))
    assert raw.receive()["type"] == "done"
    assert plain.resident() - before < 2**27


@pytest.mark.parametrize(
    ("prompt", "sampling", "most"),
    [
        ([1], {"stop": ["y" * 8000]}, 1),
        ([1], {"logit_bias": {str(token): 0.25 for token in range(20_000)}}, 4),
        ([1], {"stop_token_ids": list(range(10_000, 42_000))}, 6),
        ("x" * 100_000, {}, 1),
        ([1] * 50_000, {}, 2),
    ],
)
def test_what_waits_weighs_as_much_as_its_frame(
    small: Process, prompt: Any, sampling: dict[str, Any], most: int
) -> None:
    """Whatever it is in a request that is long."""
    raw = Raw(small.path)
    for key in range(9):
        raw.send(request(key, prompt, max_new_tokens=10**6, **sampling))
    codes = [raw.receive().get("code") for _ in range(9 - most)]
    assert codes == ["busy"] * (9 - most)
    raw.close()
    until(lambda: ping(small)["in_flight"] == 0)


def test_a_client_splits_what_has_too_many_values(toy: Start) -> None:
    with toy("--limit", "elements=3000", "--limit", "containers=600").client() as client:
        prompts = [[number] * 500 for number in range(1, 20)]
        outs = client.generate(prompts, max_new_tokens=1)
        assert [out.token_ids for out in outs] == [(number + 1,) for number in range(1, 20)]
        assert len(client.generate([[1]] * 500, max_new_tokens=1)) == 500
        with pytest.raises(PromptError, match=r"prompt 1 takes \d+ elements with its sampling"):
            client.generate([[1], [1] * 3000])


def test_encoding_does_not_hold_up_steps(toy: Start, tmp_path: Path) -> None:
    server = toy()
    with server.client() as client:
        slow = Raw(server.path)
        slow.send(request(1, f"wait for {tmp_path}/encoded", max_new_tokens=1))
        until(lambda: client.ping()["in_flight"] == 1)
        assert len(client.generate([1], max_new_tokens=50).token_ids) == 50
        assert client.ping()["in_flight"] == 1  # it still waits
        (tmp_path / "encoded").touch()
        assert slow.receive()["completion"]["prompt_token_ids"] == [4]
        assert client.generate("hello", max_new_tokens=1).token_ids == (6,)
        with pytest.raises(PromptError, match="this chat is refused"):
            client.generate([{"role": "user", "content": "x"}])


def test_encoding_has_an_end(toy: Start) -> None:
    server = toy("--limit", "encode_seconds=0.5", "--limit", "frame_seconds=1")
    with server.client() as client:
        with pytest.raises(ServerError, match=r"not encoded within 0.5 s") as caught:
            client.generate("wait for /nothing/that/comes")
        assert caught.value.code == "limit"
        until(lambda: encodes(client))
        assert client.ping()["in_flight"] == 0
        assert client.ping()["healthy"]
    assert "left behind" in server.log()


def encodes(client: Client) -> bool:
    """Whether it does so in time."""
    try:
        return client.generate("abc", max_new_tokens=1).token_ids == (4,)
    except ServerError:
        return False


def test_cancelled_and_dropped_while_they_are_encoded(toy: Start, tmp_path: Path) -> None:
    server = toy()
    text = f"wait for {tmp_path}/encoded"
    raw, gone = Raw(server.path), Raw(server.path)
    gone.send(*(request(key, text, max_new_tokens=10**6) for key in (1, 2)))
    until(lambda: ping(server)["in_flight"] == 2)
    raw.send(request(1, text, max_new_tokens=10**6))
    until(lambda: ping(server)["in_flight"] == 3)
    raw.send({"type": "cancel", "id": 1})
    gone.close()  # one of its texts is being encoded, and one waits
    until(lambda: ping(server)["clients"] == 2)
    (tmp_path / "encoded").touch()
    assert raw.receive()["completion"]["finish_reason"] == FinishReason.CANCELLED
    with server.client() as client:
        assert client.generate("abc", max_new_tokens=1).token_ids == (4,)  # after all that was to be encoded before
        until(lambda: client.ping()["in_flight"] == 0)
        stats = client.stats()
        assert stats["engine"]["running"] == 0
        assert stats["server"]["clients"] == 2


def test_a_drain_waits_for_what_is_encoded(toy: Start, tmp_path: Path) -> None:
    server = toy()
    raw = Raw(server.path)
    raw.send(request(1, f"wait for {tmp_path}/encoded", max_new_tokens=2))
    until(lambda: ping(server)["in_flight"] == 1)
    server.popen.send_signal(signal.SIGHUP)  # as SIGTERM does
    until(lambda: not server.path.exists())
    (tmp_path / "encoded").touch()
    assert raw.receive()["completion"]["token_ids"] == [5, 6]
    assert raw.ended()
    assert server.popen.wait(HANGS) == 0
    assert not server.ready.exists()


def test_a_flood_of_long_messages_does_not_move_the_end_of_a_drain(toy: Start) -> None:
    server = toy("--drain-timeout", 1, "--limit", "write_seconds=1", "--step", 0.01)
    raw = Raw(server.path)
    raw.send(request(1, [1], max_new_tokens=10**6))
    until(lambda: ping(server)["in_flight"] == 1)

    sent: list[int] = []

    def flood() -> None:
        attacker = Raw(server.path)
        piece = b'{"a":1,"b":"\\""},'
        legal = b',"x":[' + piece * 60_000 + b"1]}"
        try:
            for key in range(10_000):
                attacker.send_body(b'{"type":"ping","id":%d' % key + legal)
                sent.append(key)
        except OSError:
            return

    threads = [threading.Thread(target=flood) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(sent) > 4)
    server.popen.send_signal(signal.SIGTERM)
    assert raw.receive()["code"] == "shutting_down"
    assert server.popen.wait(HANGS) == 1
    for thread in threads:
        thread.join()
    assert "stood still" not in server.log()


def test_many_refused_clients_hold_no_descriptors(toy: Start) -> None:
    server = toy("--limit", "clients=2")
    first, second = Raw(server.path), Raw(server.path)
    before = server.descriptors()
    pings = b"".join(
        struct.pack(">I", len(ping)) + ping
        for ping in (json.dumps({"type": "ping", "id": key}).encode() for key in range(3000))
    )
    first.close()
    refused = []
    for _ in range(20):  # they never read what they were told, and more waits for them than a socket holds
        until(lambda: joins(server))
        refused.append(Raw(server.path))
        refused[-1].socket.sendall(pings)
        refused[-1].socket.recv(1, socket.MSG_PEEK)  # a wrong frame that came with them would be refused before this
        refused[-1].socket.sendall(b"\0\0\0\1[")
    until(lambda: server.descriptors() <= before + 12)
    second.send({"type": "ping", "id": 1})
    assert second.receive()["healthy"]
    for raw in refused:
        raw.close()


def run_with_limit(files: int, *options: str) -> tuple[int, str]:
    """A toy server that may open so many files, until it ends."""
    directory = short_directory()
    command = [sys.executable, str(FAKE), "--socket", str(directory / "x"), "--load-error", *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=HANGS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )
    return done.returncode, done.stdout


def test_limits_that_need_more_files_than_there_may_be() -> None:
    status, said = run_with_limit(256, "--limit", "clients=1000")
    assert status == 2
    assert "lower --limit-clients, or raise the limit (ulimit -n " in said
    assert "there is no toy" in run_with_limit(256, "--metrics", "0")[1]  # the default ones fit


def test_a_signal_that_is_ignored_stays_ignored(toy: Start) -> None:
    """As `nohup` starts a process."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        server = toy()
    finally:
        signal.signal(signal.SIGHUP, before)
    server.popen.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    assert ping(server)["state"] == "ready"
    assert server.end() == 0


def test_the_owner_comes_in_while_others_hold_the_port_of_the_metrics(toy: Start) -> None:
    server = toy("--metrics", 0, "--scrape-seconds", 1)
    before = server.descriptors()
    held = [socket.socket() for _ in range(50)]
    for connection in held:
        connection.setblocking(False)  # few are accepted at a time
        connection.connect_ex(("127.0.0.1", server.facts["metrics_port"]))
    until(lambda: server.descriptors() > before)
    until(lambda: server.descriptors() <= before + 12)
    assert ping(server)["healthy"]
    assert server.descriptors() <= before + 12
    for connection in held:
        connection.close()
    assert os.path.getsize(server.log_path) < 10_000
