"""From the start of a server to its end: it loads, listens, drains when it is told to, and ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from hybridgen.errors import EngineError, HybridgenError, ServerError
from hybridgen.serving.lifecycle.clock import Standstill
from hybridgen.serving.lifecycle.descriptors import AcceptErrors, Reserve
from hybridgen.serving.lifecycle.endpoint import Endpoint
from hybridgen.serving.service.service import Service
from hybridgen.serving.unix.address import Lease
from hybridgen.serving.unix.server import UnixServer

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long the last answers have to be read after an abort; after a drain, they have the rest of its time."""


class Lifecycle:
    """Owns a service and its door, a socket on a leased path. `run()` returns when all has ended."""

    def __init__(
        self,
        lease: Lease,
        service: Service,
        *,
        step_seconds: float,
        drain_seconds: float,
        idle_exit: float | None = None,
        endpoint: Endpoint | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            step_seconds: the service's; how often clocks are looked at follows from it.
            drain_seconds: how long requests may go on after the server was told to end.
            idle_exit: end after this many seconds without a request; None: never.
            endpoint: the port of the metrics.
            on_ready: called when it listens.
        """
        self.service = service
        self.door = UnixServer(lease, service, self.drain)
        self._drain_seconds = drain_seconds
        self._idle_exit = idle_exit
        self._endpoint = endpoint
        self._on_ready = on_ready
        limits = service.limits
        self._interval = min(1.0, limits.frame_seconds / 4, limits.write_seconds / 4, step_seconds / 4)
        self._deadline: float | None = None
        self._error: BaseException | None = None
        self._drained_for: HybridgenError | None = None
        self._hurry = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finished = asyncio.Event()
        self._signals = self._signals_handled = 0

    async def run(self) -> BaseException | None:
        """Load, listen, serve and end; returns the error that ended it, or None."""
        self._loop = asyncio.get_running_loop()
        reserve = Reserve()
        self._loop.set_exception_handler(AcceptErrors(reserve.spend))
        self._handle_signals()
        standstill = Standstill(self._interval)
        self.service.start(self, self._loop.call_soon_threadsafe, standstill.longest)
        watch = asyncio.create_task(self._watch(standstill, reserve))
        try:
            if self._endpoint is not None:
                await self._endpoint.serve(lambda: reserve.full)
            await self._finished.wait()
        finally:
            watch.cancel()
            await self._close()
            if self._endpoint is not None:
                self._endpoint.close()
            reserve.spend()
        return self._error

    async def _watch(self, standstill: Standstill, reserve: Reserve) -> None:
        while True:
            await asyncio.sleep(self._interval)
            now, gap = standstill.look()
            if gap:
                logger.warning("the process stood still for %.1f s", gap)
                self.service.thaw(now, gap)
                self.door.thaw(gap)
            else:
                self.door.check(now)
                self.service.check(now)
                self._check_idle(now)
            # This one never moves: whoever waits for the server to end waits for it to end by then.
            if self._deadline is not None and now > self._deadline:
                self.abort(f"requests were still running {self._drain_seconds:g} s after the server was told to end")
            reserve.fill()

    def _check_idle(self, now: float) -> None:
        idle, service = self._idle_exit, self.service
        if (
            idle is not None
            and service.state == "ready"
            and not service.in_flight
            and now - service.last_request > idle
        ):
            self.drain(f"no request for {idle:g} s")

    # From the service.

    def ready(self) -> None:
        """The model is loaded: listen."""
        if self.service.state == "loading":
            self._opening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        try:
            if not await self.door.listen():
                return
            self.service.state = "ready"
            self.service.last_request = time.monotonic()
            self._on_ready()
        except HybridgenError as error:
            self._end(error)

    def settled(self) -> None:
        """Something was answered, or a client left."""
        if self.service.state == "draining" and self.service.settled:
            self._end(self._drained_for)

    def generator_ended(self, error: BaseException | None) -> None:
        """Nothing runs any more."""
        if self.service.state == "ended":
            return
        if error is None:
            error = EngineError("the generator thread ended")
        elif not isinstance(error, HybridgenError):
            error = EngineError(f"the generator thread failed: {type(error).__name__}; the server's log says why")
        logger.error("ending: %s", error)
        self._end(error)

    # The end.

    def signalled(self) -> None:
        """A signal asks for the end: the first drains, the second aborts. Called by a signal handler, at any time."""
        self._signals += 1
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._handle_signals)

    def drain_soon(self, why: str) -> None:
        """`drain()`, from any thread, because something failed: the end is an error."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self.drain, why, ServerError(why))

    def fail_soon(self, error: HybridgenError) -> None:
        """End with an error, from any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._end, error)

    def _handle_signals(self) -> None:
        while self._signals_handled < self._signals:
            self._signals_handled += 1
            if self.service.state in ("loading", "ready"):
                self.drain("a signal asked for it")
            else:
                self.abort("a second signal asked for it")

    def drain(self, why: str, error: HybridgenError | None = None) -> None:
        """Take no more requests, and end when those in flight have ended.

        Args:
            error: what it ends with then; None: it was asked for.
        """
        if self.service.state not in ("loading", "ready"):
            return
        logger.info("ending: %s; %d completions are in flight", why, self.service.in_flight)
        self.service.state = "draining"
        self._drained_for = error
        self._deadline = time.monotonic() + self._drain_seconds
        self.door.stop()
        self.settled()

    def abort(self, why: str) -> None:
        """Answer everybody with an error and end."""
        logger.warning("ending at once: %s", why)
        self._hurry = True
        self._end(ServerError(f"the server was ended: {why}", "shutting_down"))

    def _end(self, error: BaseException | None) -> None:
        if self.service.state == "ended":
            return
        self.service.state = "ended"
        self._error = error
        if error is not None:
            self.service.fail_all(error)
        self._finished.set()

    async def _close(self) -> None:
        """Let the last answers be read, and take the socket away."""
        self.door.stop()
        self.service.stop()
        self.door.finish()
        started = time.monotonic()
        deadline = started + CLOSE_SECONDS
        if self._deadline is not None and not self._hurry:
            deadline = max(deadline, self._deadline)
        while not self.door.empty and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            self.door.check(time.monotonic())
            if self._hurry:  # a second signal came
                deadline = min(deadline, started + CLOSE_SECONDS)
        self.door.abort()
        await asyncio.sleep(0)
