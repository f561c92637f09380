"""The port of the metrics: HTTP, just enough for a scrape, for few at a time and not for long.

Anybody on this machine can connect to a port of localhost, so it must not cost more than that.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

from hybridgen.errors import ServerError
from hybridgen.serving.service.metrics import Metrics

logger = logging.getLogger(__name__)

CONNECTIONS = 4
"""Scrapes at once; whoever comes then is turned away."""
SECONDS = 5.0
"""For a scrape, from its connection to its end."""
HEAD_BYTES = 8192
"""Of a request; what is longer is no scrape."""
_ACCEPTED_AT_ONCE = 4
DESCRIPTORS = 1 + CONNECTIONS + _ACCEPTED_AT_ONCE + 1


class Endpoint:
    """Answers `GET /metrics`."""

    def __init__(self, port: int, metrics: Metrics) -> None:
        """Bind the port; `serve()` answers.

        Raises:
            ServerError: the port is taken or not allowed.
        """
        self._metrics = metrics
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("127.0.0.1", port))
            self._socket.listen(_ACCEPTED_AT_ONCE)
        except OSError as error:
            self._socket.close()
            raise ServerError(f"--metrics {port} cannot be used: {error.strerror}; choose another port") from error
        self.port = int(self._socket.getsockname()[1])

    async def serve(self, accepting: Callable[[], bool]) -> None:
        """Answer from now on.

        Args:
            accepting: whether there are descriptors to spare.
        """
        self._accepting = accepting
        self._server = await asyncio.start_server(
            self._answer, sock=self._socket, limit=HEAD_BYTES, backlog=_ACCEPTED_AT_ONCE
        )

    def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        self._socket.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS or not self._accepting():
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            async with asyncio.timeout(SECONDS):
                writer.write(self._reply(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # not a scrape, or one that went away
        finally:
            self._open.discard(writer)
            with suppress(OSError):
                writer.transport.abort()

    def _reply(self, head: bytes) -> bytes:
        line, *fields = head.decode("latin-1").split("\r\n")
        method, _, rest = line.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path != "/metrics":
            return _reply("404 Not Found", b"only /metrics is here\n")
        if method not in ("GET", "HEAD"):
            return _reply("405 Method Not Allowed", b"only GET\n", "Allow: GET, HEAD\r\n")
        accept = next((field[7:].strip() for field in fields if field[:7].lower() == "accept:"), "")
        try:
            body, kind = self._metrics.text(accept)
        except Exception:
            logger.exception("a scrape failed")
            return _reply("500 Internal Server Error", b"the server's log says why\n")
        return _reply("200 OK", body if method == "GET" else b"", kind=kind)


def _reply(status: str, body: bytes, more: str = "", kind: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    )
    return head.encode("latin-1") + body
