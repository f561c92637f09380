"""Groups whose processes torchrun started: each runs the same program, and finds the others by torchrun's store.

`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` say where a process stands.
Ranks one behind the other are a group; all of it is on one host. The store tells where the group's directory is, and
nothing else. A socket there connects rank 0 with each of the others: bytes that announce messages go down, and what
went wrong goes both ways.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hybridgen.config import EngineConfig
from hybridgen.errors import ConfigError, DeviceError, EngineError, HybridgenError, described, shown
from hybridgen.parallel.channel import Channel
from hybridgen.parallel.ranks import MEMORY, ORDER, Ranks, error_of, kind_of

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_JOIN_SECONDS = 600.0
"""For all ranks to load the engine: programs get there at different times."""
_SOCKET = "ranks"
_FAILED = b"!"
"""Before the reason why a group ends; no announcement is that byte."""
_TURN_SECONDS = 0.002
_numbers = itertools.count()


class Place(NamedTuple):
    """Where this process stands."""

    rank: int
    """In its group."""
    size: int
    local: int
    """Among all processes of the host."""
    first: int
    """The group's first among all processes of all hosts."""


def find_place(size: int) -> Place | None:
    """Where this process stands in a group of so many; None where nobody but us starts the others.

    Raises:
        ConfigError: the processes that there are do not make up whole groups.
    """
    if size == 1 or any(name not in os.environ for name in _NEEDED) or os.environ["WORLD_SIZE"] == "1":
        return None
    try:
        rank, world, local, of_host = (int(os.environ[name]) for name in _NEEDED[:4])
    except ValueError:
        values = {name: os.environ[name] for name in _NEEDED[:4]}
        raise ConfigError(f"tensor_parallel={size} under torchrun: {shown(values)} are not numbers") from None
    if world % size or of_host % size:
        raise ConfigError(
            f"tensor_parallel={size} under torchrun with {world} processes, {of_host} of them on this host: both "
            f"must be multiples of {size}; give --nproc-per-node {size}, or a divisor as tensor_parallel"
        )
    return Place(rank % size, size, local, rank - rank % size)


def placed(config: EngineConfig) -> EngineConfig:
    """The config of this process: under torchrun its own GPU, where none is named.

    Raises:
        ConfigError: see `find_place`.
    """
    place = find_place(config.tensor_parallel)
    if place is None or config.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return config
    return config.replace(device=f"cuda:{place.local}")


def _find_store() -> Any:
    """That of the default process group where the program has made one, else torchrun's.

    Raises:
        DeviceError: it cannot be reached.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    try:
        return _launchers_store()
    except Exception as error:
        raise _unreachable(error) from error


@functools.cache  # where no launcher has it, rank 0 does as long as it lives
def _launchers_store() -> Any:
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=timedelta(seconds=_JOIN_SECONDS)))[0]


def _key(place: Place) -> str:
    """Of the group's next engine: all of its ranks load their engines in the same order."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return "/".join(["hybridgen", *run, str(place.first), str(next(_numbers))])


def _unreachable(error: Exception) -> DeviceError:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return DeviceError(f"the ranks do not find each other through {where}: {described(error)}")


class LaunchedRanks(Ranks):
    """Ranks 1 and up where torchrun started them."""

    def __init__(self, order: Mapping[str, Any], place: Place, ring_bytes: int) -> None:
        """Make the group known; see `Ranks`.

        Raises:
            DeviceError: there is no memory to share, or the others cannot be told.
        """
        self._connections: list[socket.socket | None] = [None] * place.size
        self._listener: socket.socket | None = None
        self._calls = 0
        """That have ended."""
        key = _key(place)
        self._store = _find_store()
        try:
            super().__init__(order, place.size, ring_bytes)
        except HybridgenError as error:
            self._store.set(key, json.dumps({"error": {"kind": kind_of(error), "message": str(error)}}))
            raise
        self._store.set(key, json.dumps({"directory": str(self.directory)}))

    def _begin(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.directory / _SOCKET))
        self._listener.listen(self.size)

    def wait_until_open(self) -> None:
        """See `Ranks.wait_until_open`."""
        until = time.monotonic() + _JOIN_SECONDS
        while None in self._connections[1:]:
            missing = [rank for rank in range(1, self.size) if self._connections[rank] is None]
            assert self._listener is not None
            self._listener.settimeout(max(0.1, until - time.monotonic()))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                self.fail(f"rank {missing[0]} did not load the engine within {_JOIN_SECONDS:.0f} seconds")
                raise EngineError(self.lost) from None
            answer = json.loads(_line(connection) or '{"rank": 0}')
            if "error" in answer:
                connection.close()
                self.fail(f"rank {answer['rank']}: {answer['error']['message']}")
                raise error_of(answer["error"])
            connection.setblocking(False)
            self._connections[answer["rank"]] = connection

    @property
    def pids(self) -> list[int]:
        """None of them is ours."""
        return []

    def wait_for_calls(self) -> None:
        """See `Ranks.wait_for_calls`: the other programs make the same call, or follow."""
        while self.channel.served_by_all() <= self._calls:
            self.check()
            time.sleep(_TURN_SECONDS)
        self.check()

    def end_call(self) -> None:
        """After a call's result was sent: the other programs go on."""
        self._calls += 1

    def _announce(self) -> None:
        for connection in self._connections[1:]:
            while connection is not None:
                try:
                    connection.send(b"m")
                    break
                except BlockingIOError:  # it does not read as fast as this
                    self.check()
                    time.sleep(_TURN_SECONDS)
                except OSError:  # it is gone, which the watcher tells
                    break

    def _has_come(self, rank: int) -> bool:
        return self._connections[rank] is not None

    def _ended(self, rank: int) -> str | None:
        connection = self._connections[rank]
        if connection is None:
            return None
        with suppress(BlockingIOError):
            try:
                said = connection.recv(65536)
            except ConnectionError:
                said = b""
            return f"failed: {said[1:].decode(errors='replace')}" if said[:1] == _FAILED else "has left the group"
        return None

    def _kill(self) -> None:
        """Tell them why, which ends what they do here; the processes are their program's."""
        for connection in self._connections[1:]:
            if connection is not None:
                with suppress(OSError):
                    connection.send(_FAILED + str(self.lost).encode())
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)

    def _leave(self, at_once: bool) -> None:
        for connection in (self._listener, *self._connections[1:]):
            if connection is not None:
                connection.close()


