"""The service: who asks, what is in flight, and whether the engine goes on. Requests go in, events come out.

Everything here runs in the thread of the door's event loop, unless it says otherwise.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from hybridgen.errors import HybridgenError, ServerBusyError, ServerError
from hybridgen.serving.service.adapter import Model
from hybridgen.serving.service.admission import Admission
from hybridgen.serving.service.encoding import Encoder
from hybridgen.serving.service.generator import (
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
    Token,
    Told,
)
from hybridgen.serving.service.intake import Request, check_request
from hybridgen.serving.service.limits import Limits
from hybridgen.serving.service.watch import Watch

logger = logging.getLogger(__name__)


class Outlet(Protocol):
    """Where the answers for one client go: its door makes messages of them."""

    def tokens(self, tokens: list[Token]) -> None:
        """Tokens of streams. Called by the generator's thread, before what comes after them."""

    def done(self, done: Done) -> None:
        """The end of one completion."""

    def failed(self, key: int, error: BaseException) -> None:
        """A request, or a question for statistics, ended with an error."""

    def told(self, key: int, engine: dict[str, Any], server: dict[str, Any]) -> None:
        """Statistics that were asked for."""


class Owner(Protocol):
    """Who starts and ends the service."""

    def ready(self) -> None:
        """The model is loaded."""

    def settled(self) -> None:
        """Something ended, or a client left: `Service.settled` may have become true."""

    def generator_ended(self, error: BaseException | None) -> None:
        """Nothing runs any more; with the error that ended it, if there was one."""


class Member:
    """One client."""

    def __init__(self, number: int, outlet: Outlet) -> None:
        self.number = number
        self.outlet = outlet
        self.requests: dict[int, Submit] = {}
        """In flight, by id."""
        self.controls: set[int] = set()
        """Ids of unanswered questions for statistics."""


