"""The application itself: keys, limits, clients that go away, and bodies that are no requests."""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from fake_server import BREAK, HANG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import short_directory
from waiting import HANGS, until
from web import web
from wire import Process

from hybridgen import ServerError
from hybridgen.core import TokenEvent, TokenLogprob
from hybridgen.serving.http import app
from hybridgen.serving.http.app import Door, together
from hybridgen.serving.http.jobs import Served
from hybridgen.serving.http.metrics import exposition
from hybridgen.serving.http.text import Text

Start = Callable[..., Process]
Open = Callable[..., str]
BODY = {"prompt": [5], "max_tokens": 3}


def at_rest(process: Process) -> bool:
    with process.client() as client:
        return bool(client.stats()["server"]["in_flight"] == 0)


def test_models_and_health(url: str) -> None:
    [card] = web.get(f"{url}/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("demo", "model", 1024)
    assert web.get(f"{url}/v1/models/demo").json() == card
    assert web.get(f"{url}/v1/models/other").status_code == 404
    health = web.get(f"{url}/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")


def test_while_a_step_stands_still(toy: Start, door: Open) -> None:
    server = toy("--step-timeout", 0.5)
    url = door(server.path)
    assert web.get(f"{url}/health").status_code == 200
    answer = web.post(f"{url}/v1/completions", json=BODY | {"prompt": [HANG]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stuck")
    sick = web.get(f"{url}/health")
    assert (sick.status_code, sick.json()["status"]) == (503, "unhealthy")
    server.go_on()
    until(lambda: web.get(f"{url}/health").status_code == 200)  # the step ended after all


def test_tokens_that_were_cached_are_counted(url: str) -> None:
    body = {"prompt": [7 + index % 50 for index in range(200)], "max_tokens": 1, "cache_salt": "counted"}
    first, again = (web.post(f"{url}/v1/completions", json=body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens"] == again["prompt_tokens"] == 200
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert 100 <= again["prompt_tokens_details"]["cached_tokens"] < 200


def test_the_curl_lines_of_the_docs(url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    page = (Path(__file__).parents[3] / "docs" / "http.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("curl ")]
    assert lines
    for line in lines:
        command = [word.replace("http://127.0.0.1:8000", url) for word in shlex.split(line)]
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS).stdout)
        assert answer["choices"][0]["text"]


def test_tokens(url: str, engine: Any) -> None:
    text = "def f(x):\n    # é 漢字"
    ids = engine.checkpoint.tokenizer(text)["input_ids"]
    found = web.post(f"{url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 1024)
    assert "".join(found["token_strs"]).startswith("def f(x):\n    #")
    assert "bytes:\\xc3" in found["token_strs"]  # half of a character, as OpenAI writes it
    assert web.post(f"{url}/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    chat = web.post(f"{url}/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()["tokens"]
    assert chat == engine.checkpoint.tokenizer("<user>x\n<assistant>")["input_ids"]
    info = web.get(f"{url}/tokenizer_info").json()
    assert info["vocab_size"] == len(engine.checkpoint.tokenizer)
    assert web.post(f"{url}/detokenize", json={"tokens": [10**9]}).status_code == 400


def test_metrics(url: str) -> None:
    web.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1, "never_heard_of": 1})
    text = web.get(f"{url}/metrics").text
    assert "hybridgen_up 1.0" in text
    assert 'hybridgen_http_answers_total{path="/v1/completions",status="200"}' in text
    assert 'hybridgen_http_ignored_fields_total{field="never_heard_of"}' in text
    assert 'hybridgen_graph_steps_total{phase="decode",result="miss"}' in text


def test_the_page_is_whole(url: str) -> None:
    page = web.get(f"{url}/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "://" not in page.text.replace("http://www.w3.org", "")  # nothing comes from elsewhere


def test_without_a_page(plain: Process, door: Open) -> None:
    url = door(plain.path, page=False)
    answer = web.get(f"{url}/")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
    assert web.get(f"{url}/v1/completions").status_code == 404


def test_keys(plain: Process, door: Open) -> None:
    url = door(plain.path, keys=["first", "second"])
    assert web.get(f"{url}/health").status_code == 200
    for path in ("/", "/v1/models", "/metrics", "/tokenizer_info", "/nowhere"):
        refused = web.get(url + path)
        assert refused.status_code == 401, path
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for path in ("/tokenize", "/v1/completions"):
        assert web.post(url + path, json=BODY).status_code == 401
    for good in ("first", "second"):
        assert web.get(f"{url}/v1/models", headers={"authorization": f"Bearer {good}"}).status_code == 200
        assert web.get(f"{url}/", auth=("anybody", good)).status_code == 200
    for bad in ("Bearer firs", "Bearer first2", "Bearer x", "first", "Basic first", "Basic !", b"Bearer caf\xc3\xa9"):
        found = web.get(f"{url}/v1/models", headers={"authorization": bad})
        assert found.status_code == 401, bad


def test_other_pages_may_not_call_unless_they_are_named(plain: Process, door: Open) -> None:
    origin = {"origin": "https://page.example"}
    path = plain.path
    closed = web.get(f"{door(path)}/v1/models", headers=origin)
    assert "access-control-allow-origin" not in closed.headers
    url = door(path, origins=["https://page.example"], keys=["k"])
    asked = web.options(f"{url}/v1/models", headers=origin | {"access-control-request-method": "GET"})
    assert asked.status_code == 200
    named = web.get(f"{url}/v1/models", headers=origin | {"authorization": "Bearer k"})
    assert named.headers["access-control-allow-origin"] == "https://page.example"
    other = web.get(f"{url}/v1/models", headers={"origin": "https://other.example", "authorization": "Bearer k"})
    assert "access-control-allow-origin" not in other.headers


def test_a_full_queue_is_429_with_a_time(toy: Start, door: Open) -> None:
    server = toy("--limit", "queue=2", "--step", 0.02)
    url = door(server.path)
    with web.stream("POST", f"{url}/v1/completions", json={**BODY, "max_tokens": 5000, "n": 2, "stream": True}) as held:
        lines = held.iter_lines()
        next(lines)
        for stream in (False, True):
            busy = web.post(f"{url}/v1/completions", json={**BODY, "stream": stream})
            assert busy.status_code == 429
            assert int(busy.headers["retry-after"]) >= 1
            assert busy.json()["error"]["code"] == "rate_limit_exceeded"
    until(lambda: at_rest(server))
    assert web.post(f"{url}/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(toy: Start, door: Open, stream: bool) -> None:
    server = toy("--step", 0.01)
    url = door(server.path)
    body = json.dumps({**BODY, "max_tokens": 90_000, "stream": stream}).encode()
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port or 0)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        if stream:
            assert connection.recv(200).startswith(b"HTTP/1.1 200")
        with server.client() as client:
            until(lambda: client.stats()["server"]["in_flight"] == 1)
    until(lambda: at_rest(server))


def test_an_error_inside_a_stream_is_an_event(toy: Start, door: Open) -> None:
    url = door(toy("--step", 0.02).path)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(model="demo", prompt=[1], max_tokens=5000, stream=True)
        next(iter(stream))
        broken = web.post(f"{url}/v1/completions", json={"prompt": [BREAK]})
        assert broken.status_code in (500, 503)
        assert "/secret" not in broken.text
        with pytest.raises(openai.APIError):
            list(stream)


def test_without_a_server_it_is_503(door: Open) -> None:
    url = door(short_directory() / "s" / "none.sock")
    assert web.get(f"{url}/health").status_code == 503
    answer = web.post(f"{url}/v1/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert "hybridgen_up 0.0" in web.get(f"{url}/metrics").text


def test_a_server_that_comes_back_is_found_again(toy: Start, door: Open) -> None:
    first = toy()
    url = door(first.path)
    assert web.post(f"{url}/v1/completions", json=BODY).status_code == 200
    first.kill()
    until(lambda: web.post(f"{url}/v1/completions", json=BODY).status_code == 503)
    toy(at=first.directory)
    until(lambda: web.post(f"{url}/v1/completions", json=BODY).status_code == 200)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b'{"prompt": NaN}', 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}", 413),
        (b'{"prompt": [' + b"[]," * 2_000_000 + b"[]]}", 413),
        (b'{"prompt": "' + b"x" * 9_000_000 + b'"}', 413),
    ],
)
def test_bodies_that_are_no_requests(url: str, data: bytes, status: int) -> None:
    begun = time.monotonic()
    answer = web.post(f"{url}/v1/completions", content=data)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert time.monotonic() - begun < HANGS / 2


def test_a_field_that_is_needed_and_a_body_that_is_compressed(url: str) -> None:
    for path, name in (("/tokenize", "prompt"), ("/detokenize", "tokens")):
        answer = web.post(url + path, json={})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    answer = web.post(f"{url}/v1/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert "compressed ('gzip')" in answer.json()["error"]["message"]


def test_a_client_that_goes_away_inside_its_body_is_no_error_of_ours(
    plain: Process, door: Open, caplog: pytest.LogCaptureFixture
) -> None:
    url = door(plain.path)
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    until(lambda: 'path="/v1/completions",status="499"' in web.get(f"{url}/metrics").text)
    assert "failed" not in caplog.text


def test_a_generator_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PING_SECONDS", 0.05)

    class Stopped:
        async def ping(self) -> None:
            await asyncio.Event().wait()

        stats = ping

    door = Door(lambda most: pytest.fail("not asked"), Stopped())  # type: ignore[arg-type]
    status, body = asyncio.run(door.health())
    assert (status, body["reason"]) == (503, "the generator has not answered for 0.05 s")
    assert b"hybridgen_up 0.0" in asyncio.run(app._metrics(door, None)).body  # type: ignore[arg-type]


def test_a_server_that_comes_back_may_have_another_context(text: Text) -> None:
    class Client:
        context = 8

        async def connect(self) -> dict[str, Any]:
            if not self.context:
                raise ServerError("gone")
            return {"max_context": self.context}

    def make(most: int) -> Served:
        return Served(name="demo", text=text, max_context=most, default_tokens=4)

    door = Door(make, Client())  # type: ignore[arg-type]
    asyncio.run(door.served()).ignored.note(["x"])
    for Client.context, expected in ((16, 16), (0, 16)):
        now = asyncio.run(door.served())
        assert (now.max_context, now.ignored.counts["x"]) == (expected, 1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=5,
)
NAMES = (
    "model", "prompt", "messages", "input", "max_tokens", "temperature", "top_p", "n", "stop", "stream", "seed",
    "stream_options", "logprobs", "top_logprobs", "echo", "logit_bias", "tools", "tool_choice", "response_format",
    "top_k", "min_p", "stop_token_ids", "cache_salt", "ignore_eos", "instructions", "text", "reasoning", "tokens",
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]),
    body=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
)
def test_hostile_fields_are_answered_in_form(url: str, path: str, body: dict[str, Any]) -> None:
    if path == "/v1/completions" and body.get("max_tokens") is None:
        body["max_tokens"] = 1
    answer = web.post(url + path, json=body)
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["x", [5, 6]], "n": 2, "seed": 1, "stop": ["a", "b"], "logprobs": 2, "max_tokens": 1},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "max_tokens": 1,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "response_format": {"type": "json_object"},
    },
    "/v1/responses": {"input": "x", "max_output_tokens": 1, "temperature": 0.5, "stream": True},
}


