"""Which recording runs a step, and which steps are recorded."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hybridgen.core import GraphEvent, GraphEventKind
from hybridgen.device.failures import is_fatal
from hybridgen.errors import EngineError, described
from hybridgen.graphs.buckets import round_up
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import Recorded, Recorder
from hybridgen.graphs.timings import PlainTimes
from hybridgen.models.attention import Phase
from hybridgen.sampling import SamplerPlan
from hybridgen.telemetry.statistics import Counters, GraphRow, GraphStats

logger = logging.getLogger(__name__)

FEW_PROMPTS = 8
"""Prompts that a prefill graph with its sampler outside can have: their logits cost little more than one's."""

_FAILURES_ALIKE = 2
"""Captures of a phase that fail with the same message before the others are not tried."""


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """What is recorded and what it may cost; see the fields of `EngineConfig`."""

    decode: tuple[int, ...] = ()
    """Buckets of decode rows; empty: decode is not recorded."""
    prefill: tuple[int, ...] = ()
    """Buckets of prefill tokens; empty: prefill is not recorded."""
    max_rows: int
    """Rows that a step samples at most."""
    max_graphs: int = 128
    max_bytes: int | None = None
    max_padding_ratio: float | None = None
    lazy: bool = True
    capture_after: int = 3
    sample_in_graph: bool = True
    """Record sampling too; else recordings end at the logits."""
    named: frozenset[Phase] = frozenset()
    """Phases whose buckets the user named: all of those are recorded at warm-up, whatever earlier processes used."""
    exact_when_lazy: bool = False
    """Record decode sizes between the buckets as they are."""

    def ladder(self, phase: Phase) -> tuple[int, ...]:
        """The buckets of a phase."""
        return self.decode if phase is Phase.DECODE else self.prefill


@dataclass(eq=False)
class Recording:
    """A recorded step in the store."""

    key: GraphKey
    recorded: Recorded
    recorder: Recorder
    lazy: bool
    addresses: dict[str, int] | None = None
    """Of every tensor that it reads or writes, where they are checked."""
    checked: bool = True
    """Whether its first replay needs no comparison with the step (any more)."""
    capture_seconds: float = 0.0
    """What recording it took."""
    hits: int = 0
    padded_hits: int = 0
    last_used: int = 0


@dataclass(eq=False)
class Route:
    """How steps of one size run, until the store changes."""

    key: GraphKey
    """What runs: the size that was asked for, or the bucket that holds it."""
    run: Callable[[], None]
    kind: str
    reason: str
    recording: Recording | None = None
    padded: bool = False
    finish: Callable[[], None] | None = None
    """The part of `run` after the recording: sampling, where the recording ends at the logits."""
    wanted: GraphKey | None = None
    """What would serve these steps better, if it were recorded."""


