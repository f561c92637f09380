"""Open files: whether there are enough of them, and what is done when they run out anyway."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hybridgen.errors import ConfigError

logger = logging.getLogger(__name__)

ENGINE = 64
"""Descriptors that an engine opens, about: the device's, caches, files that are read for a moment."""
RESERVE = 8
"""Descriptors that are kept for the owner's clients."""
LOG_SECONDS = 60.0
"""Errors of one kind are logged once in this time."""
_OUT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def require_descriptors(needed: int) -> None:
    """Check that the process may open that many files more than it has, and raise its limit if it may.

    Raises:
        ConfigError: it may not.
    """
    try:
        import resource
    except ImportError:  # not everywhere
        return
    open_now = _count_open()
    total = needed + open_now + ENGINE + RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= total:
        return
    if hard == resource.RLIM_INFINITY or hard >= total:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (total, hard))
            logger.info("raised the limit of open files from %d to %d", soft, total)
            return
    raise ConfigError(
        f"the server may need {total} open files ({needed} of them for clients and sockets), and the system allows "
        f"{soft}; lower --limit-clients, or raise the limit (ulimit -n {total})"
    )


def _count_open() -> int:
    for directory in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(os.listdir(directory))
    return 32


class Reserve:
    """Descriptors that are held so that they can be given up when there are no others."""

    def __init__(self, size: int = RESERVE) -> None:
        self._size = size
        self._held: list[int] = []
        self.fill()

    @property
    def full(self) -> bool:
        """Whether it has not been spent."""
        return bool(self._held)

    def fill(self) -> None:
        """Take them, when twice as many are free."""
        if self._held:
            return
        taken: list[int] = []
        try:
            for _ in range(2 * self._size):
                taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self._held = taken
            self.spend()
            return
        self._held, rest = taken[: self._size], taken[self._size :]
        for descriptor in rest:
            os.close(descriptor)

    def spend(self) -> None:
        """Give them up."""
        held, self._held = self._held, []
        for descriptor in held:
            os.close(descriptor)


class AcceptErrors:
    """A handler of an event loop's errors: connections that cannot be accepted are logged once a minute."""

    def __init__(self, out: Callable[[], None], now: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            out: called when there are no descriptors left.
        """
        self._out = out
        self._now = now
        self._said: float | None = None
        self._unsaid = 0

    def __call__(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        accepting = "socket" in context or "accept" in str(context.get("message", ""))
        if not (isinstance(error, OSError) and accepting):
            loop.default_exception_handler(context)
            return
        if error.errno in _OUT:
            self._out()
        now = self._now()
        if self._said is not None and now - self._said < LOG_SECONDS:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} times more since the last time this was said)" if self._unsaid else ""
        logger.error("a connection could not be accepted: %s%s", error.strerror or error, more)
        self._said, self._unsaid = now, 0
