"""The processes of ranks 1 and up, as rank 0 sees them: started, watched, ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hybridgen import errors
from hybridgen.errors import DeviceError, EngineError, HybridgenError
from hybridgen.parallel.channel import Channel
from hybridgen.parallel.progress import Watch

COMMAND = "import sys; from hybridgen.engine.rank import main; sys.exit(main(sys.argv[1], int(sys.argv[2])))"
"""What a rank's process runs, with the group's directory and its rank."""
STILL_SECONDS = 10.0
"""Without a pulse for so long, a process counts as one that stands still."""
BEGIN_SECONDS = 300.0
"""For a process to have imported what it needs, and to have a pulse."""
END_SECONDS = 5.0
"""For an orderly end; then a process is killed."""
_TURN_SECONDS = 0.1
_LOSS_SECONDS = 1.5
_LOG_LINES = 3
_SHM = Path("/dev/shm")
ORDER, MEMORY, STORE = "order.json", "memory", "store"
"""Files in the group's directory: what the ranks are told at first, the channel, and where they find each other."""


class Ranks:
    """The other processes of a group. The first of them that is lost takes all others with it."""

    def __init__(self, order: Mapping[str, Any], size: int, ring_bytes: int) -> None:
        """Start them; `wait_until_open()` waits for them.

        Args:
            order: what `engine.rank` reads.
            size: ranks in all.

        Raises:
            DeviceError: there is no memory that they can share, or no process can be started.
        """
        self.size = size
        self.lost: str | None = None
        """Why the group has ended; None while it lives."""
        self._pid = os.getpid()
        self._closing = False
        self._on_loss: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[str]] = []
        place = str(_SHM) if os.access(_SHM, os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="hybridgen-ranks-", dir=place))
        try:
            self.channel = Channel(self.directory / MEMORY, size, ring_bytes, create=True)
            (self.directory / ORDER).write_text(json.dumps({**order, "size": size, "ring_bytes": ring_bytes}))
            self._begin()
        except BaseException as error:
            self.close(at_once=True)
            if isinstance(error, OSError):
                raise DeviceError(f"tensor_parallel={size}: a process cannot be started: {error}") from error
            raise
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="hybridgen-ranks")
        self._watcher.start()

    def _begin(self) -> None:
        """Have the other ranks begin."""
        for rank in range(1, self.size):
            self._processes.append(self._start(rank))

    def _start(self, rank: int) -> subprocess.Popen[str]:
        threads = str(max(1, (os.cpu_count() or 1) // self.size))
        environment = {"OMP_NUM_THREADS": threads, "NCCL_GRAPH_MIXING_SUPPORT": "0", **os.environ}
        with (self.directory / f"{rank}.log").open("w") as log:
            # A session of its own: Ctrl-C is for rank 0, which ends the others.
            return subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(self.directory), str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )

    @property
    def pids(self) -> list[int]:
        """Of the processes, by rank from 1."""
        return [process.pid for process in self._processes]

    def wait_until_open(self) -> None:
        """Wait until all of them have opened the checkpoint, so that only now and then one is waited for in vain.

        Raises:
            HybridgenError: one could not, with what it said.
        """
        for rank, process in enumerate(self._processes, 1):
            line = process.stdout.readline() if process.stdout is not None else ""
            if not line.strip():
                self.wait_for_loss()
                self.fail(f"rank {rank} ended before it was ready")
                raise EngineError(self.lost)
            answer = json.loads(line)
            if "error" in answer:
                self.fail(f"rank {rank}: {answer['error']['message']}")
                raise error_of(answer["error"])

    def tell(self, message: bytes) -> None:
        """Send a message to all of them.

        Raises:
            EngineError: the group has ended.
        """
        self.check()
        self.channel.write(message, self.check)
        self._announce()

    def _announce(self) -> None:
        """Tell all of them that a message is there."""
        for process in self._processes:
            if process.stdin is not None:
                with suppress(OSError):  # it is dead, which the watcher tells
                    os.write(process.stdin.fileno(), b"m")

    def wait_for_calls(self) -> None:
        """Before a call: wait until all of them serve. Those that this process started always do.

        Raises:
            EngineError: the group has ended.
        """
        self.check()

    @property
    def is_inherited(self) -> bool:
        """Whether this process is a fork of the one that has the group, and must leave it alone."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise if the group has ended.

        Raises:
            EngineError: it has, with the reason; or it is another process's.
        """
        if self.is_inherited:
            raise EngineError(
                f"the engine's other processes belong to process {self._pid}, of which this one is a fork; load an "
                "engine in this one"
            )
        if self.lost is not None:
            raise EngineError(self.lost)

    def wait_for_loss(self) -> None:
        """After a collective failed: wait a moment for the watcher to see which process is gone."""
        until = time.monotonic() + _LOSS_SECONDS
        while self.lost is None and time.monotonic() < until:
            time.sleep(_TURN_SECONDS / 4)

    def fail(self, why: str) -> None:
        """End the group: kill what is left of it. The first reason is kept. A fork ends nothing."""
        if self.is_inherited:
            self.lost = self.lost or why
            return
        with self._lock:
            if self.lost is None:
                self.lost = f"the tensor-parallel group ended: {why}; load the engine again"
            stop = list(self._on_loss)
        self._kill()
        for call in stop:
            call()

    def on_loss(self, call: Callable[[], None]) -> None:
        """Have something called when the group ends, in whichever thread notices it; at once if it has ended."""
        with self._lock:
            self._on_loss.append(call)
            ended = self.lost is not None
        if ended:
            call()

    def _watch(self) -> None:
        """Notice a process that died or stands still; in a thread of its own."""
        pulses = [(0, time.monotonic())] * self.size
        watch = Watch(self.size)
        while not self._closing and self.lost is None:
            why = self._look(pulses, watch)
            if why is not None and not self._closing:
                self.fail(why)
            time.sleep(_TURN_SECONDS)

    def _look(self, pulses: list[tuple[int, float]], watch: Watch) -> str | None:
        """What is wrong with a rank; None: nothing is.

        Args:
            pulses: by rank the last one and since when; changed here.
        """
        for rank in range(1, self.size):
            ended = self._ended(rank)
            if ended is not None:
                return f"rank {rank} {ended}"
            if not self._has_come(rank):
                pulses[rank] = 0, time.monotonic()
            now, pulse = time.monotonic(), self.channel.pulse(rank)
            if pulse != pulses[rank][0]:
                pulses[rank] = pulse, now
            elif now - pulses[rank][1] > (STILL_SECONDS if pulse else BEGIN_SECONDS):
                still = now - pulses[rank][1]
                return f"rank {rank} has stood still for {still:.0f} seconds{self._last_words(rank)}"
        return watch.look(self.channel.states(), time.monotonic())

    def _has_come(self, rank: int) -> bool:
        """Whether a rank is to have a pulse."""
        return True

    def _ended(self, rank: int) -> str | None:
        """How a rank ended; None while it lives."""
        status = self._processes[rank - 1].poll()
        return None if status is None else _ended(status) + self._last_words(rank)

    def _last_words(self, rank: int) -> str:
        """The end of what a process printed, or the error that it sent."""
        with suppress(OSError):
            lines = (self.directory / f"{rank}.log").read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
            return ": " + " | ".join(lines) if lines else ""
        return ""

    def _kill(self) -> None:
        """End what is left of them at once."""
        for process in self._processes:
            with suppress(OSError):
                process.kill()

    def close(self, *, at_once: bool = False) -> None:
        """End the processes; none is left afterwards. Twice is fine. In a fork nothing ends."""
        if self.is_inherited:
            return
        self._closing = True
        self._leave(at_once)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _leave(self, at_once: bool) -> None:
        """Let them end, and wait for that."""
        for process in self._processes:
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
        until = time.monotonic() + (0.0 if at_once or self.lost is not None else END_SECONDS)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self._kill()
        for process in self._processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _ended(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def kind_of(error: HybridgenError) -> str:
    """The name by which another process makes such an exception again: that of the nearest class in `errors`."""
    return next(each.__name__ for each in type(error).__mro__ if getattr(errors, each.__name__, None) is each)


def error_of(answer: Mapping[str, str]) -> HybridgenError:
    """An exception that another process had."""
    kind = getattr(errors, answer["kind"], None)
    if isinstance(kind, type) and issubclass(kind, HybridgenError):
        return kind(answer["message"])
    return EngineError(answer["message"])
