"""A client's connection, shared by the threads that use the client."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hybridgen.errors import HybridgenError, ServerError, shown
from hybridgen.serving.unix.address import connect
from hybridgen.serving.unix.frames import FrameError, FrameReader, encode
from hybridgen.serving.unix.messages import VERSION, error_from_wire

MAX_FRAME = 2**30
"""Bytes of the longest message that a client takes; a completion is as long as its tokens and log-probabilities."""
HELLO_SECONDS = 10.0
SEND_SECONDS = 60
_CHUNK = 2**16


class Mailbox:
    """Messages for one call that nobody has taken yet."""

    __slots__ = ("messages",)

    def __init__(self) -> None:
        self.messages: deque[dict[str, Any]] = deque()


def hello_message() -> dict[str, Any]:
    """The first message of a client."""
    return {"type": "hello", "version": VERSION}


def check_hello(message: dict[str, Any]) -> dict[str, Any]:
    """The server's answer to it.

    Raises:
        HybridgenError: it refused, or speaks another version.
    """
    if message.get("type") == "error":
        raise error_from_wire(message)
    if message.get("type") != "hello" or message.get("version") != VERSION:
        raise ServerError(
            f"the server said {shown(message.get('type'))} of version {shown(message.get('version'))} where a hello of "
            f"version {VERSION} was expected; use the same hybridgen on both sides"
        )
    return message


class Link:
    """Sends messages, and reads those of all callers: whoever waits reads, and hands the others theirs."""

    def __init__(self, path: str | os.PathLike[str] | None, patience: float = 0.0) -> None:
        """Connect and exchange hellos.

        Args:
            patience: seconds for which it is tried again while nobody listens there.

        Raises:
            ServerError: nobody answers there, or refuses.
        """
        self.pid = os.getpid()
        self._socket: socket.socket = connect(path, patience)
        # Seconds and microseconds: a server that takes nothing for so long hangs.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        self._reader = FrameReader(MAX_FRAME)
        self._changed = threading.Condition()
        self._reading = False
        self._boxes: dict[int, Mailbox] = {}
        self._error: HybridgenError | None = None
        self._sending = threading.Lock()
        self._next_id = 0
        try:
            self._poll = select.poll()
            self._poll.register(self._socket, select.POLLIN)
            self._write(encode(hello_message()))
            self.hello = check_hello(self._hello())
        except BaseException:
            self._socket.close()
            raise

    def _hello(self) -> dict[str, Any]:
        deadline = time.monotonic() + HELLO_SECONDS
        while True:
            messages = self._read(max(0.0, deadline - time.monotonic()))
            if messages:
                return messages[0]
            if time.monotonic() > deadline:
                raise ServerError(f"the server did not say hello within {HELLO_SECONDS:g} s; does it hang?")

    @property
    def closed(self) -> bool:
        """Whether it can no longer be used."""
        return self._error is not None

    @property
    def foreign(self) -> bool:
        """Whether it belongs to the process that this one was forked from, and is not to be disturbed."""
        return self.pid != os.getpid()

    def post(self, message: dict[str, Any], box: Mailbox, begun: Callable[[int], object] = lambda key: None) -> int:
        """Send a message under a new id, whose answers go into the mailbox.

        Args:
            begun: called with the id just before the message is sent, so that a Ctrl-C cannot come in between.

        Raises:
            ServerError: the connection has ended.
            PromptError: see `encode`.
        """
        with self._sending:
            self._check()
            key, self._next_id = self._next_id, self._next_id + 1
            data = encode({**message, "id": key})
            with self._changed:
                self._boxes[key] = box
            begun(key)
            self._write(data)
        return key

    def cancel(self, key: int) -> None:
        """Ask for the end of a request; it is answered as usual."""
        if self.foreign:
            return
        with self._sending:
            self._check()
            self._write(encode({"type": "cancel", "id": key}))

    def forget(self, key: int) -> None:
        """Drop what still comes for an id."""
        with self._changed:
            self._boxes.pop(key, None)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Ids that wait for something."""
        with self._changed:
            return tuple(self._boxes)

    def receive(self, box: Mailbox, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message in a mailbox; None when none came within `timeout` seconds.

        Raises:
            ServerError: the connection has ended.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with self._changed:
                if box.messages:
                    return box.messages.popleft()
                self._check()
                if self._reading:
                    if left == 0.0 or not self._changed.wait(left):
                        return None
                    continue
                if left == 0.0 and timeout != 0.0:
                    return None
                self._reading = True
            try:
                messages = self._read(left)
            finally:
                with self._changed:
                    self._reading = False
                    self._changed.notify_all()
            if not messages and timeout == 0.0:
                return None

    def _read(self, timeout: float | None) -> list[dict[str, Any]]:
        """Wait for bytes, and hand out what they complete. A Ctrl-C while waiting does no harm."""
        if not self._poll.poll(None if timeout is None else timeout * 1e3):
            return []
        try:
            data = self._socket.recv(_CHUNK)
            messages = self._reader.feed(data)
            for message in messages:
                self._hand_out(message)
        except (OSError, FrameError) as error:
            raise self.fail(f"the connection to the server failed: {error}") from None
        except BaseException:
            self.fail("a call was interrupted in the middle of a message")
            raise
        if not data:
            raise self.fail("the server closed the connection")
        return messages

    def _hand_out(self, message: dict[str, Any]) -> None:
        with self._changed:
            if message.get("type") == "error" and message.get("id") is None:
                self._error = self._error or error_from_wire(message)
                return
            box = self._boxes.get(message.get("id", -1))
            if box is not None:
                box.messages.append(message)

    def _write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            self.catch_up()
            raise self.fail(f"the connection to the server failed: {error.strerror}") from None
        except BaseException:
            self.fail("a call was interrupted in the middle of a message")
            raise

    def catch_up(self) -> None:
        """Read what has come, if nobody is reading: whether the connection ended shows there, and why."""
        with self._changed:
            if self._reading:
                return
            self._reading = True
        try:
            while self._error is None and self._read(0.0):
                pass
        except HybridgenError:
            return
        finally:
            with self._changed:
                self._reading = False
                self._changed.notify_all()

    def fail(self, why: str) -> HybridgenError:
        """Mark the connection as ended; returns the error that everybody gets, the first one."""
        with self._changed:
            if self._error is None:
                self._error = ServerError(f"{why}; what was in flight is lost, and the next call connects again")
            self._changed.notify_all()
            error = self._error
        if not self.foreign:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # tells the server, and wakes a thread that reads
        return error

    def _check(self) -> None:
        if self.foreign:
            raise ServerError("this call was begun before the process was forked; only the one that began it goes on")
        error = self._error
        if isinstance(error, ServerError):
            raise ServerError(str(error), error.code)
        if error is not None:
            raise type(error)(str(error))

    def close(self) -> None:
        """End the connection; the server cancels what is in flight. In a forked process, only its copy of it."""
        if not self.foreign:
            self.fail("this client was closed")
        self._socket.close()
