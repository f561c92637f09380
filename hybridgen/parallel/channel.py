"""Bytes from rank 0 to the other ranks: a ring in memory that they share.

Rank 0 alone writes messages; each of the others reads all of them. A byte in a rank's pipe says that a message is
there, so that nobody spins while nothing is to be done, and the pipe's end tells a rank that rank 0 is gone.

| word (int64) of each rank | what |
|---|---|
| 0 | bytes that it has read |
| 1 | its pulse: changes while the process lives and is not stopped |
| 2, 3 | its progress: see `Progress` |
| 4 | calls that it has begun to serve, where its program makes them |

Behind the words comes the ring: messages one behind the other, each with its length before it, padded to words. A
length of -1 says that the next message is at the beginning.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hybridgen.errors import DeviceError
from hybridgen.parallel.progress import Progress

_WORD = 8
_READ, _PULSE, _PROGRESS, _CALLS = 0, 1, slice(2, 4), 4
_WORDS = 5
"""Of each rank."""
_WAIT_SECONDS = 0.0005


class Channel:
    """The shared memory, as one of the ranks sees it."""

    def __init__(self, path: Path, size: int, ring_bytes: int, *, create: bool = False) -> None:
        """
        Args:
            path: a file; in `/dev/shm` where there is one.
            size: ranks.
            ring_bytes: of all messages that are under way.

        Raises:
            DeviceError: there is too little memory for it.
        """
        self._first = _WORDS * size * _WORD
        self._capacity = -(-ring_bytes // _WORD) * _WORD
        total = self._first + self._capacity
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            descriptor = os.open(path, flags, 0o600)
            try:
                if create:
                    os.posix_fallocate(descriptor, 0, total)
                self._memory = mmap.mmap(descriptor, total)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DeviceError(
                f"{total:,} bytes of shared memory in {path.parent} cannot be had: {error.strerror or error}; free "
                "some (df -h /dev/shm), or leave tensor_parallel out"
            ) from error
        self._words = np.frombuffer(self._memory, dtype=np.int64, count=_WORDS * size).reshape(size, _WORDS)
        self._place = 0
        """Bytes written or read so far, by this rank."""

    def pulse(self, rank: int) -> int:
        """The pulse of a rank."""
        return int(self._words[rank, _PULSE])

    def beat(self, rank: int) -> None:
        """Say that this rank lives."""
        self._words[rank, _PULSE] += 1

    def progress(self, rank: int) -> Progress:
        """The words in which a rank says what it does."""
        return Progress(self._words[rank, _PROGRESS])

    def states(self) -> list[tuple[int, int]]:
        """What all ranks say, by rank: a `State` and a count."""
        return [(state, count) for state, count in self._words[:, _PROGRESS].tolist()]

    def serve(self, rank: int, calls: int) -> None:
        """Say that this rank serves so many calls from the first one on."""
        self._words[rank, _CALLS] = calls

    def served_by_all(self) -> int:
        """Calls from the first one on that all other ranks serve."""
        return int(self._words[1:, _CALLS].min())

    def write(self, message: bytes, check: Callable[[], object]) -> None:
        """Write a message, as soon as all ranks have read what it overwrites.

        Args:
            check: called while it waits; raises when a rank is gone.

        Raises:
            ValueError: it is larger than the ring.
        """
        length = -(-len(message) // _WORD) * _WORD + _WORD
        if length + _WORD > self._capacity:
            raise ValueError(f"a message of {len(message)} bytes does not fit into a ring of {self._capacity}")
        offset = self._place % self._capacity
        skipped = self._capacity - offset if offset + length > self._capacity else 0
        while self._place + skipped + length - self._read_by_all() > self._capacity:
            check()
            time.sleep(_WAIT_SECONDS)
        if skipped:
            self._put(offset, (-1).to_bytes(_WORD, "little", signed=True))
            self._place += skipped
            offset = 0
        self._put(offset + _WORD, message)
        self._put(offset, len(message).to_bytes(_WORD, "little"))
        self._place += length

    def _read_by_all(self) -> int:
        return int(self._words[1:, _READ].min())

    def _put(self, offset: int, value: bytes) -> None:
        start = self._first + offset
        self._memory[start : start + len(value)] = value

    def read(self, rank: int) -> bytes:
        """The next message; it must be there."""
        offset = self._place % self._capacity
        length = self._length(offset)
        if length < 0:
            self._place += self._capacity - offset
            offset = 0
            length = self._length(0)
        start = self._first + offset + _WORD
        message = self._memory[start : start + length]
        self._place += -(-length // _WORD) * _WORD + _WORD
        self._words[rank, _READ] = self._place
        return message

    def _length(self, offset: int) -> int:
        start = self._first + offset
        return int.from_bytes(self._memory[start : start + _WORD], "little", signed=True)


def arrivals(descriptor: int) -> Iterator[None]:
    """Once for each message that a pipe announces, until its other end is closed."""
    while announced := os.read(descriptor, 4096):
        for _ in announced:
            yield
