"""`hybridgen serve --http` and `hybridgen http`: processes that start and end together."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import forks
import httpx2 as httpx
import pytest
from places import short_directory
from waiting import HANGS, until
from web import web
from wire import Process, environment

from hybridgen.cli.main import main
from hybridgen.errors import ConfigError
from hybridgen.serving.http.child import HttpChild
from hybridgen.serving.http.options import HttpOptions, public_name
from hybridgen.serving.http.run import check_template, listen
from hybridgen.serving.http.text import Text


def alive(url: str) -> bool:
    try:
        return web.get(f"{url}/health").status_code in (200, 503)
    except httpx.TransportError:
        return False


def child_of(process: Process) -> int:
    """The pid of the door."""
    found = subprocess.run(
        ["pgrep", "-P", str(process.popen.pid), "-f", "hybridgen http"], capture_output=True, text=True
    )
    return int(found.stdout.split()[0])


def test_it_speaks_http_and_ends_with_the_server(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    options = ["--http", "127.0.0.1:0", "--chat-template", str(template), "--api-key-file", str(keys), "--name", "toy"]
    server = Process(short_directory(), *options)
    try:
        url = server.facts["http"]
        with httpx.Client(base_url=url, headers={"authorization": "Bearer two"}, timeout=HANGS, verify=False) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "toy"
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "import os"}], "max_tokens": 3}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            assert server.end() == 0
        assert not alive(url)
        assert "Traceback" not in server.log()
    finally:
        server.kill()


def test_either_one_that_is_killed_takes_the_other_along() -> None:
    first = Process(short_directory(), "--http", "127.0.0.1:0")
    try:
        os.kill(child_of(first), signal.SIGKILL)
        assert first.popen.wait(HANGS) == 1
        assert "ended: the HTTP door ended with status -9" in first.log()
    finally:
        first.kill()
    second = Process(short_directory(), "--http", "127.0.0.1:0")
    url = second.facts["http"]
    assert alive(url)
    second.kill()
    until(lambda: not alive(url))


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_told_before_the_model_loads(door: Any) -> None:
    taken = door(short_directory() / "none.sock").rpartition("/")[2]
    command = [sys.executable, "-m", "hybridgen", "serve", "/no/such/model", "--http", taken]
    command += ["--socket", str(short_directory() / "s")]
    done = forks.run(command, capture_output=True, text=True, env=environment(), timeout=HANGS)
    assert done.returncode == 2
    assert f"cannot listen on {taken}" in done.stderr


def test_beside_a_server_that_runs(demo: Process) -> None:
    command = [sys.executable, "-m", "hybridgen", "http", "--socket", str(demo.path), "--listen", "127.0.0.1:0"]
    door = forks.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        assert door.stderr is not None
        line = door.stderr.readline()
        url = line.split()[-1].removesuffix("/v1")
        answer = web.post(f"{url}/v1/completions", json={"prompt": "import os", "max_tokens": 2})
        assert answer.json()["model"] == "demo"
        door.send_signal(signal.SIGTERM)
        assert door.wait(HANGS) in (0, -signal.SIGTERM)
    finally:
        door.kill()
        door.wait()


def test_without_a_server_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["http", "--socket", str(short_directory() / "none.sock")]) == 2
    assert "hybridgen serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"listen": "0.0.0.0:80"}, "lets others in"),
        ({"listen": "example.org:80"}, "lets others in"),
        ({"listen": "127.0.0.1:x"}, "give HOST:PORT"),
        ({"listen": "127.0.0.1:99999"}, "give HOST:PORT"),
        ({"default_tokens": 0}, "give 1 or more"),
    ],
)
def test_bad_options(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HttpOptions(**fields)


def test_addresses_and_names(tmp_path: Path) -> None:
    assert HttpOptions(listen="8000").address() == ("127.0.0.1", 8000)
    assert HttpOptions(listen=":0").address() == ("127.0.0.1", 0)
    assert HttpOptions(listen="[::1]:80").address() == ("::1", 80)
    assert HttpOptions(listen="localhost:80").address() == ("localhost", 80)
    assert public_name("org/model") == "org/model"
    assert public_name(str(tmp_path / "deep" / "model")) == "model"


def test_templates_that_are_none(tmp_path: Path, text: Text) -> None:
    path = tmp_path / "empty.jinja"
    path.write_text(" \n")
    with pytest.raises(ConfigError, match=r"empty.jinja is empty"):
        HttpOptions(chat_template=path).template()
    broken = copy.copy(text.tokenizer)
    for template, good in (("{{ raise_exception('not this one') }}", True), ("{% for m in %}", False)):
        broken.chat_template = template
        with nullcontext() if good else pytest.raises(ConfigError, match=r"--chat-template: .*TemplateSyntaxError"):
            check_template(Text(broken))


def test_files_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a\n b \n\n")
    assert HttpOptions(listen="0.0.0.0:80", api_key_file=path).keys() == ["a", "b"]
    path.write_text("a\n# for me\n")
    with pytest.raises(ConfigError, match=r"line 2 of .* has a space"):
        HttpOptions(api_key_file=path).keys()
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no API key"):
        HttpOptions(api_key_file=path).keys()
    with pytest.raises(ConfigError, match="cannot be read"):
        HttpOptions(api_key_file=tmp_path / "none").keys()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["http", "--socket", "/none"]) == 2
    assert "pip install 'hybridgen[http]'" in capsys.readouterr().err


def test_the_lines_of_a_child_are_json(demo: Process) -> None:
    command = [sys.executable, "-m", "hybridgen", "http", "--child", "--socket", str(demo.path), "--listen", ":0"]
    child = forks.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert child.stdout is not None
        assert child.stdin is not None
        url = json.loads(child.stdout.readline())["url"]
        assert json.loads(child.stdout.readline()) == {"ready": True}
        until(lambda: alive(url))
        child.stdin.close()
        assert child.wait(HANGS) == 0
    finally:
        child.kill()
        child.wait()


def test_a_door_that_ends_before_it_answers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its address at once; that it cannot read the tokenizer is found while the model loads."""
    monkeypatch.setattr(subprocess, "Popen", forks.Popen)
    found: list[ConfigError] = []
    door = HttpChild(str(tmp_path / "nowhere"), HttpOptions(listen="127.0.0.1:0"), tmp_path / "socket")
    try:
        assert door.url.startswith("http://127.0.0.1:")
        door.watch(lambda why: found.append(ConfigError(why)), found.append)
        with pytest.raises(ConfigError, match=r"did not start \(exit status 2\)"):
            door.wait()
        until(lambda: bool(found))
        assert "did not start" in str(found[0])
    finally:
        door.close()
