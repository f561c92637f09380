"""A raw client for tests, and ways to start and watch server processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import forks
from waiting import HANGS, until

import hybridgen

FAKE = Path(__file__).with_name("fake_server.py")
DEMO = ["--mode", "eager", "--dtype", "float32", "--kv-memory", "32MiB", "--max-batch", "8"]


def environment() -> dict[str, str]:
    """For child processes: the package that these tests use, wherever it is, and one thread for each.

    The threads of torch's pools wait busily for each other, which takes long where processes outnumber cores.
    """
    return os.environ | {"PYTHONPATH": str(Path(hybridgen.__path__[0]).parent), "OMP_NUM_THREADS": "1"}


class Process:
    """A server in a process of its own."""

    def __init__(self, directory: Path, *arguments: str, fake: bool = False, wait: bool = True) -> None:
        self.directory = directory
        self.path = directory / "s" / "x.sock"
        self.ready = directory / "ready.json"
        self.ready.unlink(missing_ok=True)
        self.note("go-on").unlink(missing_ok=True)
        start = [str(FAKE)] if fake else ["-m", "hybridgen", "serve", *DEMO]
        command = [sys.executable, *start, "--socket", str(self.path), "--ready-file", str(self.ready), *arguments]
        self.log_path = directory / "log"
        self._log = self.log_path.open("ab")
        self.popen = forks.Popen(command, stdout=self._log, stderr=self._log, env=environment() | {forks.INSIDE: "1"})
        if wait:
            until(lambda: self.ready.exists() or self.popen.poll() is not None)
            assert self.ready.exists(), self.log()

    @property
    def facts(self) -> dict[str, Any]:
        return dict(json.loads(self.ready.read_text()))

    def log(self) -> str:
        return self.log_path.read_text()

    def client(self, **options: Any) -> hybridgen.Client:
        return hybridgen.Client(self.path, **options)

    def note(self, name: str) -> Path:
        """A file by which the toy tells something: that it is loading, closing or unloaded."""
        return Path(f"{self.ready}.{name}")

    def go_on(self) -> None:
        """End what hangs in the toy."""
        self.note("go-on").touch()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))

    def resident(self) -> int:
        """Bytes of memory that it holds."""
        return int(Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> int:
        """SIGTERM; returns its exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(HANGS)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self._log.close()


def request(key: int, *prompts: Any, **sampling: Any) -> dict[str, Any]:
    """A request as it is sent, for a raw client."""
    stream = sampling.pop("stream", False)
    return {"type": "request", "id": key, "prompts": list(prompts), "sampling": sampling, "stream": stream}


def framed(body: bytes) -> bytes:
    """A frame as it is sent."""
    return struct.pack(">I", len(body)) + body


def at_rest(client: hybridgen.Client) -> bool:
    """Whether nothing is in flight and every page is free."""
    stats = client.stats()
    return stats["engine"]["free_pages"] == stats["engine"]["pages"] and stats["server"]["in_flight"] == 0


def ping(server: Process) -> dict[str, Any]:
    """What a new connection gets for a ping."""
    with server.client() as client:
        return client.ping()


def joins(server: Process) -> bool:
    """Whether a new client is let in."""
    try:
        server.client().close()
    except hybridgen.ServerError:
        return False
    return True


class Raw:
    """A socket that speaks frames, right or wrong ones."""

    def __init__(self, path: Path, *, hello: bool = True, timeout: float = HANGS) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(str(path))
        self.hello: dict[str, Any] = {}
        if hello:
            self.send({"type": "hello", "version": 1})
            self.hello = self.receive()
            assert self.hello["type"] == "hello", self.hello

    def send(self, *messages: Any) -> None:
        """At once."""
        self.socket.sendall(b"".join(framed(json.dumps(message).encode()) for message in messages))

    def send_body(self, body: bytes) -> None:
        self.socket.sendall(framed(body))

    def receive(self) -> dict[str, Any]:
        """The next message; `EOFError` at the end."""
        (length,) = struct.unpack(">I", self._exactly(4))
        return dict(json.loads(self._exactly(length)))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                part = self.socket.recv(count - len(data))
            except ConnectionResetError:
                part = b""
            if not part:
                raise EOFError
            data += part
        return data

    def ended(self) -> bool:
        """Whether the server closes the connection, after whatever else it says."""
        try:
            while True:
                self.receive()
        except EOFError:
            return True

    def close(self) -> None:
        self.socket.close()
