"""The thread that owns the engine. Commands come in through a queue; outcomes go out once per step."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from hybridgen.core import TokenEvent
from hybridgen.errors import EngineError, HybridgenError
from hybridgen.params import SamplingParams
from hybridgen.serving.service.adapter import Handle, Model

logger = logging.getLogger(__name__)

INTAKE_SECONDS = 0.005
"""Between two steps, requests are taken in for this long."""
STATS_SECONDS = 0.5
"""How old the statistics that metrics show may become while steps run."""


class Key(NamedTuple):
    """A request: its connection and its id there."""

    client: int
    id: int


class Submit(NamedTuple):
    """Run a request. Its prompts are token ids when the generator gets it."""

    key: Key
    prompts: list[Any]
    sampling: list[SamplingParams]
    stream: bool
    echo: bool
    """Whether the first token of each completion brings the prompt's ids."""
    weight: int = 0
    """About the bytes that it takes while it waits."""
    brief: bool = False
    """Whether completions come without the prompt's ids and the times of tokens."""

    @property
    def size(self) -> int:
        """Completions that it makes."""
        return sum(params.n for params in self.sampling)


class Token(NamedTuple):
    """A token of a stream that is not its completion's last."""

    id: int
    """Of its request, among those of its client."""
    event: TokenEvent
    prompt_ids: tuple[int, ...] | None
    """The ids of its prompt, where they were asked for and this is the first token."""


class Cancel(NamedTuple):
    """End a request where it is; it is answered as usual."""

    key: Key


class Drop(NamedTuple):
    """A client went away: end what it asked for, with no answer."""

    client: int


class Stats(NamedTuple):
    """Tell the statistics."""

    key: Key


class Stop(NamedTuple):
    """End the thread."""


Command: TypeAlias = Submit | Cancel | Drop | Stats | Stop


class Ready(NamedTuple):
    """The model is loaded."""

    description: dict[str, Any]
    encode: Callable[[Any, int], Any]
    """`Model.encode`, for other threads."""
    read_grammar: Callable[[SamplingParams], None]
    """`Model.read_grammar`, for other threads."""


class Done(NamedTuple):
    """The last event of one completion."""

    key: Key
    event: TokenEvent
    stream: bool
    last: bool
    brief: bool = False


class Failed(NamedTuple):
    """A request ended without completions."""

    key: Key
    error: BaseException


class Told(NamedTuple):
    """Statistics."""

    key: Key
    stats: dict[str, Any]


class Ended(NamedTuple):
    """The thread is about to end; with an error if it did not have to."""

    error: BaseException | None


Outcome: TypeAlias = Ready | Done | Failed | Told | Ended


class Pulse(NamedTuple):
    """What the thread is doing, for those who ask whether it is alive."""

    steps: int
    """Steps that ended."""
    since: float
    """When the last step ended (`time.monotonic`), or the thread started."""
    working: float | None
    """When its present piece of work began: a step, an intake, a capture. None while it waits for commands."""


@dataclass(eq=False)
class _Running:
    submit: Submit
    handles: dict[int, Handle]
    """Those that have not ended, by their place in the request."""
    echoed: set[int] = field(default_factory=set)


