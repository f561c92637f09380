"""The server: who is connected, what is in flight, and when it ends. One thread, an asyncio loop; it only passes
values between the connections and the generator thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hybridgen.errors import EngineError, HybridgenError, ServerBusyError, ServerError
from hybridgen.serving.adapter import Model
from hybridgen.serving.address import Lease
from hybridgen.serving.connection import Connection
from hybridgen.serving.frames import encode
from hybridgen.serving.generator import (
    Cancel,
    Done,
    Ended,
    Failed,
    Generator,
    Key,
    Outcome,
    Ready,
    Stats,
    Stop,
    Submit,
    Told,
)
from hybridgen.serving.intake import read_request
from hybridgen.serving.limits import Limits
from hybridgen.serving.messages import VERSION, done_message

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long the last answers have to be read after an abort; after a drain, they have the rest of its time."""


class Server:
    """Accepts clients on a leased path and runs their requests in one batch until it is told to end."""

    def __init__(
        self,
        lease: Lease,
        load: Callable[[], Model],
        *,
        limits: Limits,
        step_seconds: float,
        drain_seconds: float,
        idle_exit: float | None = None,
        on_ready: Callable[[Server], None] = lambda server: None,
        on_done: Callable[[Done], None] = lambda done: None,
    ) -> None:
        """
        Args:
            step_seconds: a piece of the generator's work that takes longer is taken as hung.
            drain_seconds: how long requests may go on after the server was told to end.
            idle_exit: end after this many seconds without a request; None: never.
            on_ready: called when it listens.
            on_done: called with each completion (for metrics).
        """
        self.limits = limits
        # All names from the start: the thread of the metrics copies it.
        self.counts = Counter(dict.fromkeys(("requests", "completions", "errors", "busy", "tokens", "cut_off"), 0))
        """Since the start."""
        self.connections: dict[int, Connection] = {}
        self.in_flight = 0
        """Completions that were accepted and have not ended."""
        self._held = 0
        self.state = "loading"
        """`loading`, `ready`, `draining`, or `ended`."""
        self.description: dict[str, Any] = {}
        self.generator = Generator(load, self._post, self._deliver)
        self._lease = lease
        self._step_seconds = step_seconds
        self._drain_seconds = drain_seconds
        self._idle_exit = idle_exit
        self._on_ready = on_ready
        self._on_done = on_done
        self._stuck = False
        self._opened = 0
        self._ends: deque[float] = deque(maxlen=64)
        self._last_request = time.monotonic()
        self._deadline: float | None = None
        self._error: BaseException | None = None
        self._listener: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = self._signals_handled = 0
        self._hurry = False
        self._longest_tick = math.inf
        self._ticked = self._thawed = time.monotonic()

    async def run(self) -> BaseException | None:
        """Load, listen, serve and end; returns the error that ended it, or None."""
        self._finished = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._handle_signals()
        self.generator.start()
        interval = min(1.0, self.limits.frame_seconds / 4, self.limits.write_seconds / 4, self._step_seconds / 4)
        self._longest_tick = 3 * interval
        self._ticked = time.monotonic()
        watch = asyncio.create_task(self._watch(interval))
        try:
            await self._finished.wait()
        finally:
            watch.cancel()
            await self._close()
        return self._error

    async def _watch(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            now = time.monotonic()
            gap, self._ticked = now - self._ticked, now
            if gap > self._longest_tick:
                self._thaw(now, gap)
                continue
            for connection in list(self.connections.values()):
                connection.check(now)
            self._check_generator()
            if not self.generator.is_alive():  # after what it may have posted last
                asyncio.get_running_loop().call_soon(self._generator_ended, Ended(None))
            if self._deadline is not None and now > self._deadline:
                self.abort(f"requests were still running {self._drain_seconds:g} s after the server was told to end")
            idle = self._idle_exit
            if idle is not None and self.state == "ready" and not self.in_flight and now - self._last_request > idle:
                self.drain(f"no request for {idle:g} s")

    def _thaw(self, now: float, gap: float) -> None:
        """The process stood still (a suspended machine, SIGSTOP): nobody is to blame for that time."""
        logger.warning("the process stood still for %.1f s", gap)
        self._thawed = now
        self._last_request += gap
        if self._deadline is not None:
            self._deadline += gap
        for connection in self.connections.values():
            connection.shift(gap)

    def _work_age(self, working: float | None) -> float:
        """For how long the generator has been at a piece of work, without time in which the process stood still."""
        if working is None:
            return 0.0
        return max(0.0, min(time.monotonic(), self._ticked + self._longest_tick) - max(working, self._thawed))

    def _check_generator(self) -> None:
        """Answer everybody when the generator hangs: they would wait for ever."""
        if self.state == "loading" or self._work_age(self.generator.pulse.working) <= self._step_seconds:
            if self._stuck:
                logger.warning("the generator goes on")
            self._stuck = False
            return
        if not self._stuck:
            self._stuck = True
            logger.error("a step has not ended after %.0f s; what waits for it fails", self._step_seconds)
            self._fail_all(self._stuck_error())

    def _stuck_error(self) -> ServerError:
        return ServerError(
            f"the model has not finished a step for {self._step_seconds:g} s; if ping stays unhealthy, start the "
            "server again",
            "stuck",
        )

    # From the connections.

    def joined(self, connection: Connection) -> bool:
        """Take a new client in; False when there are too many."""
        if len(self.connections) >= self.limits.clients:
            return False
        self.connections[connection.number] = connection
        return True

    def left(self, connection: Connection) -> None:
        """A client is gone: what it asked for ends at the next step. Once is enough."""
        if self.connections.pop(connection.number, None) is None:
            return
        for submit in connection.requests.values():
            self._release(submit)
        if connection.requests or connection.controls:
            self.generator.drop(connection.number)
            self._last_request = time.monotonic()
        connection.requests.clear()
        connection.controls.clear()
        self._end_when_drained()

    def request(self, connection: Connection, key: int, message: dict[str, Any]) -> None:
        """Check a request and queue it.

        Raises:
            HybridgenError: it is wrong, too large, or there is no room for it.
        """
        self._last_request = time.monotonic()
        try:
            self._check_open()
            submit = read_request(Key(connection.number, key), message, self.limits, self.description["max_context"])
        except HybridgenError:
            self.counts["errors"] += 1
            raise
        size = _size(submit)
        if self.in_flight + size > self.limits.queue:
            self.counts["busy"] += 1
            raise ServerBusyError(
                f"the queue has room for {self.limits.queue - self.in_flight} of {size} completion(s); try again",
                self._hint(size),
            )
        if self._held and self._held + submit.weight > self.limits.held:
            self.counts["busy"] += 1
            raise ServerBusyError("the prompts in the queue take too much memory; try again", self._hint(size))
        self.counts["requests"] += 1
        self.in_flight += size
        self._held += submit.weight
        connection.requests[key] = submit
        self.generator.send(submit)

    def _release(self, submit: Submit) -> None:
        self.in_flight -= _size(submit)
        self._held -= submit.weight

    def _check_open(self) -> None:
        if self.state != "ready":
            raise ServerError("the server is ending and takes no more requests", "shutting_down")
        if self._stuck:
            raise self._stuck_error()

    def _hint(self, size: int) -> float:
        """Seconds until there may be room, from how fast completions ended lately."""
        if len(self._ends) < 2:
            return 0.5
        rate = len(self._ends) / max(1e-3, time.monotonic() - self._ends[0])
        excess = max(1, self.in_flight + size - self.limits.queue)
        return round(min(30.0, max(0.02, excess / rate)), 3)

    def cancel(self, connection: Connection, key: int) -> None:
        """End a request; one that is not in flight has just ended."""
        if key in connection.requests:
            self.generator.send(Cancel(Key(connection.number, key)))

    def stats(self, connection: Connection, key: int) -> None:
        """Ask the generator for statistics.

        Raises:
            ServerError: too many of these wait, the server is ending, or the generator hangs.
        """
        self._check_open()
        if len(connection.controls) >= self.limits.controls:
            raise ServerBusyError(f"{self.limits.controls} stats messages wait for an answer; read it first", 0.1)
        connection.controls.add(key)
        self.generator.send(Stats(Key(connection.number, key)))

    def count(self, what: str, amount: int = 1) -> None:
        """Count something that a connection saw."""
        self.counts[what] += amount

    def hello(self) -> dict[str, Any]:
        """The answer to a client's hello."""
        return {"type": "hello", "version": VERSION, **self.description, "limits": self.limits.as_dict()}

    def health(self) -> dict[str, Any]:
        """What a ping tells: a generator that hangs has an old step while it works, and is not healthy."""
        pulse, now = self.generator.pulse, time.monotonic()
        working = pulse.working
        work_age = self._work_age(working)
        return {
            "state": self.state,
            "healthy": self.state == "loading" or work_age <= self._step_seconds,
            "steps": pulse.steps,
            "step_age": round(max(0.0, now - pulse.since), 6),
            "working": working is not None,
            "work_age": round(work_age, 6),
            "in_flight": self.in_flight,
            "clients": len(self.connections),
            "pid": os.getpid(),
        }

    # From the generator.

    def _post(self, outcomes: list[Outcome]) -> None:
        """From the generator's thread."""
        try:
            self._call_soon(self._receive, outcomes)
        except RuntimeError:  # the loop has ended, and with it everybody who could be told
            logger.debug("outcomes after the end were dropped")

    def _call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """From any thread. Raises `RuntimeError` when the loop has ended."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, client: int, frames: list[tuple[int, bytes]]) -> None:
        """From the generator's thread."""
        connection = self.connections.get(client)
        if connection is None:
            return
        self.counts["tokens"] += len(frames)
        if not connection.write_tokens(frames):
            with suppress(RuntimeError):  # the loop has ended, and with it the connection
                self._call_soon(connection.write, b"")

    def _receive(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            try:
                self._take(outcome)
            except Exception:
                logger.exception("an outcome could not be passed on")
                if isinstance(outcome, (Done, Failed, Told)):  # its client must not wait for ever
                    self._fail(outcome.key, RuntimeError("the answer could not be sent"))

    def _take(self, outcome: Outcome) -> None:
        if isinstance(outcome, Done):
            self._complete(outcome)
        elif isinstance(outcome, Failed):
            self._fail(outcome.key, outcome.error)
        elif isinstance(outcome, Told):
            connection = self.connections.get(outcome.key.client)
            if connection is not None and outcome.key.id in connection.controls:
                connection.controls.remove(outcome.key.id)
                server = {**self.health(), "counts": dict(self.counts)}
                connection.send({"type": "stats", "id": outcome.key.id, "engine": outcome.stats, "server": server})
                self._end_when_drained()
        elif isinstance(outcome, Ready):
            self._open(outcome)
        else:
            self._generator_ended(outcome)

    def _complete(self, done: Done) -> None:
        connection = self.connections.get(done.key.client)
        submit = connection.requests.get(done.key.id) if connection is not None else None
        if connection is None or submit is None:
            return  # its client is gone, or was told that the generator hangs
        message = encode(done_message(done.key.id, done.event, stream=done.stream, last=done.last))
        self.counts["completions"] += 1
        self._last_request = time.monotonic()
        self._ends.append(self._last_request)
        self._on_done(done)
        if done.last:
            del connection.requests[done.key.id]
            self._release(submit)
        connection.write(message)
        self._end_when_drained()

    def _fail(self, key: Key, error: BaseException) -> None:
        """Answer a request with an error, if it is still in flight."""
        connection = self.connections.get(key.client)
        if connection is None:
            return
        submit = connection.requests.pop(key.id, None)
        if submit is None and key.id not in connection.controls:
            return
        connection.controls.discard(key.id)
        if submit is not None:
            self._last_request = time.monotonic()
            self._release(submit)
        self.counts["errors"] += 1
        connection.send_error(key.id, error)
        self._end_when_drained()

    def _fail_all(self, error: BaseException) -> None:
        for connection in list(self.connections.values()):
            for key in [*connection.requests, *connection.controls]:
                self.generator.send(Cancel(Key(connection.number, key)))
                self._fail(Key(connection.number, key), error)

    # The beginning and the end.

    def _open(self, ready: Ready) -> None:
        if self.state != "loading":
            return
        self.description = ready.description
        try:
            listener = self._lease.listen()
        except HybridgenError as error:
            self._end(error)
            return
        self._opening = asyncio.create_task(self._listen(listener))

    async def _listen(self, listener: Any) -> None:
        if self.state != "loading":
            listener.close()
            return
        server = await asyncio.get_running_loop().create_unix_server(self._connection, sock=listener)
        if self.state != "loading":  # it was told to end
            server.close()
            return
        self._listener = server
        self.state = "ready"
        self._last_request = time.monotonic()
        try:
            self._on_ready(self)
        except HybridgenError as error:
            self._end(error)

    def _connection(self) -> Connection:
        self._opened += 1
        return Connection(self, self._opened)

    def signalled(self) -> None:
        """SIGTERM or SIGINT: the first drains, the second aborts. Called by a signal handler, at any time."""
        self._signals += 1
        with suppress(RuntimeError):  # it has ended
            self._call_soon(self._handle_signals)

    def _handle_signals(self) -> None:
        while self._signals_handled < self._signals:
            self._signals_handled += 1
            if self.state in ("loading", "ready"):
                self.drain("a signal asked for it")
            else:
                self.abort("a second signal asked for it")

    def drain(self, why: str) -> None:
        """Take no more requests, and end when those in flight have ended."""
        if self.state not in ("loading", "ready"):
            return
        logger.info("ending: %s; %d completions are in flight", why, self.in_flight)
        self.state = "draining"
        self._deadline = time.monotonic() + self._drain_seconds
        if self._listener is not None:
            self._listener.close()
            self._lease.unlink()
        self._end_when_drained()

    def abort(self, why: str) -> None:
        """Answer everybody with an error and end."""
        logger.warning("ending at once: %s", why)
        self._hurry = True
        self._end(ServerError(f"the server was ended: {why}", "shutting_down"))

    def _end_when_drained(self) -> None:
        if self.state == "draining" and not any(c.requests or c.controls for c in self.connections.values()):
            self._end(None)

    def _generator_ended(self, ended: Ended) -> None:
        if self.state == "ended":
            return
        error = ended.error
        if error is None:
            error = EngineError("the generator thread ended")
        elif not isinstance(error, HybridgenError):
            error = EngineError(f"the generator thread failed: {type(error).__name__}; the server's log says why")
        logger.error("ending: %s", error)
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if self.state == "ended":
            return
        self.state = "ended"
        self._error = error
        if error is not None:
            self._fail_all(error)
        self._finished.set()

    async def _close(self) -> None:
        """Let the last answers be read, and take the socket away."""
        if self._listener is not None:
            self._listener.close()
        self._lease.unlink()
        self.generator.send(Stop())
        for connection in list(self.connections.values()):
            connection.finish()
        started = time.monotonic()
        deadline = started + CLOSE_SECONDS
        if self._deadline is not None and not self._hurry:
            deadline = max(deadline, self._deadline)
        while self.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            for connection in list(self.connections.values()):
                connection.check(time.monotonic())
            if self._hurry:  # a second signal came
                deadline = min(deadline, started + CLOSE_SECONDS)
        for connection in list(self.connections.values()):
            connection.abort()
        await asyncio.sleep(0)


def _size(submit: Submit) -> int:
    """Completions that a request makes."""
    return sum(params.n for params in submit.sampling)
