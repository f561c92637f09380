"""The server's socket: it accepts connections on a leased path, and looks after them. One thread, an asyncio loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from hybridgen.serving.service.service import Service
from hybridgen.serving.unix.address import BACKLOG, Lease
from hybridgen.serving.unix.connection import Connection

ACCEPTED_AT_ONCE = 8
"""Connections that are accepted before the first of them is looked at."""
HANGING_UP = 8
"""Connections that may be open only to read why they were ended; the oldest one gives way to the next."""
DESCRIPTORS = ACCEPTED_AT_ONCE + 1 + HANGING_UP + 2
"""Descriptors that it needs besides one for each client: its own socket and lock too."""


class UnixServer:
    """Lets clients in, each with a `Connection` to the service."""

    def __init__(self, lease: Lease, service: Service, shut_down: Callable[[str], None]) -> None:
        """
        Args:
            shut_down: called when a client tells the server to end, with words for the log.
        """
        self.service = service
        self.shut_down = shut_down
        self._lease = lease
        self._server: asyncio.Server | None = None
        self._listener: socket.socket | None = None
        self._ended = False
        self._connections: dict[Connection, None] = {}
        self._hanging: dict[Connection, None] = {}

    async def listen(self) -> bool:
        """Begin to accept; False when it was told to stop meanwhile.

        Raises:
            ServerError: the socket cannot be made.
        """
        if self._ended:
            return False
        listener = self._lease.listen()
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(self._connection, sock=listener, backlog=ACCEPTED_AT_ONCE)
        # asyncio accepts as many at once as may wait. Clients that come all together are to wait, and not to fail.
        listener.listen(BACKLOG)
        self._server = server
        if self._ended:
            self.stop()
            return False
        return True

    def _connection(self) -> Connection:
        connection = Connection(self)
        self._connections[connection] = None
        return connection

    def hang_up(self, connection: Connection) -> None:
        """See `Host`."""
        self._hanging[connection] = None
        while len(self._hanging) > HANGING_UP:
            oldest = next(iter(self._hanging))
            del self._hanging[oldest]
            oldest.abort()

    def closed(self, connection: Connection) -> None:
        """See `Host`."""
        self._connections.pop(connection, None)
        self._hanging.pop(connection, None)

    def stop(self) -> None:
        """Let nobody in any more, and take the socket's file away."""
        self._ended = True
        if self._server is not None:
            self._server.close()
        self._lease.unlink()

    @property
    def empty(self) -> bool:
        """Whether no connection is left."""
        return not self._connections

    def check(self, now: float) -> None:
        """Look at the connections' clocks; called every now and then."""
        for connection in list(self._connections):
            connection.check(now)

    def thaw(self, gap: float) -> None:
        """The process stood still: nobody is to blame for that time."""
        for connection in self._connections:
            connection.shift(gap)

    def finish(self) -> None:
        """Close each connection once what was written to it is read."""
        for connection in list(self._connections):
            connection.finish()

    def abort(self) -> None:
        """Close all connections now."""
        for connection in list(self._connections):
            connection.abort()