class GraphStore:
    """Recorded steps by bucket, the least recently used of them dropped where they are too many.

    A step never waits for a recording: `route()` only looks up. What is missing is counted, and recorded by
    `capture_pending()` when nothing runs.
    """

    def __init__(
        self,
        settings: GraphSettings,
        *,
        recorder: Callable[[GraphKey, bool], Recorder | None] | None,
        prepare: Callable[[GraphKey], None],
        run: Callable[[GraphKey], None],
        finish: Callable[[Phase, int, SamplerPlan], None],
        plain_kind: Callable[[], str],
        why_plain: str,
        note: str = "",
        counters: Counters,
        notify: Callable[[GraphEvent], None] | None = None,
        validates: bool = False,
    ) -> None:
        """
        Args:
            recorder: who records a step (the flag: while idle), or None if nobody does; None where nothing is recorded.
            prepare: stages padding for a step and allocates what it reads.
            run: launches a staged step without a recording.
            finish: launches what is left of one that ends at its logits.
            plain_kind: what a step without a recording is called.
            why_plain: the reason of such a step where nothing is recorded.
            note: what else to say of every recorded step.
            notify: told of every capture, eviction and failure.
            validates: new recordings are to be compared at their first replay (the runner does it).
        """
        self.settings = settings
        self._recorder = recorder
        self._prepare = prepare
        self._run = run
        self._finish = finish
        self._plain_kind = plain_kind
        self._why_plain = why_plain
        self._note = note
        self._counters = counters
        self._notify = notify
        self._validates = validates
        self._recordings: dict[GraphKey, Recording] = {}
        self._routes: dict[GraphKey, Route] = {}
        self._times = PlainTimes()
        self._clock = 0
        self._wanted: Counter[GraphKey] = Counter()
        self._known: dict[GraphKey, tuple[float, float]] = {}
        """Times of an earlier process that nothing has confirmed in this one."""
        self.times_changed = False
        """Whether a step took another time than an earlier process measured."""
        self._failed: dict[GraphKey, str] = {}
        self._patience: dict[GraphKey, int] = {}
        """Uses before an evicted step is recorded again: twice as many each time, or more sizes than are kept would be
        captured in turn for ever."""
        self._misses: Counter[str] = Counter()
        self._evictions = 0
        self._lazy_captures = 0
        self._dropped_hits = Counter[str]()
        self.version = 0
        """Changes whenever a route may."""

    def route(self, key: GraphKey) -> Route:
        """How a step of this size runs now. Looks up; nothing is captured here."""
        route = self._routes.get(key)
        if route is None:
            if len(self._routes) >= 4096:  # prompts of every length
                self._routes.clear()
            route = self._routes[key] = self._choose(key)
        return route

    def count(self, route: Route) -> None:
        """Note that a step ran this way."""
        recording = route.recording
        if recording is None:
            self._misses[route.reason] += 1
        else:
            self._clock += 1
            recording.last_used = self._clock
            recording.hits += 1
            recording.padded_hits += route.padded
        if route.wanted is not None:
            self._wanted[route.wanted] += 1

    def _choose(self, key: GraphKey) -> Route:
        if self._recorder is None:
            return self._plain(key, self._why_plain)
        if not self.settings.ladder(key.phase):
            return self._plain(key, f"{key.phase} is not recorded: it has no buckets")
        exact = self._recordings.get(key)
        if exact is not None:
            return self._replay(exact, f"bucket {key.tokens}", key)
        wanted = self._wanted_for(key)
        best = min(self._larger(key), key=_preference, default=None)
        if best is None:
            return self._plain(key, self._why_none(key, wanted), wanted)
        reason = self._why_not(best, key)
        if reason is not None:
            return self._plain(key, reason, wanted)
        padded = "padded to " if best.key.tokens != key.tokens else ""
        return self._replay(best, f"{padded}bucket {best.key.tokens}", key, wanted)

    def _plain(self, key: GraphKey, reason: str, wanted: GraphKey | None = None) -> Route:
        return Route(key, partial(self._run, key), self._plain_kind(), reason, wanted=wanted)

    def _replay(self, recording: Recording, reason: str, key: GraphKey, wanted: GraphKey | None = None) -> Route:
        if wanted == recording.key:
            wanted = None
        reason += self._note
        recorded, ran = recording.recorded, recording.key
        padded = ran.tokens != key.tokens
        if ran.sampler is not None or key.sampler is None or not ran.rows:
            return Route(ran, recorded.replay, recorded.owner, reason, recording, padded, wanted=wanted)
        # The recording ends at the logits: the sampler runs after it.
        finish = partial(self._finish, ran.phase, ran.rows, key.sampler)

        def run() -> None:
            recorded.replay()
            finish()

        reason = f"{reason}, sampler outside"
        return Route(ran, run, recorded.owner, reason, recording, padded, finish, wanted)

    def _larger(self, key: GraphKey) -> Iterator[Recording]:
        """Recordings that can run the step with padding."""
        for recording in self._recordings.values():
            other = recording.key
            enough = other.tokens >= key.tokens and other.rows >= key.rows
            samples = other.sampler is None or (key.sampler is not None and other.sampler.covers(key.sampler))
            if other.phase is key.phase and enough and samples:
                yield recording

    def _why_not(self, best: Recording, key: GraphKey) -> str | None:
        """Why a step is not padded to this recording's size."""
        ratio = self.settings.max_padding_ratio
        if ratio is not None:
            waste = (best.key.tokens - key.tokens) / key.tokens
            return None if waste <= ratio else f"padding above max_padding_ratio={ratio:g}"
        plain = self._times.estimate(key.phase, best.key.sampler, key.tokens)
        if plain is not None and best.recorded.seconds > plain:
            return f"without a graph is faster (measured) than padded to bucket {best.key.tokens}"
        return None

    def _why_none(self, key: GraphKey, wanted: GraphKey | None) -> str:
        if wanted is None:
            ladder = self.settings.ladder(key.phase)
            return f"above the largest bucket, {ladder[-1]}"
        if wanted in self._failed:
            return f"bucket {wanted.tokens} failed, see GraphStats.failures"
        if any(r.key.phase is key.phase and r.key.tokens >= key.tokens for r in self._recordings.values()):
            return "no graph with this sampling, or with so many prompts"
        return f"bucket {wanted.tokens} is not captured"

    def _wanted_for(self, key: GraphKey) -> GraphKey | None:
        """The bucket that such a step belongs to."""
        tokens = round_up(key.tokens, self.settings.ladder(key.phase))
        if tokens is None:
            return None
        plan = key.sampler if self.settings.sample_in_graph else None
        if key.phase is Phase.DECODE:
            size = key.tokens if self.settings.exact_when_lazy else tokens
            return GraphKey.decode(size, plan)
        rows = 1 if plan is not None else FEW_PROMPTS
        while rows < key.rows:
            rows *= 2
        return GraphKey.prefill(tokens, min(rows, self.settings.max_rows), plan)

    def know(self, times: Mapping[GraphKey, tuple[float, float]]) -> None:
        """Use times that an earlier process measured on the same device, of steps without and with their recording."""
        self._known.update(times)
        for key, (plain, _) in times.items():
            self._times.note(key.phase, key.sampler, key.tokens, plain)
        self._changed()

    def _doubt_known(self) -> None:
        """A time of the earlier process is wrong by now: compared with new ones, its others would decide wrongly."""
        self.times_changed = True
        for key in self._known:
            self._times.forget(key.phase, key.sampler, key.tokens)
        self._known.clear()

    @property
    def wanted(self) -> dict[GraphKey, int]:
        """How often steps wanted a recording that there is not."""
        return dict(self._wanted)

    def capture(self, keys: Iterable[GraphKey], progress: Callable[[], object] = lambda: None) -> None:
        """Record these steps, the largest first, so that the smaller ones fit into the memory that it took."""
        for key in sorted(keys, key=lambda key: key.tokens, reverse=True):
            if key not in self._recordings and key not in self._failed and not self._gave_up(key):
                self._capture(key, lazy=False)
            progress()

    def _gave_up(self, key: GraphKey) -> bool:
        """Whether steps of the phase fail alike, so that this one would too. Memory may suffice for a smaller one."""
        alike = Counter(why for failed, why in self._failed.items() if failed.phase is key.phase)
        repeated = [why for why, count in alike.items() if count >= _FAILURES_ALIKE and "OutOfMemory" not in why]
        if repeated:
            self._failed[key] = f"not tried: {repeated[0]}"
        return bool(repeated)

    @property
    def pending(self) -> list[GraphKey]:
        """What was wanted often enough, the most wanted first."""
        if not self.settings.lazy or self._recorder is None:
            return []
        often = [key for key, count in self._wanted.most_common() if count >= self._uses_before_capture(key)]
        missing = [key for key in often if key not in self._recordings and key not in self._failed]
        return [key for key in missing if self._recorder(key, True) is not None]

    def _uses_before_capture(self, key: GraphKey) -> int:
        return self._patience.get(key, self.settings.capture_after)

    def capture_pending(self) -> bool:
        """Record what was wanted most; returns whether more is left. Not to be called while requests run."""
        pending = self.pending
        if pending:
            self._capture(pending[0], lazy=True)
        return len(pending) > 1

    def _capture(self, key: GraphKey, *, lazy: bool) -> None:
        recorder = None if self._recorder is None else self._recorder(key, lazy)
        if recorder is None:
            return
        self._make_room()
        self._wanted.pop(key, None)
        try:
            start = time.perf_counter()
            self._prepare(key)
            known = self._known.pop(key, None)
            step = partial(self._run, key)
            recorded = recorder.record(key, step) if known is None else recorder.record(key, step, known)
            seconds = time.perf_counter() - start
        except Exception as error:
            if is_fatal(error):  # asking the device tells: after a failed capture it lives
                torch.cuda.synchronize()
            self._fail(key, error)
            return
        finally:
            self._changed()
        if known not in (None, (recorded.plain_seconds, recorded.seconds)):
            self._doubt_known()
        self._times.note(key.phase, key.sampler, key.tokens, recorded.plain_seconds)
        self._clock += 1
        recording = Recording(
            key,
            recorded,
            recorder,
            lazy,
            checked=not self._validates,
            capture_seconds=seconds,
            last_used=self._clock,
        )
        self._recordings[key] = recording
        self._lazy_captures += lazy
        self._tell(GraphEventKind.CAPTURED, key, f"{'while idle' if lazy else 'at warm-up'}, {recorded.bytes:,} bytes")
        self._keep_within_bytes(recording)

    def _fail(self, key: GraphKey, error: Exception) -> None:
        message = described(error)
        self._failed[key] = message
        self._counters.fall_back(f"the capture of {describe(key)} failed, such steps run without it: {message}")
        logger.debug("a capture failed", exc_info=error)
        self._tell(GraphEventKind.FAILED, key, message)

    def _make_room(self) -> None:
        """Evict before a capture, so that memory is freed before more is taken."""
        limit = self.settings.max_bytes
        while len(self._recordings) >= self.settings.max_graphs or (
            limit is not None and self._recordings and self.bytes >= limit
        ):
            self._evict_oldest()

    def _keep_within_bytes(self, newest: Recording) -> None:
        limit = self.settings.max_bytes
        if limit is None:
            return
        if newest.recorded.bytes > limit:  # others cannot make room for it
            self.drop(newest, f"its capture took {newest.recorded.bytes:,} bytes, above max_graph_memory={limit:,}")
        while self.bytes > limit:
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        oldest = min(self._recordings.values(), key=lambda recording: recording.last_used)
        self._evictions += 1
        self._patience[oldest.key] = 2 * self._uses_before_capture(oldest.key)
        self.drop(oldest)
        self._tell(GraphEventKind.EVICTED, oldest.key, f"after {oldest.hits} replays")

    def drop(self, recording: Recording, why: str | None = None) -> None:
        """Forget a recording; with a reason it is not recorded again."""
        self._recordings.pop(recording.key, None)
        recording.recorded.release()
        self._dropped_hits["hits"] += recording.hits
        self._dropped_hits["padded"] += recording.padded_hits
        if why is not None:
            self._failed[recording.key] = why
            self._counters.fall_back(f"{describe(recording.key)} is not used any more: {why}")
            self._tell(GraphEventKind.FAILED, recording.key, why)
        self._changed()

    def _changed(self) -> None:
        self._routes.clear()
        self.version += 1

    def _tell(self, kind: GraphEventKind, key: GraphKey, message: str) -> None:
        logger.debug("%s %s: %s", kind, describe(key), message)
        if self._notify is None:
            return
        try:
            self._notify(GraphEvent(kind=kind, phase=str(key.phase), tokens=key.tokens, rows=key.rows, message=message))
        except Exception as error:
            self._counters.fall_back(f"on_graph_event raised {described(error)}")

    @property
    def recordings(self) -> tuple[Recording, ...]:
        """All of them, in order of capture."""
        return tuple(self._recordings.values())

    @property
    def bytes(self) -> int:
        """Device memory that the recordings took."""
        return sum(recording.recorded.bytes for recording in self.recordings)

    def stats(self) -> GraphStats:
        """Counts so far, and what is recorded."""
        rows = self.recordings
        return GraphStats(
            graphs=tuple(
                GraphRow(
                    phase=str(r.key.phase),
                    tokens=r.key.tokens,
                    rows=r.key.rows,
                    sampling=describe_plan(r.key),
                    owner=r.recorded.owner,
                    lazy=r.lazy,
                    hits=r.hits,
                    padded_hits=r.padded_hits,
                    bytes=r.recorded.bytes,
                    seconds=r.recorded.seconds,
                    plain_seconds=r.recorded.plain_seconds,
                )
                for r in rows
            ),
            bytes=self.bytes,
            hits=sum(r.hits for r in rows) + self._dropped_hits["hits"],
            padded_hits=sum(r.padded_hits for r in rows) + self._dropped_hits["padded"],
            misses=dict(self._misses) if self._recorder is not None else {},
            lazy_captures=self._lazy_captures,
            evictions=self._evictions,
            failures={f"{describe(key)} ({describe_plan(key)})": why for key, why in dict(self._failed).items()},
        )

    def close(self) -> None:
        """Release every recording."""
        recorders = {id(r.recorder): r.recorder for r in self._recordings.values()}
        for recording in self.recordings:
            recording.recorded.release()
        self._recordings.clear()
        self._recorder = None
        # These hold whoever owns the store; the weights would wait for the garbage collector.
        self._prepare = self._run = self._finish = self._plain_kind = _closed
        self._changed()
        for recorder in recorders.values():
            recorder.close()


def _closed(*_: object) -> Any:
    raise EngineError("this engine is closed; load a new one with Engine.load()")


def _preference(recording: Recording) -> tuple[int, int, bool, float]:
    """Less padding first, then those that sample, then the faster."""
    key = recording.key
    return key.tokens, key.rows, key.sampler is None, recording.recorded.seconds


def describe(key: GraphKey) -> str:
    """A recording's name in messages."""
    rows = "" if key.phase is Phase.DECODE else f" for {key.rows} prompts" if key.rows != 1 else ""
    return f"the {key.phase} graph of {key.tokens} {'rows' if key.phase is Phase.DECODE else 'tokens'}{rows}"


def describe_plan(key: GraphKey) -> str:
    """The parts of the sampler that a recording has."""
    if key.sampler is None:
        return "outside"
    parts = [
        name for name, value in zip(key.sampler._fields, key.sampler, strict=True) if value not in (False, None, 0)
    ]
    if key.sampler.logprobs == 0:
        parts.append("logprobs")
    return ", ".join(parts) or "greedy"
