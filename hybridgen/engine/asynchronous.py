"""Calls of coroutines: one thread takes an engine's steps for all of them, while there are any."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

from hybridgen.arguments import returns_errors
from hybridgen.core import Completion, TokenEvent
from hybridgen.engine.loop import StepLoop
from hybridgen.engine.requests import Request, results
from hybridgen.text.prompts import split_prompts


class AsyncCall:
    """One call: its requests, and where its events go."""

    def __init__(self, requests: list[Request], loop: asyncio.AbstractEventLoop) -> None:
        self.requests = requests
        self.abandoned = False
        """Nobody waits for it any more."""
        self._active = list(requests)
        self._loop = loop
        self._inbox: asyncio.Queue[list[TokenEvent] | BaseException | None] = asyncio.Queue()

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """Its events, as far as they are kept, until all requests have ended.

        Raises:
            EngineError: the engine was closed, or its device failed.
        """
        try:
            while (some := await self._inbox.get()) is not None:
                if isinstance(some, BaseException):
                    raise some
                for event in some:
                    yield event
        finally:
            self.abandoned = True

    def deliver(self) -> bool:
        """Hand over what came since the last time; whether all has come. From the thread that takes the steps."""
        events: list[TokenEvent] = []
        for request in self._active:
            while request.output.events:
                events.append(request.output.events.popleft())
        self._active = [request for request in self._active if request.completion is None]
        if events:
            self.put(events)
        if not self._active:
            self.put(None)
        return not self._active

    def put(self, item: list[TokenEvent] | BaseException | None) -> None:
        """Put something into the inbox, from any thread."""
        with suppress(RuntimeError):  # the event loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, item)


class AsyncCalls:
    """All calls of coroutines of one engine."""

    def __init__(
        self, loop: StepLoop, make_requests: Callable[..., list[Request]], end_call: Callable[[], None]
    ) -> None:
        """
        Args:
            make_requests: `Engine.make_requests`.
            end_call: what comes when no call is left.
        """
        self._loop = loop
        self._make = make_requests
        self._end_call = end_call
        self._calls: list[AsyncCall] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    async def generate(self, prompts: Any, sampling: Any, errors: str, fields: dict[str, Any]) -> Any:
        """See `Engine.agenerate`."""
        refused: dict[int, Completion] | None = {} if returns_errors(errors) else None
        items, single = split_prompts(prompts)
        call = await self._start(items, sampling, fields, refused, keep_events=False)
        async with aclosing(call.events()) as events:
            async for _ in events:
                pass
        return results(call.requests, single, refused)

    async def stream(
        self, prompts: Any, sampling: Any, errors: str, fields: dict[str, Any]
    ) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.astream`."""
        refused: dict[int, Completion] | None = {} if returns_errors(errors) else None
        items, _ = split_prompts(prompts)
        call = await self._start(items, sampling, fields, refused, keep_events=True)
        async with aclosing(call.events()) as events:
            for index, completion in (refused or {}).items():
                yield TokenEvent(token_id=None, text="", index=index, completion=completion)
            async for event in events:
                yield event

    async def _start(
        self,
        items: list[Any],
        sampling: Any,
        fields: dict[str, Any],
        refused: dict[int, Completion] | None,
        *,
        keep_events: bool,
    ) -> AsyncCall:
        """Make requests and submit them, in a thread: both can wait for a step or a tokenizer."""
        loop = asyncio.get_running_loop()

        def begin() -> AsyncCall:
            requests = self._make(items, sampling, fields, refused)
            self._loop.submit(requests, keep_events=keep_events)
            call = AsyncCall(requests, loop)
            with self._lock:
                self._calls.append(call)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="hybridgen-async", daemon=True)
                    self._thread.start()
            return call

        begun = loop.run_in_executor(None, begin)
        try:
            return await asyncio.shield(begun)
        except asyncio.CancelledError:
            begun.add_done_callback(_abandon)
            raise

    def _run(self) -> None:
        while True:
            with self._lock:
                calls = list(self._calls)
                if not calls:
                    self._thread = None
                    break
            try:
                for call in calls:
                    if call.abandoned:
                        self._loop.cancel(call.requests)
                if any(not call.abandoned for call in calls):
                    self._loop.step()
                done = [call for call in calls if call.deliver()]
            except BaseException as error:
                for call in calls:
                    call.put(error)
                done = calls
            with self._lock:
                self._calls = [call for call in self._calls if call not in done]
        self._end_call()


def _abandon(begun: asyncio.Future[Any]) -> None:
    """A call began after its task was cancelled."""
    if not begun.cancelled() and begun.exception() is None:
        begun.result().abandoned = True
