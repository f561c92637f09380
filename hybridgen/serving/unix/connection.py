"""One client's connection, as the server's I/O loop sees it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from hybridgen.errors import HybridgenError, ServerError
from hybridgen.serving.service.generator import Done, Token
from hybridgen.serving.service.service import Member, Service
from hybridgen.serving.unix.address import peer_uid
from hybridgen.serving.unix.frames import FrameError, FrameReader, encode
from hybridgen.serving.unix.messages import MAX_ID, VERSION, done_message, error_to_wire, token_frame
from hybridgen.serving.unix.requests import read_request

logger = logging.getLogger(__name__)


class Host(Protocol):
    """The server that a connection belongs to."""

    service: Service
    shut_down: Callable[[str], None]
    """Called when a client tells the server to end, with words for the log."""

    def hang_up(self, connection: Connection) -> None:
        """A connection was told why it ends, and is open only until that is read."""

    def closed(self, connection: Connection) -> None:
        """A connection has no descriptor any more. Once is enough."""


class Connection(asyncio.Protocol):
    """Reads messages, answers what needs no engine, and hands the rest to the service.

    Whatever a client does wrong ends at most its own connection.
    """

    def __init__(self, host: Host) -> None:
        limits = host.service.limits
        self._host = host
        self._service = host.service
        self._limits = limits
        self._member: Member | None = None
        """What the service knows of it, while it may ask for something."""
        self._reader = FrameReader(limits.frame, elements=limits.elements, containers=limits.containers)
        self._transport: asyncio.Transport | None = None
        self._greeted = False
        self._last_id = -1
        self._half_since: float | None = time.monotonic()
        self._taken = 0
        self._taken_since = time.monotonic()
        self._sent = 0
        # Tokens are written by the generator thread itself, because waking the I/O loop for each step would have the
        # two threads wait for each other. What it cannot write at once is carried, and everything else waits behind.
        self._loop = asyncio.get_running_loop()
        self._writing = threading.Lock()
        self._descriptor = -1
        self._blocked = False
        self._carried = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected: only this user's may stay."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a stream transport is needed")
        self._transport = transport
        connection: socket.socket = transport.get_extra_info("socket")
        try:
            uid = peer_uid(connection)
        except OSError as error:
            logger.warning("a client was refused: its user is not known (%s)", error.strerror)
            self._hang_up()
            return
        if uid != os.getuid():
            logger.warning("a client of user %d was refused", uid)
            self.refuse(ServerError("this server belongs to another user; start one of your own", "user"))
        else:
            try:
                self._member = self._service.join(self)
            except ServerError as error:
                self.refuse(error)
                return
            transport.set_write_buffer_limits(0)  # pause_writing() and resume_writing() tell of every waiting byte
            self._descriptor = connection.fileno()

    def pause_writing(self) -> None:
        """Something waits to be written."""
        self._blocked = True

    def resume_writing(self) -> None:
        """Nothing does any more."""
        self._blocked = False

    def eof_received(self) -> None:
        """The client closed its side, or all: it is gone, whatever it has not read."""
        self._leave()
        self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """The client went away, or was sent away."""
        self._stop_tokens()  # before the descriptor is closed, and may be that of another client
        self._transport = None
        self._leave()
        self._host.closed(self)

    def _leave(self) -> None:
        """What the client asked for is no longer wanted. Once is enough."""
        if self._member is not None:
            self._service.leave(self._member)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        try:
            messages = self._reader.feed_sized(data)
        except FrameError as error:
            self.refuse(ServerError(str(error), "protocol"))
            return
        if not self._reader.partial:
            self._half_since = None if self._greeted or messages else self._half_since
        elif messages or self._half_since is None:
            self._half_since = time.monotonic()
        for message, size in messages:
            if self._member is None or self._transport is None or self._transport.is_closing():
                return
            self._receive(self._member, message, size)

    def _receive(self, member: Member, message: dict[str, Any], size: int) -> None:
        key = message.get("id")
        try:
            self._dispatch(member, message, key, size)
        except HybridgenError as error:
            if key is None or (isinstance(error, ServerError) and error.code in ("protocol", "version")):
                self.refuse(error)
            else:
                self._send_error(key, error)
        except Exception as error:
            logger.exception("a message could not be handled")
            self.refuse(error)

    def _dispatch(self, member: Member, message: dict[str, Any], key: Any, size: int) -> None:
        kind = message.get("type")
        if not self._greeted:
            self._greet(kind, message.get("version"))
            return
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key <= MAX_ID:
            raise ServerError(f"a message needs an id, an integer from 0 to {MAX_ID}", "protocol")
        if kind == "cancel":
            self._service.cancel(member, key)
            return
        if key <= self._last_id:
            raise ServerError(f"the id {key} is not above the one before it, {self._last_id}; count up", "protocol")
        self._last_id = key
        if kind == "request":
            self._request(member, key, message, size)
        elif kind == "ping":
            self._send({"type": "ping", "id": key, **self._service.health()})
        elif kind == "stats":
            self._service.ask_stats(member, key)
        elif kind == "shutdown":
            self._send({"type": "shutdown", "id": key})
            self._host.shut_down("a client asked for it")
        else:
            known = "request, cancel, stats, ping, shutdown"
            raise ServerError(f"a message has no type that a server knows; send one of: {known}", "protocol")

    def _request(self, member: Member, key: int, message: dict[str, Any], size: int) -> None:
        try:
            self._service.check_open()
            self._service.submit(member, key, read_request(message, size, self._limits))
        except HybridgenError as error:
            self._service.refused(error)
            raise

    def _greet(self, kind: Any, version: Any) -> None:
        if kind != "hello":
            raise ServerError('the first message must be {"type": "hello", "version": 1}', "protocol")
        if isinstance(version, bool) or version != VERSION:
            raise ServerError(
                f"this server speaks version {VERSION} of the protocol; use a client that does", "version"
            )
        self._greeted = True
        limits = self._limits.as_dict()
        self._send({"type": "hello", "version": VERSION, **self._service.description, "limits": limits})

    # From the service.

    def done(self, done: Done) -> None:
        """The end of a completion."""
        self._send(done_message(done.key.id, done.event, stream=done.stream, last=done.last, brief=done.brief))

    def failed(self, key: int, error: BaseException) -> None:
        """The end of a request, or of a question for statistics."""
        self._send_error(key, error)

    def told(self, key: int, engine: dict[str, Any], server: dict[str, Any]) -> None:
        """Statistics."""
        self._send({"type": "stats", "id": key, "engine": engine, "server": server})

    def tokens(self, tokens: list[Token]) -> None:
        """Send tokens, from the generator's thread."""
        frames = [(token.id, token_frame(token.id, token.event, token.prompt_ids)) for token in tokens]
        if not self._write_tokens(frames):
            try:
                self._loop.call_soon_threadsafe(self._write, b"")
            except RuntimeError:  # the loop has ended, and with it the connection
                return

    def _send(self, message: dict[str, Any]) -> None:
        self._write(encode(message))

    def _send_error(self, key: int | None, error: BaseException) -> None:
        """Send an error message for a request, or for the connection."""
        self._send({"type": "error", "id": key, **error_to_wire(error)})

    def _write(self, frames: bytes) -> None:
        """Send frames; a client that leaves too many unread is cut off instead."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size() > self._limits.unsent:
            self._cut("has too much unread")
            return
        with self._writing:
            frames = bytes(self._carried) + frames
            self._carried.clear()
            self._sent += len(frames)
            transport.write(frames)

    def _write_tokens(self, tokens: list[tuple[int, bytes]]) -> bool:
        """Send frames, each with its request's id; False when `_write(b"")` must be called to go on."""
        with self._writing:
            if self._descriptor < 0 or self._member is None:
                return True
            # A request that was answered is no longer in flight before its answer is written, which takes the lock.
            frames = b"".join([frame for key, frame in tokens if key in self._member.requests])
            written = 0
            if not self._blocked and not self._carried:
                try:
                    written = os.write(self._descriptor, frames)
                except BlockingIOError:
                    written = 0
                except OSError:  # the client is gone, which the I/O loop sees as well
                    return True
            if written == len(frames):
                return True
            asked = bool(self._carried)
            self._carried += frames[written:]
            return asked

    def _stop_tokens(self) -> None:
        with self._writing:
            self._descriptor = -1
            self._carried.clear()

    def refuse(self, error: BaseException) -> None:
        """Answer that the connection cannot go on, and close it."""
        self._send_error(None, error)
        self._hang_up()

    def finish(self) -> None:
        """Close it once what was written is read."""
        self._stop_tokens()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close it now."""
        self._stop_tokens()
        if self._transport is not None:
            self._transport.abort()

    def _hang_up(self) -> None:
        # What it asked for ends now, not when it has read the answer.
        self._leave()
        if self._transport is None:
            return
        self._host.hang_up(self)
        self._loop.call_later(self._limits.write_seconds, self._transport.abort)
        self.finish()

    def _cut(self, why: str) -> None:
        number = 0 if self._member is None else self._member.number
        logger.warning("client %d was cut off: it %s", number, why)
        self._service.count("cut_off")
        self._leave()
        self.abort()

    def shift(self, seconds: float) -> None:
        """Leave out a time in which the whole process stood still."""
        self._taken_since += seconds
        if self._half_since is not None:
            self._half_since += seconds

    def check(self, now: float) -> None:
        """Look at the clocks; called every now and then."""
        limits = self._limits
        transport = self._transport
        if transport is None:
            return
        waiting = transport.get_write_buffer_size()
        taken = self._sent - waiting
        if taken != self._taken or not waiting:
            self._taken, self._taken_since = taken, now
        elif now - self._taken_since > limits.write_seconds:
            self._cut(f"has read nothing for {limits.write_seconds:g} s")
            return
        if (
            self._half_since is not None
            and now - self._half_since > limits.frame_seconds
            and not transport.is_closing()
        ):
            what = "a frame was not whole" if self._greeted else "no hello came"
            self.refuse(ServerError(f"{what} after {limits.frame_seconds:g} s; the connection is closed", "timeout"))
