"""Replicas behind a server: what its generator thread runs in place of an engine."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from hybridgen.core import Completion, FinishReason, TokenEvent
from hybridgen.engine.requests import read_grammar
from hybridgen.errors import EngineError, HybridgenError
from hybridgen.params import SamplingParams
from hybridgen.serving.replicas.jobs import Job, job_of
from hybridgen.serving.replicas.replicas import Replicas
from hybridgen.text.prompts import encode_pair, encode_prompt, is_pair

STEP_SECONDS = 0.005
"""How long a step waits for an event, before commands are looked at again."""
REPORT_SECONDS = 0.5
"""Between two reports of the replicas' statistics."""
_STEP_EVENTS = 256
"""Events of one step at most."""


@dataclass(eq=False)
class Running:
    """One completion that a replica makes."""

    job: Job
    index: int
    """Of the prompt in its request."""
    choice: int
    prompt_ids: Sequence[int]
    ended: bool = False


class ReplicasModel:
    """A `Model` around `Replicas`: it hands requests on and takes their events. Nothing is computed here."""

    def __init__(self, start: Callable[[], Replicas]) -> None:
        """`start` starts the replicas."""
        self._replicas = start()
        self._work = self._replicas.work()
        self._work.start()
        self._closed = threading.Event()
        threading.Thread(target=self._ask, daemon=True, name="hybridgen-reports").start()
        self._numbers = itertools.count()
        self._running: dict[tuple[int, int], Running] = {}
        """By the job's number and the choice."""
        self._came: deque[tuple[Running, TokenEvent]] = deque()
        self.description = {
            name: self._replicas.description[name] for name in ("model", "mode", "max_batch", "max_context")
        }

    def encode(self, prompt: Any, index: int) -> Any:
        how = self._replicas.checkpoint.encoding
        if not is_pair(prompt):
            return encode_prompt(prompt, index, **how)
        ids, start = encode_pair(prompt, index, **how)
        return {"prompt": ids[:start], "completion": ids[start:]}

    def read_grammar(self, params: SamplingParams) -> None:
        read_grammar(params, self._replicas.checkpoint)

    def submit(self, prompts: list[Any], sampling: list[SamplingParams], *, events: bool) -> list[Running]:
        checked = self._replicas.check(prompts, sampling)  # all or none, before any of them is handed on
        jobs = [
            job_of(next(self._numbers), prompt, params, events)
            for prompt, params in zip(prompts, sampling, strict=True)
        ]
        running = [
            Running(jobs[request.index], request.index, request.choice, request.prompt_ids) for request in checked
        ]
        self._running |= {(each.job.index, each.choice): each for each in running}
        self._work.add(jobs)
        return running

    def prompt_ids(self, handle: Running) -> tuple[int, ...]:
        return tuple(handle.prompt_ids)

    def events(self) -> Iterator[tuple[Running, TokenEvent]]:
        while self._came:
            yield self._came.popleft()

    def step(self) -> None:
        event = self._work.take(STEP_SECONDS)
        for _ in range(_STEP_EVENTS):
            if event is None:
                return
            if isinstance(event, HybridgenError):
                self._end(event)
            self._hand_on(event)
            event = self._work.take(0.0)

    def _hand_on(self, event: TokenEvent) -> None:
        running = self._running.get((event.index, event.choice))
        if running is None:
            return  # nobody waits for it any more
        self._came.append((running, replace(event, index=running.index)))
        if event.completion is not None:
            running.ended = True
            del self._running[event.index, event.choice]

    def _end(self, error: HybridgenError) -> NoReturn:
        """No replica is left: fail everybody.

        Raises:
            EngineError: always.
        """
        ended = EngineError(f"no replica can be kept alive: {error}")
        for running in list(self._running.values()):
            self._close(running, FinishReason.ERROR, ended)
        raise ended from error

    def _close(self, running: Running, reason: FinishReason, error: HybridgenError | None) -> None:
        made = Completion.refused(EngineError("it was cancelled"), None, running.job.sampling.seed)
        made = replace(made, finish_reason=reason, error=error, choices=())
        self._hand_on(
            TokenEvent(token_id=None, text="", index=running.job.index, choice=running.choice, completion=made)
        )

    def cancel(self, handles: list[Running]) -> None:
        for running in handles:
            if self._work.cancel(running.job) and not running.ended:
                for choice in range(running.job.sampling.n):
                    waiting = self._running.get((running.job.index, choice))
                    if waiting is not None:
                        self._close(waiting, FinishReason.CANCELLED, None)

    def busy(self) -> bool:
        return bool(self._running)

    def idle(self) -> bool:
        return False

    def stats(self) -> dict[str, Any]:
        found = self._replicas.last_stats()
        first = found["replicas"][0]["engine"]
        counted = {"replicas": len(self._replicas), "restarts": found["restarts"]}
        return {**first, **found["engine"], **counted}

    def _ask(self) -> None:
        """Have the replicas report, so that `stats()` waits for none of them; in a thread of its own."""
        while not self._closed.wait(REPORT_SECONDS):
            self._replicas.last_stats(again=True)

    def close(self) -> None:
        self._closed.set()
        self._work.stop()
        self._replicas.close()
