"""The client for asyncio."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from types import TracebackType
from typing import Any, overload

from hybridgen.arguments import SCORES, ManyPrompts, OnePrompt, Sampling, scores_of, scoring_pairs
from hybridgen.core import Completion, TokenEvent
from hybridgen.errors import HybridgenError, ServerError
from hybridgen.serving.client.exchange import Call, Exchange, Results, split
from hybridgen.serving.client.link import HELLO_SECONDS, MAX_FRAME, check_hello, hello_message
from hybridgen.serving.unix.address import connect, socket_path
from hybridgen.serving.unix.frames import FrameError, FrameReader, encode
from hybridgen.serving.unix.messages import error_from_wire


class Box:
    """The messages of one call, for its one reader. A queue of asyncio's takes several times as long for each, and a
    stream has one for every token."""

    __slots__ = ("_messages", "_waiter")

    def __init__(self) -> None:
        self._messages: deque[dict[str, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def empty(self) -> bool:
        """Whether nothing is there now."""
        return not self._messages

    def put(self, message: dict[str, Any]) -> None:
        """A message came."""
        self._messages.append(message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> dict[str, Any]:
        """The next message, which is there."""
        return self._messages.popleft()

    async def wait(self, timeout: float | None) -> bool:
        """Wait for a message; False when none came in time."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await (self._waiter if timeout is None else asyncio.wait_for(self._waiter, timeout))
        except TimeoutError:
            return False
        finally:
            self._waiter = None
        return True


class _AsyncLink(asyncio.Protocol):
    """One connection of an `AsyncClient`."""

    def __init__(self) -> None:
        self.error: HybridgenError | None = None
        self.hello: dict[str, Any] = {}
        self.boxes: dict[int, Box] = {}
        self.loop = asyncio.get_running_loop()
        self._reader = FrameReader(MAX_FRAME)
        self._transport: asyncio.Transport | None = None
        self._next_id = 0
        self._first: asyncio.Future[dict[str, Any]] = self.loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a stream transport is needed")
        self._transport = transport
        transport.write(encode(hello_message()))

    async def greet(self) -> None:
        """Wait for the server's hello."""
        try:
            self.hello = check_hello(await asyncio.wait_for(self._first, HELLO_SECONDS))
        except TimeoutError:
            raise self.fail(f"the server did not say hello within {HELLO_SECONDS:g} s; does it hang?") from None

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._reader.feed(data)
        except FrameError as error:
            self.fail(f"the connection to the server failed: {error}")
            return
        for message in messages:
            if not self._first.done():
                self._first.set_result(message)
            elif message.get("type") == "error" and message.get("id") is None:
                self.fail(error_from_wire(message))
            elif (box := self.boxes.get(message.get("id", -1))) is not None:
                box.put(message)

    def connection_lost(self, error: Exception | None) -> None:
        self.fail("the server closed the connection")

    def fail(self, why: str | HybridgenError) -> HybridgenError:
        """End the connection; everybody who waits gets the first reason."""
        if self.error is None:
            lost = f"{why}; what was in flight is lost, and the next call connects again"
            self.error = why if isinstance(why, HybridgenError) else ServerError(lost)
            for box in self.boxes.values():
                box.put({"type": "lost"})
            if not self._first.done():
                self._first.set_exception(self.error)
        if self._transport is not None:
            self._transport.close()
        return self.error

    def post(self, message: dict[str, Any], box: Box) -> int:
        """Send a message under a new id, whose answers go into the box."""
        self.check()
        key, self._next_id = self._next_id, self._next_id + 1
        self.boxes[key] = box
        self._write({**message, "id": key})
        return key

    def cancel(self, key: int) -> None:
        """Ask for the end of a request; it is answered as usual."""
        self.check()
        self._write({"type": "cancel", "id": key})

    def _write(self, message: dict[str, Any]) -> None:
        if self._transport is not None:
            self._transport.write(encode(message))

    def check(self) -> None:
        """Raise if the connection has ended."""
        if isinstance(self.error, ServerError):
            raise ServerError(str(self.error), self.error.code)
        if self.error is not None:
            raise type(self.error)(str(self.error))

    async def receive(self, box: Box, timeout: float | None) -> dict[str, Any] | None:
        """The next message in a box; None when none came in time.

        Raises:
            ServerError: the connection has ended.
        """
        if box.empty():
            self.check()
            if not await box.wait(timeout):
                return None
        message = box.take()
        if message["type"] == "lost":
            self.check()
        return message


