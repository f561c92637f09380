"""Ten thousand frames of garbage: the server answers or hangs up, serves others meanwhile, and is as before after."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from waiting import until
from wire import Process, Raw

WORDS: list[Any] = [
    None, True, 0, 1, -1, 2**53, 2**64, 1.5, 1e300, "", "x", "-inf", "nan", "\ud800", [], {}, [[]], [1, 2], ["x"],
    {"type": "ping"}, "request", "cancel", "stats", "ping", "shut", "hello", {"n": 3}, {"logit_bias": {"1": "-inf"}},
]  # fmt: skip
NAMES = ["type", "id", "prompts", "sampling", "stream", "echo", "brief", "version", "x"]


def mutated(chance: random.Random, key: int) -> bytes:
    """A frame that is near a right one, in some way wrong, or noise."""
    kind = chance.randrange(8)
    request: dict[str, Any] = {"type": "request", "id": key, "prompts": [[1, 2]], "sampling": {"max_new_tokens": 1}}
    if kind == 0:
        body = chance.randbytes(chance.randrange(60))
    elif kind == 1:
        for _ in range(chance.randint(1, 3)):
            request[chance.choice(NAMES)] = chance.choice(WORDS)
        body = json.dumps(request).encode()
    elif kind == 2:
        request["sampling"] = {chance.choice(["n", "top_k", "stop", "seed", "logprobs"]): chance.choice(WORDS)}
        body = json.dumps(request).encode()
    elif kind == 3:
        body = bytearray(json.dumps(request).encode())
        body[chance.randrange(len(body))] = chance.randrange(256)
    elif kind == 4:
        return struct.pack(">I", chance.choice([2**32 - 1, 2**22 + 1, 2**31])) + chance.randbytes(8)
    elif kind == 5:
        body = chance.choice([b"[", b'{"a":', b'"\\', b"9"]) * chance.randrange(1, 2000)
    elif kind == 6:
        body = json.dumps({chance.choice(NAMES): chance.choice(WORDS) for _ in range(3)}).encode()
    else:
        body = json.dumps(request | {"prompts": chance.choice(WORDS)}).encode()
    if b"shutdown" in body:
        body = b"{}"
    frame = struct.pack(">I", len(body)) + bytes(body)
    return frame[: chance.randrange(len(frame))] if chance.random() < 0.02 else frame


def closed(raw: Raw) -> None:
    raw.close()


@pytest.mark.parametrize("frames", [1_500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_fuzz(demo: Process, frames: int) -> None:
    chance = random.Random(frames)
    with demo.client() as client:
        descriptors, memory = demo.descriptors(), demo.resident()
        answered = 0
        raw: Raw | None = None
        for number in range(frames):
            if raw is None:
                raw = Raw(demo.path, hello=chance.random() < 0.95)
            try:
                raw.socket.sendall(mutated(chance, number))
                raw.socket.settimeout(chance.choice([0.0, 0.01]))
                while raw.socket.recv(65536):
                    answered += 1
                raw = closed(raw)
            except (BlockingIOError, TimeoutError):  # it says nothing, and may take another frame
                raw = raw if chance.random() < 0.8 else closed(raw)
            except OSError:
                raw = closed(raw)
            if chance.random() < 0.01:
                assert len(client.generate([5, 6], max_new_tokens=2).token_ids) == 2
        if raw is not None:
            raw.close()
        assert answered > frames / 20
        until(lambda: client.stats()["engine"]["running"] == client.stats()["engine"]["waiting"] == 0)
        until(lambda: client.ping()["in_flight"] == 0)
        stats = client.stats()
        assert stats["engine"]["free_pages"] == stats["engine"]["pages"]
        until(lambda: demo.descriptors() == descriptors)
        assert demo.resident() - memory < 64 * 2**20
        assert "Traceback" not in Path(demo.log_path).read_text()
