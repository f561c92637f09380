"""Threads that make token ids of text and chats and read grammars, so that no step waits for a tokenizer, a chat
template or a schema.

Short texts, long ones, chats and requests with a grammar have a thread each. Within one, clients take turns, so that
one with a thousand texts does not have the others wait for all of them. A text's length is limited by the intake, what
a chat template may take by `text.chat_templates`; a tokenizer runs in this process and cannot be stopped, so one that
takes too long is left behind with its thread, and another thread goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hybridgen.errors import HybridgenError, ServerError
from hybridgen.params import GRAMMARS, SamplingParams
from hybridgen.serving.service.generator import Key, Submit

logger = logging.getLogger(__name__)

MAX_LOST = 4
"""Threads of one kind that may be left behind with a tokenizer that does not end."""

LONG_CHARS = 2**15
"""A request with more characters of text waits with others that are as long."""


def needs_encoding(prompt: Any) -> bool:
    """Whether a prompt is text or a chat, and not a list of ids; one with a completion, whether either part is."""
    if isinstance(prompt, dict):
        return "messages" in prompt or any(needs_encoding(prompt.get(part)) for part in ("prompt", "completion"))
    return isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict))


def has_grammar(params: SamplingParams) -> bool:
    """Whether the text is to keep to something that has to be read first."""
    return any(getattr(params, kind) is not None for kind in GRAMMARS)


@dataclass(eq=False)
class _Job:
    submit: Submit
    since: float


@dataclass(eq=False)
class _Lane:
    """Requests that wait for one kind of thread, by client; the client that is next in turn is first."""

    name: str
    waiting: dict[int, deque[_Job]] = field(default_factory=dict)
    running: _Job | None = None
    began: float = 0.0
    worker: int = 0
    """Which thread is the present one; one that was left behind sees by it that it is not."""
    lost: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, job: _Job) -> None:
        with self.changed:
            self.waiting.setdefault(job.submit.key.client, deque()).append(job)
            self.changed.notify()

    def next(self) -> _Job | None:
        """The job of the client whose turn it is. The lock is held."""
        if not self.waiting:
            return None
        client, jobs = next(iter(self.waiting.items()))
        del self.waiting[client]
        job = jobs.popleft()
        if jobs:
            self.waiting[client] = jobs  # behind the others
        return job


class Encoder:
    """Encodes the prompts of requests and hands them on, each request as a whole."""

    def __init__(
        self,
        encode: Callable[[Any, int], Any],
        read_grammar: Callable[[SamplingParams], None],
        ready: Callable[[Submit], None],
        failed: Callable[[Key, BaseException], None],
        seconds: float,
    ) -> None:
        """
        Args:
            encode: `Model.encode`.
            read_grammar: `Model.read_grammar`.
            ready: takes a request whose prompts are encoded; called from another thread.
            failed: takes the key of one that could not be, and why; called from any thread.
            seconds: a request that is not encoded after this time fails.
        """
        self._encode = encode
        self._read_grammar = read_grammar
        self._ready = ready
        self._failed = failed
        self._seconds = seconds
        self._stopped = False
        self._lanes = {name: _Lane(name) for name in ("text", "long", "chat", "grammar")}
        for lane in self._lanes.values():
            self._start(lane)

    def put(self, submit: Submit) -> bool:
        """Encode a request's prompts and read its grammars; False when there are neither texts nor grammars, so that it
        is ready as it is.

        Raises:
            ServerError: the tokenizer does not come back.
        """
        prompts = [prompt for prompt in submit.prompts if needs_encoding(prompt)]
        grammars = any(map(has_grammar, submit.sampling))
        if not prompts and not grammars:
            return False
        # Of a prompt with its completion, both parts are text as far as they are no chat.
        parts = [part for prompt in prompts for part in (prompt.values() if isinstance(prompt, dict) else (prompt,))]
        texts = [part for part in parts if isinstance(part, str)]
        chats = any(needs_encoding(part) and not isinstance(part, str) for part in parts)
        text = "text" if sum(map(len, texts)) <= LONG_CHARS else "long"
        lane = self._lanes["grammar" if grammars else "chat" if chats else text]
        if lane.lost > MAX_LOST:
            raise ServerError(
                "the tokenizer does not end; only prompts of token ids without grammars are taken", "stuck"
            )
        lane.put(_Job(submit, time.monotonic()))
        return True

    def drop(self, keys: Iterable[Key]) -> None:
        """Forget requests that still wait; those that are no longer wanted, or are answered otherwise."""
        gone = set(keys)
        for lane in self._lanes.values():
            with lane.changed:
                for client in {key.client for key in gone} & lane.waiting.keys():
                    kept = deque(job for job in lane.waiting[client] if job.submit.key not in gone)
                    if kept:
                        lane.waiting[client] = kept
                    else:
                        del lane.waiting[client]

    def check(self, now: float) -> None:
        """Fail what takes too long; called every now and then."""
        for lane in self._lanes.values():
            late: list[_Job] = []
            with lane.changed:
                for client, jobs in list(lane.waiting.items()):
                    while jobs and now - jobs[0].since > self._seconds:
                        late.append(jobs.popleft())
                    if not jobs:
                        del lane.waiting[client]
                job = lane.running
                if job is not None and now - lane.began > self._seconds:
                    late.append(job)
                    lane.running = None
                    lane.worker += 1
                    lane.lost += 1
                    logger.error("a prompt was not encoded after %.0f s; its thread is left behind", now - lane.began)
                    if lane.lost <= MAX_LOST:
                        self._start(lane)
            for job in late:
                self._failed(
                    job.submit.key,
                    ServerError(f"the prompts were not encoded within {self._seconds:g} s; shorten them", "limit"),
                )

    def shift(self, seconds: float) -> None:
        """Leave out a time in which the whole process stood still."""
        for lane in self._lanes.values():
            with lane.changed:
                lane.began += seconds
                for jobs in lane.waiting.values():
                    for job in jobs:
                        job.since += seconds

    def stop(self) -> None:
        """End the threads, when what they are at has ended."""
        self._stopped = True
        for lane in self._lanes.values():
            with lane.changed:
                lane.waiting.clear()
                lane.changed.notify_all()

    def _start(self, lane: _Lane) -> None:
        name = f"hybridgen-encoder-{lane.name}"
        threading.Thread(target=self._run, args=(lane, lane.worker), name=name, daemon=True).start()

    def _run(self, lane: _Lane, worker: int) -> None:
        while True:
            with lane.changed:
                while (job := lane.next()) is None and not self._stopped and lane.worker == worker:
                    lane.changed.wait()
                if job is None:
                    return
                lane.running, lane.began = job, time.monotonic()
            result = self._work(job.submit)
            with lane.changed:
                if lane.worker != worker:  # it took too long, and was answered
                    lane.lost -= 1
                    if lane.lost == MAX_LOST:
                        self._start(lane)
                    return
                lane.running = None
            if isinstance(result, Submit):
                self._ready(result)
            else:
                self._failed(job.submit.key, result)

    def _work(self, submit: Submit) -> Submit | BaseException:
        try:
            prompts = [
                self._encode(prompt, index) if needs_encoding(prompt) else prompt
                for index, prompt in enumerate(submit.prompts)
            ]
            for params in submit.sampling:
                if has_grammar(params):
                    self._read_grammar(params)
        except Exception as error:
            if not isinstance(error, HybridgenError):
                logger.exception("a prompt could not be encoded")
            return error
        return submit._replace(prompts=prompts)