class AsyncClient:
    """The `Client` for asyncio: `generate`, `stats`, `ping`, `cancel` and `shutdown` are coroutines, `stream` is an
    asynchronous iterator. Any number of calls may run at once on one event loop.

    Use it with `async with`, or await `connect()` and `close()`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        wait: float = 60.0,
        patience: float = 0.0,
        brief: bool = False,
    ) -> None:
        """See `Client`; it connects with the first call.

        Args:
            brief: completions come without `prompt_token_ids` and `timing.token_times`, which are most of what is sent.

        Raises:
            ServerError: the path is too long to be a socket's.
        """
        self.path = socket_path(path)
        self._timeout = timeout
        self._wait = wait
        self._patience = patience
        self._brief = brief
        self._closed = False
        self._link: _AsyncLink | None = None
        self._connecting = asyncio.Lock()

    async def connect(self) -> dict[str, Any]:
        """Connect, if it is not; returns what the server said of itself.

        Raises:
            ServerError: nobody listens there, or not this user's server.
        """
        return dict((await self._connected()).hello)

    async def _connected(self) -> _AsyncLink:
        async with self._connecting:
            if self._closed:
                raise ServerError("this client is closed; make a new one")
            loop = asyncio.get_running_loop()
            if self._link is None or self._link.error is not None or self._link.loop is not loop:
                connection = await asyncio.to_thread(connect, self.path, self._patience)
                _, link = await loop.create_connection(_AsyncLink, sock=connection)
                try:
                    await link.greet()
                    if self._closed:
                        raise ServerError("this client was closed while it connected")
                except BaseException:
                    link.fail("this client did not get through")
                    raise
                self._link = link
            return self._link

    @overload
    async def generate(  # type: ignore[overload-overlap]  # a string is one prompt
        self,
        prompts: OnePrompt,
        sampling: Sampling = None,
        *,
        errors: str = "raise",
        **fields: Any,
    ) -> Completion: ...

    @overload
    async def generate(
        self,
        prompts: ManyPrompts,
        sampling: Sampling = None,
        *,
        errors: str = "raise",
        **fields: Any,
    ) -> list[Completion]: ...

    @overload
    async def generate(
        self,
        prompts: Any,
        sampling: Sampling = None,
        *,
        errors: str = "raise",
        **fields: Any,
    ) -> Any: ...

    async def generate(
        self,
        prompts: Any,
        sampling: Sampling = None,
        *,
        errors: str = "raise",
        **fields: Any,
    ) -> Any:
        """Generate as `Client.generate` does. Cancelling the task cancels its requests."""
        call = Call(prompts, sampling, fields, errors)
        results = Results(call)
        async for event in self._events(call, stream=False):
            results.add(event)
        return results.result()

    async def score(self, prompts: Any, completions: Any = None, *, cache_salt: str | None = None) -> Any:
        """Score completions as `Client.score` does."""
        pairs, single = scoring_pairs(split(prompts), None if completions is None else split(completions))
        return scores_of(await self.generate(pairs, replace(SCORES, cache_salt=cache_salt)), single)

    def stream(
        self,
        prompts: Any,
        sampling: Sampling = None,
        *,
        errors: str = "raise",
        **fields: Any,
    ) -> AsyncIterator[TokenEvent]:
        """Generate as `Client.stream` does. The requests are cancelled when the iterator is closed (`aclose()`)."""
        return self._events(Call(prompts, sampling, fields, errors), stream=True)

    async def _events(self, call: Call, *, stream: bool) -> AsyncIterator[TokenEvent]:
        link = await self._connected()
        exchange = Exchange(call, link.hello["limits"], wait=self._wait, stream=stream, brief=self._brief)
        box = Box()
        silent_since = time.monotonic()
        for event in exchange.refused:
            yield event
        try:
            while not exchange.finished:
                now = time.monotonic()
                while (message := exchange.next_message(now)) is not None:
                    exchange.sent(link.post(message, box))
                pause = None
                if box.empty():  # else nothing is waited for
                    left = None if self._timeout is None else self._timeout - (now - silent_since)
                    if left is not None and left <= 0:
                        raise ServerError(f"the server sent nothing for {self._timeout:g} s; see ping()", "timeout")
                    pauses = [seconds for seconds in (left, exchange.pause(now)) if seconds is not None]
                    pause = min(pauses, default=None)
                answer = await link.receive(box, pause)
                if answer is None:
                    continue
                silent_since = time.monotonic()
                if answer["type"] == "error" or answer.get("last"):
                    link.boxes.pop(answer["id"], None)
                taken = exchange.take(answer, silent_since)
                if taken is not None:
                    yield taken
        finally:
            for key in exchange.active:
                link.boxes.pop(key, None)
                if link.error is None:
                    link.cancel(key)

    async def ping(self) -> dict[str, Any]:
        """See `Client.ping`."""
        return await self._ask("ping")

    async def stats(self) -> dict[str, Any]:
        """See `Client.stats`."""
        return await self._ask("stats")

    async def shutdown(self) -> None:
        """See `Client.shutdown`."""
        await self._ask("shutdown")

    async def cancel(self, request: int | None = None) -> None:
        """See `Client.cancel`."""
        link = await self._connected()
        for key in list(link.boxes) if request is None else [request]:
            link.cancel(key)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """See `Client.in_flight`."""
        return () if self._link is None else tuple(self._link.boxes)

    async def _ask(self, kind: str) -> dict[str, Any]:
        link = await self._connected()
        box = Box()
        key = link.post({"type": kind}, box)
        try:
            answer = await link.receive(box, self._timeout)
        finally:
            link.boxes.pop(key, None)
        if answer is None:
            raise ServerError(
                f"the server did not answer a {kind} within {self._timeout:g} s; does it hang?", "timeout"
            )
        if answer["type"] == "error":
            raise error_from_wire(answer)
        return {name: value for name, value in answer.items() if name not in ("type", "id")}

    async def close(self) -> None:
        """End the connection; what is in flight is cancelled. Closing twice is fine."""
        self._closed = True
        if self._link is not None:
            self._link.fail("this client was closed")

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