@pytest.mark.parametrize("bodies", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_requests_are_answered_in_form(url: str, bodies: int) -> None:
    """Bytes are changed, left out, doubled or cut. What is still a request is answered, the rest refused."""
    draw = random.Random(0)
    refused = 0
    for _ in range(bodies):
        path = draw.choice(sorted(GOOD))
        data = bytearray(json.dumps({"model": "demo"} | GOOD[path]).encode())
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            change = draw.choice(("byte", "digit", "left out", "doubled", "cut"))
            if change in ("byte", "digit"):
                data[place] = draw.randrange(256) if change == "byte" else draw.choice(b"0123456789-.e")
            elif change == "cut" and draw.random() < 0.1:
                del data[place + 1 :]
            elif change == "left out":
                del data[place : place + draw.randint(1, 5)]
            elif change == "doubled":
                data[place:place] = data[place : place + draw.randint(1, 20)]
            data = data or bytearray(b" ")
        answer = web.post(url + path, content=bytes(data))
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, bytes(data)
        if answer.status_code != 200:
            refused += 1
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, bytes(data)
    assert refused > bodies / 2
    assert web.post(f"{url}/v1/completions", json=BODY).status_code == 200


def test_a_slow_reader_does_not_hold_others_up(toy: Start, door: Open) -> None:
    server = toy("--step", 0.0005)
    url = door(server.path)
    place = urlsplit(url)
    body = json.dumps({**BODY, "max_tokens": 60_000, "stream": True}).encode()
    with socket.create_connection((place.hostname, place.port or 0)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        with server.client() as client:
            until(lambda: client.ping()["steps"] > 1000)  # it reads nothing
        for _ in range(5):
            assert web.post(f"{url}/v1/completions", json=BODY).status_code == 200
    until(lambda: at_rest(server))


def test_paths_are_not_told(url: str) -> None:
    answer = web.get(f"{url}/v1/models")
    assert str(Path.home()) not in answer.text
    assert "/hybridgen" not in answer.text


def test_tokens_that_are_there_together_are_one_event() -> None:
    def token(number: int, *, choice: int = 0, **more: Any) -> TokenEvent:
        return TokenEvent(token_id=number, text=str(number), index=0, choice=choice, **more)

    logprob = TokenLogprob(7, -1.0, ())

    async def rest() -> AsyncIterator[TokenEvent]:
        for number in (1, 2):  # of one step
            yield token(number)
        yield token(3, choice=1)
        await asyncio.sleep(0.05)
        yield token(4, choice=1)
        yield token(5, choice=1, logprob=logprob)
        yield token(6, choice=1, logprob=logprob)
        raise ServerError("it ended")

    async def found() -> list[TokenEvent]:
        came: list[TokenEvent] = []
        with pytest.raises(ServerError, match="it ended"):
            async for event in together(token(0), rest()):
                came.append(event)
        return came

    texts = [(event.choice, event.text) for event in asyncio.run(found())]
    assert texts == [(0, "0"), (0, "12"), (1, "3"), (1, "4"), (1, "5"), (1, "6")]


def test_the_share_of_the_read_ceiling_is_told_where_it_is_measured() -> None:
    engine = {"decode": {"mbu": 0.87, "steps": 3}}
    assert "hybridgen_read_share 0.87" in exposition({"server": {}, "engine": engine}, {}, {}, 0)
    assert "read_share" not in exposition({"server": {}, "engine": {"decode": {"mbu": None}}}, {}, {}, 0)
