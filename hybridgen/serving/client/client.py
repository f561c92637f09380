"""A client that looks like an engine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, overload

from hybridgen.arguments import SCORES, ManyPrompts, OnePrompt, Sampling, end_streamer, scores_of, scoring_pairs
from hybridgen.core import Completion, TokenEvent
from hybridgen.errors import HybridgenError, Interrupted, ServerError
from hybridgen.serving.client.exchange import Call, Exchange, Results, split
from hybridgen.serving.client.link import Link, Mailbox
from hybridgen.serving.unix.address import socket_path
from hybridgen.serving.unix.messages import error_from_wire

INTERRUPT_SECONDS = 5.0
"""How long Ctrl-C waits for what the cancelled requests had."""


class Client:
    """Generates text in a generator process (`hybridgen serve`), with the methods of an `Engine`.

    Threads may share it. Use it as a context manager, or call `close()`; what is then in flight is cancelled.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
        wait: float = 60.0,
        patience: float = 0.0,
    ) -> None:
        """Connect. A later call connects again when the connection was lost.

        Args:
            path: of the server's socket; None: the default one, which `hybridgen serve` listens on without `--socket`.
            timeout: seconds without a message from the server after which a call gives up; None: never.
            wait: seconds for which a call tries again while the server's queue is full; 0: it raises
                `ServerBusyError` at once.
            patience: seconds for which connecting is tried again while nobody listens there, for a server that is just
                being started.

        Raises:
            ServerError: nobody listens there, or not this user's server.
        """
        self.path = socket_path(path)
        self._timeout = timeout
        self._wait = wait
        self._lock = threading.Lock()
        self._closed = False
        self._link = Link(self.path, patience)

    @property
    def server(self) -> dict[str, Any]:
        """What the server said of itself: `model`, `mode`, `max_batch`, `max_context` and its `limits`."""
        return dict(self._link.hello)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a string is one prompt
        self,
        prompts: OnePrompt,
        sampling: Sampling = None,
        *,
        streamer: Any = None,
        errors: str = "raise",
        **fields: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: ManyPrompts,
        sampling: Sampling = None,
        *,
        streamer: Any = None,
        errors: str = "raise",
        **fields: Any,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Any,
        sampling: Sampling = None,
        *,
        streamer: Any = None,
        errors: str = "raise",
        **fields: Any,
    ) -> Any: ...

    def generate(
        self,
        prompts: Any,
        sampling: Sampling = None,
        *,
        streamer: Any = None,
        errors: str = "raise",
        **fields: Any,
    ) -> Any:
        """Generate as `Engine.generate` does.

        Times in the completions are the server's. More prompts than one request holds go in several; those in a full
        queue are tried again.

        Raises:
            PromptError, SamplingError, TokenizerError: as the engine does; ConfigError: an unknown keyword.
            ServerBusyError: the queue stayed full.
            ServerError: the server cannot be reached, refused the call, or went away.
            RequestError: the one prompt failed while it ran.
            Interrupted: Ctrl-C; holds what was finished.
        """
        try:
            results = self._generate(Call(prompts, sampling, fields, errors), streamer)
        finally:
            end_streamer(streamer)
        return results.result()

    def score(self, prompts: Any, completions: Any = None, *, cache_salt: str | None = None) -> Any:
        """Score completions as `Engine.score` does.

        Raises:
            PromptError, TokenizerError: as the engine does.
            ServerBusyError, ServerError, RequestError, Interrupted: see `generate()`.
        """
        pairs, single = scoring_pairs(split(prompts), None if completions is None else split(completions))
        return scores_of(self.generate(pairs, replace(SCORES, cache_salt=cache_salt)), single)

    def _generate(self, call: Call, streamer: Any) -> Results:
        """Run a call to its end."""
        results = Results(call)
        if streamer is not None:
            call.check_streamer(streamer)
        link = self._connected()
        exchange = Exchange(call, link.hello["limits"], wait=self._wait, stream=streamer is not None, echo=True)
        box = Mailbox()
        try:
            for event in self._events(link, exchange, box, None if streamer is None else _Feeder(streamer)):
                results.add(event)
        except KeyboardInterrupt:
            ended = results.ended
            self._rescue(link, exchange, box, results)
            raise Interrupted(
                f"interrupted with {ended} of {len(call.prompts)} requests finished; they are in .completions",
                results.complete(),
            ) from None
        finally:
            self._abandon(link, exchange)
        return results

    def stream(
        self,
        prompts: Any,
        sampling: Sampling = None,
        *,
        errors: str = "raise",
        **fields: Any,
    ) -> Iterator[TokenEvent]:
        """Generate as `Engine.stream` does, and yield each token as it comes.

        The requests start with the first `next()` and are cancelled when the iterator is closed. A stream that is not
        read for long is cut off by the server, and with it all that this client has in flight.
        """
        return self.stream_call(Call(prompts, sampling, fields, errors))

    def stream_call(self, call: Call) -> Iterator[TokenEvent]:
        """`stream()` of arguments that were checked."""
        link = self._connected()
        exchange = Exchange(call, link.hello["limits"], wait=self._wait, stream=True)
        try:
            yield from self._events(link, exchange, Mailbox())
        finally:
            self._abandon(link, exchange)

    def _events(
        self, link: Link, exchange: Exchange, box: Mailbox, feeder: _Feeder | None = None
    ) -> Iterator[TokenEvent]:
        silent_since = time.monotonic()
        yield from exchange.refused
        while not exchange.finished:
            now = time.monotonic()
            while (message := exchange.next_message(now)) is not None:
                link.post(message, box, exchange.sent)
            pause = exchange.pause(now)
            left = None if self._timeout is None else self._timeout - (now - silent_since)
            if left is not None and left <= 0:
                raise ServerError(
                    f"the server sent nothing for {self._timeout:g} s; see ping(), or raise timeout", "timeout"
                )
            answer = link.receive(box, pause if left is None else left if pause is None else min(left, pause))
            if answer is None:
                continue
            silent_since = time.monotonic()
            if answer["type"] == "error" or answer.get("last"):
                link.forget(answer["id"])
            if feeder is not None:
                feeder.take(answer)
            event = exchange.take(answer, silent_since)
            if event is not None:
                yield event

    def _rescue(self, link: Link, exchange: Exchange, box: Mailbox, results: Results) -> None:
        """After Ctrl-C: cancel, and take what the cancelled requests had."""
        exchange.drop_waiting()
        deadline = time.monotonic() + INTERRUPT_SECONDS
        try:
            for key in exchange.active:
                link.cancel(key)
            while not exchange.finished and time.monotonic() < deadline:
                answer = link.receive(box, deadline - time.monotonic())
                event = None if answer is None else exchange.take(answer, time.monotonic())
                if event is not None:
                    results.add(event)
        except HybridgenError:
            return  # what came before is in the results

    @staticmethod
    def _abandon(link: Link, exchange: Exchange) -> None:
        """Cancel what a call leaves behind."""
        if link.foreign:
            return
        for key in exchange.active:
            link.forget(key)
            if not link.closed:
                try:
                    link.cancel(key)
                except ServerError:
                    return  # the connection is gone, and the requests with it

    def ping(self) -> dict[str, Any]:
        """Whether the server is alive: `healthy`, `steps`, `step_age` and `work_age` in seconds, and more.

        It is answered without the engine, so that an engine that hangs shows as `healthy: False`.
        """
        return self._ask("ping")

    def stats(self) -> dict[str, Any]:
        """`engine`: `EngineStats.as_dict()` of the server's engine; `server`: `ping()` and counts of requests."""
        return self._ask("stats")

    def shutdown(self) -> None:
        """Tell the server to end when what is in flight has ended."""
        self._ask("shutdown")

    def cancel(self, request: int | None = None) -> None:
        """End a request of this client that another thread waits for, or all: they have what they had.

        Args:
            request: one of `in_flight`.
        """
        link = self._connected()
        for key in link.in_flight if request is None else (request,):
            link.cancel(key)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Ids of this client's unanswered requests."""
        return self._link.in_flight

    def _ask(self, kind: str) -> dict[str, Any]:
        link = self._connected()
        box = Mailbox()
        key = link.post({"type": kind}, box)
        try:
            answer = link.receive(box, self._timeout)
        finally:
            link.forget(key)
        if answer is None:
            raise ServerError(
                f"the server did not answer a {kind} within {self._timeout:g} s; does it hang?", "timeout"
            )
        if answer["type"] == "error":
            raise error_from_wire(answer)
        return {name: value for name, value in answer.items() if name not in ("type", "id")}

    def link(self) -> Link:
        """The connection that there is; it is not made anew."""
        return self._link

    def _connected(self) -> Link:
        """The connection; a new one if it was lost, or if this process was forked from the one that made it."""
        with self._lock:
            if self._closed:
                raise ServerError("this client is closed; make a new one")
            if not self._link.foreign:
                self._link.catch_up()
            if self._link.closed or self._link.foreign:
                self._link = Link(self.path)
            return self._link

    def close(self) -> None:
        """End the connection. Closing twice is fine."""
        self._closed = True
        self._link.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Feeder:
    """Feeds a Hugging Face streamer: the prompt's ids [1, P] first, then each token's id [1], as `Engine` does."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._begun = False

    def take(self, message: Mapping[str, Any]) -> None:
        """Feed what a message of the stream brings."""
        import torch

        if message["type"] not in ("token", "done"):
            return
        if not self._begun:
            self._begun = True
            prompt = message.get("prompt_token_ids") or message["completion"]["prompt_token_ids"]
            self._streamer.put(torch.tensor([prompt], device="cpu"))
        if message["token_id"] is not None:
            self._streamer.put(torch.tensor([message["token_id"]], device="cpu"))
