"""A recorder that records nothing and notes everything, and a store around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hybridgen.graphs import GraphSettings, GraphStore, Recorded, Route, Router
from hybridgen.graphs.key import GraphKey
from hybridgen.sampling import SamplerPlan
from hybridgen.telemetry.statistics import Counters

GREEDY = SamplerPlan()
SAMPLED = SamplerPlan(sample=True)


def decode(size: int, plan: SamplerPlan | None = GREEDY) -> GraphKey:
    return GraphKey.decode(size, plan)


def prefill(tokens: int, rows: int = 1, plan: SamplerPlan | None = GREEDY) -> GraphKey:
    return GraphKey.prefill(tokens, rows, plan)


class FakeRecorder:
    """Appends to a log: ("record", key), ("replay", key), ("release", key)."""

    owner = "fake"

    def __init__(
        self,
        log: list[tuple[str, Any]],
        *,
        seconds: Callable[[GraphKey], float] = lambda key: 1.0,
        plain: Callable[[GraphKey], float] = lambda key: 1.0,
        size: Callable[[GraphKey], int] = lambda key: 0,
        errors: Mapping[int, BaseException] | None = None,
    ) -> None:
        """`errors` are raised when a step of so many tokens is recorded."""
        self._log = log
        self._seconds = seconds
        self._plain = plain
        self._size = size
        self.errors = dict(errors or {})
        self.closed = 0

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        self._log.append(("record", key))
        if key.tokens in self.errors:
            raise self.errors[key.tokens]
        return Recorded(
            replay=lambda: self._log.append(("replay", key)),
            release=lambda: self._log.append(("release", key)),
            owner=self.owner,
            plain_seconds=self._plain(key),
            seconds=self._seconds(key),
            bytes=self._size(key),
        )

    def close(self) -> None:
        self.closed += 1


class PlainLayers:
    """An executor that serves everything, as the router sees it."""

    name, launch = "layers", "eager"

    def refuses(self, key: GraphKey) -> str | None:
        return None


class Harness:
    """A store, what happened in it, and a use of it as the runner's."""

    def __init__(
        self,
        decode: tuple[int, ...] = (1, 2, 4, 8),
        prefill: tuple[int, ...] = (),
        *,
        notify: Callable[..., None] | None = None,
        validates: bool = False,
        errors: Mapping[int, BaseException] | None = None,
        costs: Mapping[str, Callable[[GraphKey], Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.log: list[tuple[str, Any]] = []
        self.recorder = FakeRecorder(self.log, errors=errors, **(costs or {}))
        self.counters = Counters()
        self.asked: list[tuple[GraphKey, bool]] = []
        self.store = GraphStore(
            GraphSettings(decode=decode, prefill=prefill, **{"max_rows": 8, "capture_after": 1} | settings),
            self,
            recorder=self._recorder,
            counters=self.counters,
            notify=notify,
            validates=validates,
        )
        self.router = Router(self.store, [PlainLayers()], self, why_plain="nothing is recorded")

    def prepare(self, key: GraphKey) -> None:
        self.log.append(("prepare", key))

    def run(self, key: GraphKey) -> None:
        self.log.append(("run", key))

    def finish(self, key: GraphKey, sampler: SamplerPlan) -> None:
        self.log.append(("finish", (key.phase, key.rows, sampler)))

    def _recorder(self, key: GraphKey, lazy: bool) -> FakeRecorder:
        self.asked.append((key, lazy))
        return self.recorder

    def use(self, key: GraphKey, times: int = 1) -> Route:
        """Run steps of this size, as the runner does."""
        for _ in range(times):
            route = self.router.route(key)
            route.run()
            if route.recording is None:
                self.store.count_miss(route.key.phase, route.reason)
            else:
                self.store.count_hit(route.recording, padded=route.padded)
            if route.wanted is not None:
                self.store.want(route.wanted)
        return route

    def settle(self) -> None:
        """Be idle for as long as something is wanted."""
        while self.store.pending:
            self.store.capture_pending()

    def take(self) -> list[tuple[str, Any]]:
        """What happened since, without preparations."""
        events = [event for event in self.log if event[0] != "prepare"]
        self.log.clear()
        return events

    @property
    def held(self) -> list[int]:
        return sorted(recording.key.tokens for recording in self.store.recordings)
