"""Locks of files, held by a process until it lets go or dies."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


class FileLock:
    """One lock on one file, which stays when the lock is released: deleting it would let two holders in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, *, shared: bool = False, wait_seconds: float = 0.0) -> bool:
        """Take it; returns whether that was possible within the time.

        Raises:
            OSError: the file cannot be made, or the file system has no locks.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        end = time.monotonic() + wait_seconds
        try:
            while True:
                try:
                    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                    self._descriptor, descriptor = descriptor, -1
                    return True
                except BlockingIOError:
                    if time.monotonic() >= end:
                        return False
                    time.sleep(_POLL_SECONDS)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def release(self) -> None:
        """Let go; nothing happens if it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child has the descriptor, too
            os.close(descriptor)


@contextmanager
def locked(path: Path, *, shared: bool, wait_seconds: float) -> Iterator[bool]:
    """Hold a lock meanwhile; False where it could not be taken, as on a file system that is read-only."""
    lock = FileLock(path)
    try:
        held = lock.take(shared=shared, wait_seconds=wait_seconds)
    except OSError as error:
        logger.debug("no lock on %s: %s", path, error)
        held = False
    try:
        yield held
    finally:
        lock.release()
