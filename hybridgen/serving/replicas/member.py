"""One replica as its parent sees it: started, connected to, started again when it died, ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hybridgen import errors
from hybridgen.errors import HybridgenError, ServerError
from hybridgen.serving.client.client import Client
from hybridgen.serving.unix.messages import CODES

_COUNTS = ("requests", "tokens", "fallbacks", "compiled", "late_compiles")
"""Statistics that only grow."""
_PRESENT = ("running", "waiting", "pages", "free_pages")
"""Statistics of the moment that can be added up."""
END_SECONDS = 10.0
"""For a process to end once it was told to; then it is killed."""
LOG_LINES = 5
"""Of what a process that died had printed, in the error."""


class Member:
    """A generator process, and the connection to it. Threads may share it."""

    def __init__(self, number: int, directory: Path, order: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Start the process; `client()` waits until it is ready.

        Args:
            number: its place among the replicas, from 0.
            directory: where its socket and its log lie.
            order: what `child` reads: model, fields, queue.
            environment: variables that it has besides this process's.
        """
        self.number = number
        self.restarts = -1
        """How often it was started again."""
        self._path = directory / f"{number}.sock"
        self._log = directory / f"{number}.log"
        self._order = {**order, "socket": str(self._path)}
        self._environment = {**os.environ, **environment}
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._closed = False
        self._before: dict[str, Any] = {}
        """What its processes had counted that died, by their last reports."""
        self._last: dict[str, Any] = {}
        """The last report of the process that runs."""
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def _start(self) -> subprocess.Popen[str]:
        self.restarts += 1
        command = [
            sys.executable,
            "-c",
            "import sys; from hybridgen.serving.replicas.child import main; sys.exit(main())",
        ]
        with self._log.open("w") as log:
            # A session of its own: Ctrl-C is for the parent, which ends the replicas itself.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log if self.number else None,  # warnings are the same from all; they are seen once
                text=True,
                env=self._environment,
                start_new_session=True,
            )
        if process.stdin is not None:
            with suppress(OSError):  # it is dead already, which `_wait` tells
                process.stdin.write(json.dumps(self._order) + "\n")
                process.stdin.flush()
        return process

    def client(self) -> Client:
        """The connection to a process that runs; it is started again if it has died.

        Raises:
            HybridgenError: it could not be started, with what it said.
        """
        with self._lock:
            if self._closed:
                raise ServerError("these replicas are closed; make new ones")
            if self._client is not None and self._process.poll() is None:
                return self._client
            if self._client is not None:  # it ran before
                self._drop()
                self._before, self._last = added(self._before, counts(self._last)), {}
                self._process = self._start()
            self._client = self._wait()
            return self._client

    def _wait(self) -> Client:
        """Wait until the process listens, and connect."""
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if line:
            answer = json.loads(line)
            if "error" not in answer:
                return Client(self._path, patience=END_SECONDS)
            kind, message = answer["error"]["kind"], answer["error"]["message"]
            found = CODES.get(kind) or getattr(errors, kind, None)
            plain = found if isinstance(found, type) and issubclass(found, HybridgenError) else ServerError
            raise plain(message)
        status = self._process.wait()
        raise ServerError(f"replica {self.number} ended with status {status} before it was ready{self.last_words()}")

    def report(self) -> None:
        """Ask for the statistics, so that they are known should the process die; nothing while it is being started."""
        client = self._client
        if client is not None and self._process.poll() is None:
            with suppress(HybridgenError):
                self._last = client.stats()

    def stats(self) -> dict[str, Any]:
        """The last report, whose counts (`engine`) have those of the processes that ran here before."""
        last = self._last
        return {**last, "engine": {**last.get("engine", {}), **added(self._before, counts(last))}}

    def last_words(self) -> str:
        """The end of what the process printed, to be appended to an error."""
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
        except OSError:
            return ""
        return ": " + " | ".join(lines) if lines else ""

    def dead(self) -> bool:
        """Whether the process has ended; after a connection was lost, wait a moment for it."""
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was buffered for a dead process
                    pipe.close()

    def kill(self) -> None:
        """End the process at once: it does not answer any more."""
        self._process.kill()
        self._process.wait()

    def tell_end(self) -> None:
        """Tell the process to end, without waiting for it."""
        self._closed = True
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def close(self) -> None:
        """End the process. Twice is fine."""
        self.tell_end()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._lock:  # a thread that waited for it to be ready has been told by now
            self._drop()


def counts(stats: Mapping[str, Any], *, present: bool = False) -> dict[str, Any]:
    """What can be added up of `Client.stats()`; `present`: what is of the moment too."""
    engine = stats.get("engine", {})
    return {name: engine[name] for name in (*_COUNTS, *(_PRESENT if present else ())) if name in engine}


def added(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two sets of counts as one, those inside others included."""
    total = dict(first)
    for name, value in second.items():
        if isinstance(value, Mapping):
            total[name] = added(total.get(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value
    return total
