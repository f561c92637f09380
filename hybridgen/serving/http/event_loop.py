"""The door's event loop, which brings each request far before it looks at many others."""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import sys

AT_ONCE = 8
"""Connections that are read before what they brought goes on."""


if sys.platform == "linux":

    class FewAtOnce(selectors.EpollSelector):
        """Tells at most so many events at a time. The system tells the others first when it is asked again."""

        def __init__(self, most: int) -> None:
            super().__init__()
            self._most = most
            self._epoll = select.epoll.fromfd(os.dup(self.fileno()))

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            """See `selectors.BaseSelector.select`."""
            if timeout is not None:
                timeout = max(0.0, timeout)
            keys, found = self.get_map(), []
            try:
                told = self._epoll.poll(timeout, self._most)
            except InterruptedError:
                return []
            for descriptor, events in told:
                key = keys.get(descriptor)
                if key is not None:
                    ready = selectors.EVENT_WRITE * bool(events & ~select.EPOLLIN)
                    ready |= selectors.EVENT_READ * bool(events & ~select.EPOLLOUT)
                    found.append((key, ready & key.events))
            return found

        def close(self) -> None:
            """End it."""
            self._epoll.close()
            super().close()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop that reads few connections at a time, on Linux; elsewhere asyncio's own.

    A request takes several turns of the loop until it is with the server. asyncio reads all connections that have
    something in one turn. Of hundreds that ask at the same time, the first would then reach the server after most of
    the work for the last was done, and the device would have nothing to do until then.
    """
    return asyncio.SelectorEventLoop(FewAtOnce(AT_ONCE) if sys.platform == "linux" else None)