class Generator(threading.Thread):
    """Loads the model, runs steps while there is work, and waits for commands while there is none."""

    def __init__(
        self,
        load: Callable[[], Model],
        post: Callable[[list[Outcome]], None],
        deliver: Callable[[int, list[Token]], None],
    ) -> None:
        """
        Args:
            post: takes what one step brought; called from this thread.
            deliver: takes the number of a client and tokens for it; called from this thread, and before what comes
                after them is posted.
        """
        super().__init__(name="hybridgen-generator", daemon=True)
        self.pulse = Pulse(0, time.monotonic(), time.monotonic())
        self.snapshot: dict[str, Any] = {}
        """The statistics as they were at the last look; replaced, never changed."""
        self._load = load
        self._post = post
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._running: dict[Key, _Running] = {}
        self._places: dict[Handle, tuple[_Running, int]] = {}
        """Whose each completion is that has not ended, and its place there."""
        self._gone: set[int] = set()
        self._outcomes: list[Outcome] = []
        self._stopping = False
        self._looked = 0.0

    def send(self, command: Command) -> None:
        """Queue a command; from any thread."""
        self._inbox.put(command)

    def drop(self, client: int) -> None:
        """`Drop` a client; its requests that are still queued are not even encoded."""
        self._gone.add(client)
        self._inbox.put(Drop(client))

    def run(self) -> None:
        """Until `Stop`, or an error that nothing can follow."""
        error: BaseException | None = None
        model: Model | None = None
        try:
            model = self._load()
            self._look(model)
            self.pulse = Pulse(0, time.monotonic(), None)
            self._outcomes.append(Ready(model.description, model.encode, model.read_grammar))
            while not self._stopping:
                self._flush()
                self._take_in(model)
                if model.busy():
                    self._step(model)
        except HybridgenError as problem:
            error = problem
        except BaseException as problem:
            logger.exception("the generator thread failed")
            error = problem
        try:
            if model is not None:
                self._wind_up(model)
        finally:
            self._outcomes.append(Ended(error))
            self._flush()

    def _wind_up(self, model: Model) -> None:
        try:
            self._collect(model)
        except Exception:
            logger.exception("the last events could not be collected")
        try:
            model.close()
        except Exception:
            logger.exception("closing the engine failed")

    def _step(self, model: Model) -> None:
        try:
            model.step()
        finally:  # a step that breaks the engine ends its requests
            now = time.monotonic()
            self.pulse = Pulse(self.pulse.steps + 1, now, now)
            self._collect(model)
        if now - self._looked > STATS_SECONDS or not model.busy():
            self._look(model)

    def _look(self, model: Model) -> None:
        self.snapshot = model.stats()
        self._looked = time.monotonic()

    def _take_in(self, model: Model) -> None:
        """Handle commands: all there are while nothing runs, else for a short time."""
        deadline = time.monotonic() + INTAKE_SECONDS
        while not self._stopping and (not model.busy() or time.monotonic() < deadline):
            command = self._next(model)
            if command is None:
                return
            self.pulse = self.pulse._replace(working=time.monotonic())
            self._handle(command, model)
            if self._outcomes:
                self._flush()

    def _next(self, model: Model) -> Command | None:
        """The next command; waits for one when nothing runs. None when there is something to run."""
        try:
            if model.busy():
                return self._inbox.get_nowait()
            while self._inbox.empty():
                self.pulse = self.pulse._replace(working=time.monotonic())
                if not model.idle():
                    break
            self.pulse = self.pulse._replace(working=None)
            return self._inbox.get()
        except queue.Empty:
            return None

    def _handle(self, command: Command, model: Model) -> None:
        if isinstance(command, Submit):
            if command.key.client not in self._gone:
                self._submit(command, model)
        elif isinstance(command, Cancel):
            running = self._running.get(command.key)
            if running is not None:
                model.cancel(list(running.handles.values()))
                self._collect(model)
        elif isinstance(command, Drop):
            for key in [key for key in self._running if key.client == command.client]:
                handles = list(self._running.pop(key).handles.values())
                for handle in handles:
                    del self._places[handle]
                model.cancel(handles)
            self._gone.discard(command.client)
            self._look(model)
        elif isinstance(command, Stats):
            self._look(model)
            self._outcomes.append(Told(command.key, self.snapshot))
        else:
            self._stopping = True

    def _submit(self, command: Submit, model: Model) -> None:
        try:
            handles = model.submit(command.prompts, command.sampling, events=command.stream)
        except EngineError:
            self._outcomes.append(Failed(command.key, EngineError("the engine has ended; start the server again")))
            raise
        except Exception as error:
            if not isinstance(error, HybridgenError):
                logger.exception("a request could not be taken in")
            self._outcomes.append(Failed(command.key, error))
            return
        running = self._running[command.key] = _Running(command, dict(enumerate(handles)))
        self._places |= {handle: (running, position) for position, handle in enumerate(handles)}

    def _collect(self, model: Model) -> None:
        """Turn the events that came into outcomes."""
        tokens: dict[int, list[Token]] = {}
        ended: list[Done] = []
        for handle, event in model.events():
            place = self._places.get(handle)
            if place is None:
                continue  # its client is gone
            running, position = place
            key = running.submit.key
            if event.completion is None:
                prompt = None
                if running.submit.echo and position not in running.echoed:
                    running.echoed.add(position)
                    prompt = model.prompt_ids(handle)
                tokens.setdefault(key.client, []).append(Token(key.id, event, prompt))
                continue
            del self._places[handle], running.handles[position]
            submit = running.submit
            ended.append(Done(key, event, submit.stream, not running.handles, submit.brief))
            if not running.handles:
                del self._running[key]
        for client, parts in tokens.items():
            self._deliver(client, parts)
        self._outcomes += ended

    def _flush(self) -> None:
        outcomes, self._outcomes = self._outcomes, []
        if outcomes:
            self._post(outcomes)