class Membership:
    """What a rank above 0 has of its group, in a program that torchrun started."""

    def __init__(self, place: Place, order: Mapping[str, Any]) -> None:
        """Find rank 0.

        Args:
            order: what this rank's program asks for; rank 0 must have been asked for the same.

        Raises:
            ConfigError: it was not.
            DeviceError: it cannot be found, or is on another host.
            HybridgenError: it could not begin, with what it said.
        """
        self.rank = place.rank
        self.reason = "rank 0 has closed the engine, or is gone"
        """Why nothing comes any more."""
        store, key = _find_store(), _key(place)
        try:
            store.wait([key], timedelta(seconds=_JOIN_SECONDS))
            told = json.loads(store.get(key))
        except Exception as error:
            raise _unreachable(error) from error
        if "error" in told:
            raise error_of(told["error"])
        self.directory = Path(told["directory"])
        try:
            theirs = json.loads((self.directory / ORDER).read_text())
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(str(self.directory / _SOCKET))
        except OSError as error:
            raise DeviceError(
                f"rank {self.rank} cannot reach rank 0 through {self.directory}: {error.strerror or error}; all ranks "
                "of tensor_parallel run on one host, by one user, and share /dev/shm"
            ) from error
        other = [name for name in ("model", "device", "config") if theirs[name] != json.loads(json.dumps(order[name]))]
        if other:
            name, mine, rank0s = other[0], order[other[0]], theirs[other[0]]
            if name == "config":
                mine = json.loads(json.dumps(mine))
                name = next(each for each in rank0s if mine.get(each) != rank0s[each])
                mine, rank0s = mine.get(name), rank0s[name]
            wrong = ConfigError(
                f"rank {self.rank} loads an engine with {name}={shown(mine)}, and rank 0 with {shown(rank0s)}; "
                "all ranks must ask for the same"
            )
            self.answer(wrong)
            raise wrong
        self.channel = Channel(self.directory / MEMORY, place.size, theirs["ring_bytes"])
        self.answer(None)

    def answer(self, error: HybridgenError | None) -> None:
        """Tell rank 0 that this one has opened the checkpoint, or why not."""
        told: dict[str, Any] = {"rank": self.rank}
        if error is not None:
            told["error"] = {"kind": kind_of(error), "message": str(error)}
        self.socket.sendall((json.dumps(told) + "\n").encode())

    def arrivals(self) -> Iterator[None]:
        """Once for each message that rank 0 announces, until there are no more; then `reason` says why."""
        while True:
            try:
                announced = self.socket.recv(4096)
            except OSError:
                return
            before, failed, why = announced.partition(_FAILED)
            for _ in before:
                yield
            if failed:
                self.reason = why.decode(errors="replace")
            if failed or not announced:
                return

    def is_over(self, seconds: float = 0.0) -> bool:
        """Whether rank 0 has ended the group or is gone, or this rank has left; from any thread.

        Args:
            seconds: how long to wait for that, at most.
        """
        poll, descriptor = select.poll(), self.socket.fileno()
        if descriptor < 0:
            return True
        poll.register(descriptor, select.POLLRDHUP)
        return bool(poll.poll(1000 * seconds))

    def leave(self, why: str | None = None) -> None:
        """Leave the group; `why` tells rank 0 what went wrong."""
        with suppress(OSError):
            if why is not None:
                self.socket.sendall(_FAILED + why.encode())
        self.socket.close()


def _line(connection: socket.socket) -> str:
    """What comes until the end of a line, or of the connection."""
    found = b""
    connection.settimeout(_JOIN_SECONDS)
    while not found.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            return ""
        found += part
    return found.decode()