class Service:
    """Takes requests of its members, runs them in one batch, and answers each of them, whatever happens."""

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        limits: Limits,
        step_seconds: float,
        on_done: Callable[[Done], None] = lambda done: None,
    ) -> None:
        """
        Args:
            load: makes the model, in the generator's thread.
            step_seconds: a piece of the generator's work that takes longer is taken as hung.
            on_done: called with each completion (for metrics).
        """
        self.limits = limits
        # All names from the start: another thread may copy it.
        self.counts = Counter(dict.fromkeys(("requests", "completions", "errors", "busy", "tokens", "cut_off"), 0))
        """Since the start."""
        self.state = "loading"
        """`loading`, `ready`, `draining`, or `ended`; its owner sets it."""
        self.description: dict[str, Any] = {}
        """What the model tells of itself, once it is loaded."""
        self.last_request = time.monotonic()
        """When a request came or ended."""
        self.generator = Generator(load, self._post, self._deliver)
        self._watch = Watch(self.generator, step_seconds)
        self._admission = Admission(limits)
        self._encoder: Encoder | None = None
        self._on_done = on_done
        self._owner: Owner | None = None
        self._call: Callable[..., object] | None = None
        self._members: dict[int, Member] = {}
        self._opened = 0
        self._encoding: dict[Key, bool] = {}
        """Requests whose prompts are being encoded, and whether they were cancelled meanwhile."""

    def start(self, owner: Owner, call_soon: Callable[..., object], longest_tick: float) -> None:
        """Load the model in another thread.

        Args:
            call_soon: calls a function with arguments in this thread, soon; from any thread. It raises `RuntimeError`
                when nothing can be called any more.
            longest_tick: seconds between two calls of `check()`, if the process does not stand still.
        """
        self._owner = owner
        self._call = call_soon
        self._watch.start(longest_tick)
        self.generator.start()

    def stop(self) -> None:
        """End the threads, as soon as they can."""
        self.generator.send(Stop())
        if self._encoder is not None:
            self._encoder.stop()

    @property
    def in_flight(self) -> int:
        """Completions that were accepted and have not ended."""
        return self._admission.in_flight

    @property
    def settled(self) -> bool:
        """Whether nothing waits for an answer."""
        return not any(member.requests or member.controls for member in self._members.values())

    # From the doors.

    def join(self, outlet: Outlet) -> Member:
        """Take a new client in.

        Raises:
            ServerError: there are too many.
        """
        if len(self._members) >= self.limits.clients:
            raise ServerError(f"the server has {self.limits.clients} clients, its limit; try again later", "clients")
        self._opened += 1
        member = Member(self._opened, outlet)
        self._members[member.number] = member
        return member

    def leave(self, member: Member) -> None:
        """A client is gone: what it asked for ends at the next step. Once is enough."""
        if self._members.pop(member.number, None) is None:
            return
        for submit in member.requests.values():
            self._admission.release(submit)
        if member.requests or member.controls:
            self._forget(list(member.requests.values()))
            self.generator.drop(member.number)
            self.last_request = time.monotonic()
        member.requests.clear()
        member.controls.clear()
        self._tell_settled()

    def submit(self, member: Member, key: int, request: Request) -> None:
        """Check a request and queue it; its answers go to the member's outlet.

        Args:
            key: its id, which none of the member's requests in flight has.

        Raises:
            HybridgenError: it is wrong, too large, or there is no room for it.
        """
        self.check_open()
        weight = check_request(request, self.limits, self.description["max_context"])
        submit = Submit(
            Key(member.number, key),
            request.prompts,
            request.sampling,
            request.stream,
            request.echo,
            weight,
            request.brief,
        )
        try:
            self._admission.check(submit)
        except ServerBusyError:
            self.counts["busy"] += 1
            raise
        if self._encoder is None or not self._encoder.put(submit):
            self.generator.send(submit)
        else:
            self._encoding[submit.key] = False
        self.last_request = time.monotonic()
        self.counts["requests"] += 1
        self._admission.take(submit)
        member.requests[key] = submit

    def refused(self, error: HybridgenError) -> None:
        """Count a request that was answered with an error at once. A full queue has a count of its own."""
        self.last_request = time.monotonic()
        if not isinstance(error, ServerBusyError):
            self.counts["errors"] += 1

    def check_open(self) -> None:
        """
        Raises:
            ServerError: the server is ending, or the generator hangs.
        """
        if self.state != "ready":
            raise ServerError("the server is ending and takes no more requests", "shutting_down")
        if self._watch.stuck:
            raise self._watch.error()

    def cancel(self, member: Member, key: int) -> None:
        """End a request; it is answered as usual. One that is not in flight has just ended."""
        if key in member.requests:
            self._cancel(Key(member.number, key))

    def ask_stats(self, member: Member, key: int) -> None:
        """Ask the generator for statistics.

        Raises:
            ServerError: too many of these wait, the server is ending, or the generator hangs.
        """
        self.check_open()
        if len(member.controls) >= self.limits.controls:
            raise ServerBusyError(f"{self.limits.controls} stats messages wait for an answer; read it first", 0.1)
        member.controls.add(key)
        self.generator.send(Stats(Key(member.number, key)))

    def count(self, what: str, amount: int = 1) -> None:
        """Count something that a door saw."""
        self.counts[what] += amount

    def health(self) -> dict[str, Any]:
        """Whether it is alive: a generator that hangs has an old step while it works, and is not healthy.

        From any thread; the generator is not asked.
        """
        facts = self._watch.facts()
        return {
            "state": self.state,
            **facts,
            "healthy": self.state == "loading" or facts["healthy"],
            "in_flight": self.in_flight,
            "clients": len(self._members),
            "pid": os.getpid(),
        }

    # From the owner.

    def check(self, now: float) -> None:
        """Look at the clocks; called every now and then."""
        self._check_generator(now)
        if self._encoder is not None:
            self._encoder.check(now)
        if not self.generator.is_alive():  # after what it may have posted last
            self._call_soon(self._take, Ended(None))

    def thaw(self, now: float, gap: float) -> None:
        """The process stood still until now: nobody is to blame for that time."""
        self._watch.thaw(now)
        self.last_request += gap
        if self._encoder is not None:
            self._encoder.shift(gap)

    def fail_all(self, error: BaseException) -> None:
        """Answer everybody who waits with an error."""
        for member in list(self._members.values()):
            for key in [*member.requests, *member.controls]:
                self._cancel(Key(member.number, key))
                self._fail(Key(member.number, key), error)

    def _cancel(self, key: Key) -> None:
        if key in self._encoding:
            self._encoding[key] = True
        else:
            self.generator.send(Cancel(key))

    def _forget(self, submits: list[Submit]) -> None:
        """Requests are no longer wanted: those that still wait for a tokenizer need not be encoded."""
        waiting = [submit.key for submit in submits if submit.key in self._encoding]
        for key in waiting:
            del self._encoding[key]
        if waiting and self._encoder is not None:
            self._encoder.drop(waiting)

    def _check_generator(self, now: float) -> None:
        """Answer everybody when the generator hangs: they would wait for ever."""
        if not self._watch.look(now, loading=self.state == "loading"):
            return
        if not self._watch.stuck:
            logger.warning("the generator goes on")
            return
        logger.error("a step has not ended after %.0f s; what waits for it fails", self._watch.seconds)
        self.fail_all(self._watch.error())

    def _tell_settled(self) -> None:
        if self._owner is not None:
            self._owner.settled()

    # From other threads.

    def _call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the thread of the event loop. From any thread."""
        if self._call is not None:
            with suppress(RuntimeError):  # the loop has ended, and with it everybody who could be told
                self._call(function, *arguments)

    def _post(self, outcomes: list[Outcome]) -> None:
        """From the generator's thread."""
        self._call_soon(self._receive, outcomes)

    def _deliver(self, client: int, tokens: list[Token]) -> None:
        """From the generator's thread."""
        member = self._members.get(client)
        if member is not None:
            self.counts["tokens"] += len(tokens)
            member.outlet.tokens(tokens)

    def _encoded(self, submit: Submit) -> None:
        """From a thread of the encoder."""
        self._call_soon(self._send_encoded, submit)

    def _not_encoded(self, key: Key, error: BaseException) -> None:
        """From a thread of the encoder."""
        self._call_soon(self._receive, [Failed(key, error)])

    # In this thread again.

    def _send_encoded(self, submit: Submit) -> None:
        cancelled = self._encoding.pop(submit.key, None)
        if cancelled is None:
            return  # its client is gone, or was told that it took too long
        member = self._members.get(submit.key.client)
        if member is not None and submit.key.id in member.requests:
            member.requests[submit.key.id] = submit  # the text is not needed any more
        self.generator.send(submit)
        if cancelled:
            self.generator.send(Cancel(submit.key))

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
            member = self._members.get(outcome.key.client)
            if member is not None and outcome.key.id in member.controls:
                member.controls.remove(outcome.key.id)
                server = {**self.health(), "counts": dict(self.counts)}
                member.outlet.told(outcome.key.id, outcome.stats, server)
                self._tell_settled()
        elif isinstance(outcome, Ready):
            self._open(outcome)
        elif self._owner is not None:
            self._owner.generator_ended(outcome.error)

    def _open(self, ready: Ready) -> None:
        self.description = ready.description
        self._encoder = Encoder(
            ready.encode, ready.read_grammar, self._encoded, self._not_encoded, self.limits.encode_seconds
        )
        if self._owner is not None:
            self._owner.ready()

    def _complete(self, done: Done) -> None:
        member = self._members.get(done.key.client)
        submit = member.requests.get(done.key.id) if member is not None else None
        if member is None or submit is None:
            return  # its client is gone, or was told that the generator hangs
        self.counts["completions"] += 1
        self.last_request = time.monotonic()
        self._admission.completed(self.last_request)
        self._on_done(done)
        member.outlet.done(done)  # first: if it fails, the request is still there to be answered with an error
        if done.last and member.requests.pop(done.key.id, None) is not None:  # else the client went away over it
            self._admission.release(submit)
        self._tell_settled()

    def _fail(self, key: Key, error: BaseException) -> None:
        """Answer a request with an error, if it is still in flight."""
        member = self._members.get(key.client)
        if member is None:
            return
        submit = member.requests.pop(key.id, None)
        if submit is None and key.id not in member.controls:
            return
        member.controls.discard(key.id)
        if submit is not None:
            self._forget([submit])
            self.last_request = time.monotonic()
            self._admission.release(submit)
        self.counts["errors"] += 1
        member.outlet.failed(key.id, error)
        self._tell_settled()
