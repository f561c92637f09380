"""The prompts of one call, and which replica runs which.

A list is dealt at the beginning, as far as the replicas have rows for it: the longest first, each to the replica that
has the fewest tokens to make. Replicas that took what they could get would not have equal shares: one begins some
milliseconds before the other, takes the longest, and more than it has rows for. What is left is pulled by whoever has
room, and no replica holds more than its rows and its part of what is left.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hybridgen.core import Completion, TokenEvent
from hybridgen.errors import HybridgenError, RequestError, ServerBusyError, ServerError
from hybridgen.serving.client.client import Client
from hybridgen.serving.client.exchange import Call, Exchange
from hybridgen.serving.client.link import Link, Mailbox
from hybridgen.serving.replicas.jobs import Job, dealt, job_of, length
from hybridgen.serving.replicas.member import Member

IDLE_SECONDS = 1.0
"""Between two looks at a replica that has nothing to do."""
TRIES = 3
"""Replicas that may die under a prompt. With the last of them it is alone, so that no other prompt is blamed."""
TURN_SECONDS = 0.05
"""How long a replica's thread waits for an answer before it looks for more prompts."""

JOIN_SECONDS = 1.0
"""How long a call that ends waits for its threads: one of them may be starting a replica."""


class Work:
    """One call: its prompts are pulled by whichever replica has room, and its events come out of `events()`."""

    def __init__(
        self,
        call: Call | None,
        members: list[Member],
        rows: int,
        depth: int,
        *,
        stream: bool = False,
        report: bool = True,
    ) -> None:
        """
        Args:
            call: whose prompts are run; None: those that `add()` brings, until `stop()`.
            rows: completions that one replica makes at once.
            depth: completions that one replica has at once, those that wait for a row included.
            stream: whether every token is an event, or completions alone.
            report: ask each replica for its statistics when it has nothing more to do.
        """
        self._members = members
        self._rows, self._depth = rows, depth
        self._report = report
        self._open = call is None
        self._errors = "return" if call is None or call.returns_errors else "raise"
        jobs = (
            []
            if call is None
            else [
                job_of(index, prompt, params, stream)
                for index, (prompt, params) in enumerate(zip(call.prompts, call.sampling, strict=True))
            ]
        )
        # The longest first: one that begins last would keep one replica busy while the others have nothing.
        jobs = sorted(jobs, key=length, reverse=True)
        shares = dealt(jobs, len(members), rows)
        self._dealt = {member.number: share for member, share in zip(members, shares, strict=True)}
        """What each replica runs of what there was at the beginning."""
        given = {id(job) for share in shares for job in share}
        self._waiting = deque(job for job in jobs if id(job) not in given)
        """What whoever has room runs."""
        self._left = len(jobs)
        self._changed = threading.Condition()
        self._stopped = False
        self._working = len(members)
        self._out: queue.SimpleQueue[TokenEvent | HybridgenError | None] = queue.SimpleQueue()

    def events(self) -> Iterator[TokenEvent]:
        """Run it. Closing the iterator cancels what is left.

        Raises:
            HybridgenError: a prompt is refused (unless the call wants that returned), or no replica can be kept alive.
        """
        self.start()
        try:
            while (event := self._out.get()) is not None:
                if isinstance(event, HybridgenError):
                    raise event
                yield event
        finally:
            self.stop()
            with self._changed:
                self._changed.wait_for(lambda: not self._working, JOIN_SECONDS)

    def start(self) -> None:
        """Begin to run what waits, and what is added, in a thread for each replica."""
        threads = [
            threading.Thread(target=self._serve, args=(member,), daemon=True, name=f"hybridgen-replica-{member.number}")
            for member in self._members
        ]
        for thread in threads:
            thread.start()

    def add(self, jobs: list[Job]) -> None:
        """Run more prompts, behind those that wait."""
        with self._changed:
            self._waiting.extend(jobs)
            self._left += len(jobs)
            self._changed.notify_all()

    def take(self, timeout: float) -> TokenEvent | HybridgenError | None:
        """The next event, of the prompt whose number is its `index`, or what ended all; None: none came in time."""
        try:
            return self._out.get(timeout=timeout)
        except queue.Empty:
            return None

    def cancel(self, job: Job) -> bool:
        """End a prompt where it is; True if it waits and nothing more comes of it, else its last events come."""
        with self._changed:
            job.cancelled = True
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            self._ended(job)
            return True

    def stop(self) -> None:
        """Cancel what is left."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _serve(self, member: Member) -> None:
        """Keep one replica busy until nothing is left; in a thread of its own."""
        lost: HybridgenError | None = None
        try:
            while True:
                if self._open:  # one that died is started again soon, not only when there is work for it
                    member.client()
                more = self._more(IDLE_SECONDS if self._open else None)
                if more is None:
                    continue
                if not more:
                    break
                _Runner(self, member, member.client()).run()
        except HybridgenError as error:
            lost = error
        except BaseException as error:  # a mistake of ours must not leave the caller waiting
            lost = ServerError(f"replica {member.number} cannot be used: {type(error).__name__}: {error}")
        with self._changed:
            self._working -= 1
            if lost is not None and self._working == 0 and (self._left or self._open) and not self._stopped:
                self._out.put(lost)
            elif lost is None and self._working == 0 and self._left and not self._stopped:
                self._out.put(ServerError("all replicas ended with prompts left; this is a bug"))
            self._changed.notify_all()
        if self._report and lost is None:  # nobody waits for it: a replica that records a graph answers only then
            member.report()

    def _more(self, seconds: float | None) -> bool | None:
        """Wait for a prompt, one that is given back included; False when there will be none, None when none came."""
        with self._changed:
            while not self._anything() and (self._left or self._open) and not self._stopped:
                if not self._changed.wait(seconds):
                    return None
            return bool(self._left or self._open) and not self._stopped

    @property
    def stopped(self) -> bool:
        """Whether what runs is to be cancelled."""
        return self._stopped

    def _anything(self) -> bool:
        """Whether a prompt has not begun."""
        return bool(self._waiting) or any(self._dealt.values())

    def pull(self, number: int, running: list[Job]) -> Job | None:
        """The next prompt for a replica that runs these; None when it shall have no more now.

        Args:
            number: the replica's.
        """
        with self._changed:
            source = self._source(number, idle=not running)
            if not source or self._stopped:
                return None
            job = source[0]
            alone = job.deaths >= TRIES - 1 or any(each.deaths >= TRIES - 1 for each in running)
            if running and (alone or self._too_many(job, running, own=source is self._dealt.get(number))):
                return None
            return source.popleft()

    def _source(self, number: int, *, idle: bool) -> deque[Job]:
        """Where a replica's next prompt is: in its share, among those that nobody has, and last in another's share,
        whose replica may be starting again."""
        if own := self._dealt.get(number):
            return own
        if self._waiting or not idle:
            return self._waiting
        return max(self._dealt.values(), key=len, default=self._waiting)

    def _too_many(self, job: Job, running: list[Job], *, own: bool) -> bool:
        """Whether a replica shall not have this too. Of what it was not dealt it takes no more than its part of what
        has not ended: the first to look would have all, and the others nothing."""
        if sum(each.sampling.n for each in (*running, job)) > self._depth:
            return True
        return not own and len(running) >= -(-self._left // max(1, self._working))

    def give_back(self, jobs: list[Job], why: str | None) -> None:
        """Put back what a replica had.

        Args:
            why: it died, and of what; None: it only had no room.
        """
        with self._changed:
            for job in sorted(jobs, key=length):
                job.deaths += why is not None
                if job.deaths < TRIES:
                    self._waiting.appendleft(job)
                    continue
                error = RequestError(
                    f"prompt {job.index} ran on {job.deaths} replicas that died, the last time alone ({why}); leave it "
                    "out, or run it with one engine to see what it does"
                )
                for choice in range(job.sampling.n):
                    if choice not in job.ended:
                        job.ended.add(choice)
                        self._out.put(_refused(job, choice, error))
                self._ended(job)
            self._changed.notify_all()

    def event(self, job: Job, event: TokenEvent) -> None:
        """Hand an event on, unless the caller has had it from a replica that died."""
        with self._changed:
            choice = event.choice
            if choice in job.ended:
                return
            if event.completion is not None:
                job.ended.add(choice)
            self._out.put(replace(event, index=job.index))

    def done(self, job: Job) -> None:
        """A prompt has all its completions."""
        with self._changed:
            for choice in range(job.sampling.n) if self._open else ():
                if choice not in job.ended:  # the prompt was refused as a whole, and told once
                    job.ended.add(choice)
                    self._out.put(_refused(job, choice, RequestError("its prompt was refused by the replica")))
            self._ended(job)

    def _ended(self, job: Job) -> None:
        self._left -= 1
        if not self._left and not self._open:
            self._out.put(None)
        self._changed.notify_all()

    def fail(self, error: HybridgenError) -> None:
        """End the call with an error."""
        self._out.put(error)
        self.stop()

    def exchange(self, job: Job, link: Link) -> Exchange:
        """The messages of one prompt."""
        part = Call([job.prompt], [job.sampling], {}, self._errors)
        # A full queue gives the prompt to another replica.
        return Exchange(part, link.hello["limits"], wait=0.0, stream=job.stream)

    def reported(self, member: Member) -> None:
        """A replica has nothing to do for now, and others have: it may die before all have ended."""
        if self._report and self._left:
            member.report()


def _refused(job: Job, choice: int, error: RequestError) -> TokenEvent:
    """The last event of a completion that was not made."""
    failed = replace(Completion.refused(error, _text(job.prompt), job.sampling.seed), choices=())
    return TokenEvent(token_id=None, text="", index=job.index, choice=choice, completion=failed)


class _Runner:
    """A replica while it lives: what it has of a call."""

    def __init__(self, work: Work, member: Member, client: Client) -> None:
        self._work = work
        self._member = member
        self._link = client.link()
        self._box = Mailbox()
        self._running: dict[int, tuple[Job, Exchange, dict[int, int]]] = {}
        self._told: set[int] = set()
        """Requests that the replica was told to cancel."""

    def run(self) -> None:
        """Pull prompts and hand on their events until nothing is left, or the replica dies."""
        job: Job | None = None
        try:
            while not self._work.stopped:
                while (job := self._work.pull(self._member.number, self._held())) is not None:
                    self._send(job)
                if not self._running:
                    break
                self._cancel_unwanted()
                answer = self._link.receive(self._box, TURN_SECONDS)
                if answer is not None:
                    self._take(answer)
            if not self._running:
                self._work.reported(self._member)
        except ServerError as error:
            if not self._link.closed:
                self._work.fail(error)
                return
            if not self._member.dead():
                self._member.kill()  # it lives and does not talk
            jobs = {id(each): each for each, *_ in self._running.values()}
            if job is not None:
                jobs[id(job)] = job
            self._running.clear()
            self._work.give_back(list(jobs.values()), str(error).partition(";")[0] + self._member.last_words())
        except HybridgenError as error:
            self._work.fail(error)
        finally:
            self._cancel()

    def _held(self) -> list[Job]:
        return [job for job, *_ in self._running.values()]

    def _send(self, job: Job) -> None:
        exchange = self._work.exchange(job, self._link)
        for event in exchange.refused:
            self._work.event(job, event)
        if exchange.finished:
            self._work.done(job)
        self._post(job, exchange)

    def _post(self, job: Job, exchange: Exchange) -> None:
        while (message := exchange.next_message(time.monotonic())) is not None:

            def begun(key: int) -> None:
                exchange.sent(key)
                self._running[key] = (job, exchange, {})

            self._link.post(message, self._box, begun)

    def _take(self, answer: dict[str, Any]) -> None:
        key = answer["id"]
        if key not in self._running:
            return
        job, exchange, seen = self._running[key]
        over = answer["type"] == "error" or bool(answer.get("last"))
        if over:
            self._link.forget(key)
            del self._running[key]
        try:
            event = exchange.take(answer, time.monotonic())
        except ServerBusyError as error:
            self._work.give_back([job], None)
            time.sleep(min(error.retry_after, 1.0))
            return
        except HybridgenError as error:
            error.args = (_numbered(str(error), job.index), *error.args[1:])
            raise
        if event is not None:
            self._hand_on(job, event, seen)
        if over:
            if exchange.finished:
                self._work.done(job)
            else:
                self._post(job, exchange)

    def _hand_on(self, job: Job, event: TokenEvent, seen: dict[int, int]) -> None:
        completion = event.completion
        if completion is not None and completion.error is not None:
            completion.error.args = (_numbered(str(completion.error), job.index), *completion.error.args[1:])
        if event.token_id is not None:
            seen[event.choice] = seen.get(event.choice, 0) + 1
            if seen[event.choice] <= job.given.get(event.choice, 0):
                if completion is None:
                    return  # the caller had it from a replica that died
                event = replace(event, token_id=None, text="")
            else:
                job.given[event.choice] = seen[event.choice]
        self._work.event(job, event)

    def _cancel_unwanted(self) -> None:
        for key, (job, *_) in self._running.items():
            if job.cancelled and key not in self._told:
                self._told.add(key)
                self._link.cancel(key)

    def _cancel(self) -> None:
        """Cancel what is left behind."""
        for key in list(self._running):
            self._link.forget(key)
            if not self._link.closed:
                try:
                    self._link.cancel(key)
                except ServerError:
                    return


def _text(prompt: Any) -> str | None:
    return prompt if isinstance(prompt, str) else None


def _numbered(text: str, index: int) -> str:
    """An error of a call of one prompt, with the prompt's number in the caller's."""
    return f"prompt {index} {text.removeprefix('prompt 0 ')}" if text.startswith("prompt 0 ") else text
