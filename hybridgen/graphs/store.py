"""Recorded steps: which are kept, which are wanted, and what failed. `router` decides which of them runs a step."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from hybridgen.core import GraphEvent, GraphEventKind
from hybridgen.device.failures import LostRanks, is_fatal
from hybridgen.errors import EngineError, described
from hybridgen.graphs.buckets import GraphSettings
from hybridgen.graphs.key import GraphKey, describe
from hybridgen.graphs.recorder import NotReadyError, Recorded, Recorder
from hybridgen.graphs.steps import CapturedSteps
from hybridgen.graphs.timings import PlainTimings
from hybridgen.models.attention import Phase
from hybridgen.telemetry.statistics import Counters

logger = logging.getLogger(__name__)

_NOT_TRIED = "not tried"
_FAILURES_ALIKE = 2
"""Sizes of a phase whose captures fail with the same message before other sizes are not tried."""


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
    differed: int = 0
    """Comparisons in which other tokens came out."""
    capture_seconds: float = 0.0
    """What recording it took."""
    hits: int = 0
    padded_hits: int = 0
    last_used: int = 0


@dataclass(eq=False)
class StoreCounts:
    """What a store counts."""

    hits: Counter[Phase] = field(default_factory=Counter)
    padded_hits: Counter[Phase] = field(default_factory=Counter)
    misses: Counter[tuple[Phase, str]] = field(default_factory=Counter)
    """By phase and reason."""
    evictions: int = 0
    lazy_captures: int = 0
    capture_failures: int = 0


class GraphStore:
    """Recorded steps by bucket, the least recently used of them dropped where they are too many.

    A step never waits for a recording. What is missing is counted, and recorded by `capture_pending()` when nothing
    runs.
    """

    def __init__(
        self,
        settings: GraphSettings,
        steps: CapturedSteps,
        *,
        recorder: Callable[[GraphKey, bool], Recorder | None] | None,
        counters: Counters,
        notify: Callable[[GraphEvent], None] | None = None,
        validates: bool = False,
    ) -> None:
        """
        Args:
            steps: what is recorded.
            recorder: who records a step (the flag: while idle), or None if nobody does; None where nothing is recorded.
            notify: told of every capture, eviction and failure.
            validates: new recordings are to be compared at their first replay (the runner does it).
        """
        self.settings = settings
        self._steps: CapturedSteps | None = steps
        self._recorder = recorder
        self._counters = counters
        self._notify = notify
        self._validates = validates
        self._recordings: dict[GraphKey, Recording] = {}
        self.timings = PlainTimings()
        """What steps take without a recording."""
        self._clock = 0
        self._wanted: Counter[GraphKey] = Counter()
        self._known: dict[GraphKey, tuple[float, float]] = {}
        """Times of an earlier process that nothing has confirmed in this one."""
        self.times_changed = False
        """Whether a step took another time than an earlier process measured."""
        self.failed: dict[GraphKey, str] = {}
        """What is not recorded (again), and why."""
        self.behind: tuple[GraphKey, Recorder] | None = None
        """What is being made while steps go on, and by whom."""
        self._patience: dict[GraphKey, int] = {}
        """Uses before an evicted step is recorded again: twice as many after each eviction. Otherwise, with more sizes
        in use than can be kept, one would be captured after the other for ever."""
        self.counts = StoreCounts()
        self.suspended: str | None = None
        """Why no step is recorded or replayed for now."""
        self.version = 0
        """Changes whenever a route may."""

    @property
    def records(self) -> bool:
        """Whether anything is ever recorded."""
        return self._recorder is not None

    def find(self, key: GraphKey) -> Recording | None:
        """The recording of exactly this step."""
        return self._recordings.get(key)

    def count_hit(self, recording: Recording, *, padded: bool) -> None:
        """Note that a recording ran a step."""
        self._clock += 1
        recording.last_used = self._clock
        recording.hits += 1
        recording.padded_hits += padded
        if recording.key.is_rest:  # of a step that is counted
            return
        self.counts.hits[recording.key.phase] += 1
        self.counts.padded_hits[recording.key.phase] += padded

    def count_miss(self, phase: Phase, reason: str) -> None:
        """Note that a step of this phase ran without a recording."""
        self.counts.misses[phase, reason] += 1

    def want(self, key: GraphKey, times: int = 1) -> None:
        """Note that so many steps would have been served better by this recording."""
        self._wanted[key] += times

    def know(self, times: Mapping[GraphKey, tuple[float, float]]) -> None:
        """Use times that an earlier process measured on the same device, of steps without and with their recording."""
        self._known.update(times)
        for key, (plain, _) in times.items():
            self.timings.note(key, plain)
        self._changed()

    def _doubt_known(self) -> None:
        """A time that an earlier process measured is wrong now. Its other times are forgotten, too: compared with new
        ones, they would lead to wrong choices."""
        self.times_changed = True
        for key in self._known:
            self.timings.forget(key)
        self._known.clear()

    @property
    def wanted(self) -> dict[GraphKey, int]:
        """How often steps would have used a recording that does not exist."""
        return dict(self._wanted)

    def capture(self, keys: Iterable[GraphKey], progress: Callable[[], object] = lambda: None) -> None:
        """Record these steps, the largest first, so that the smaller ones fit into the memory that it took; none while
        recordings are suspended."""
        if self.suspended is not None:
            return
        for key in sorted(keys, key=lambda key: key.tokens, reverse=True):
            if key not in self._recordings and key not in self.failed and not self._gave_up(key):
                self._capture(key, lazy=False)
            progress()

    def _gave_up(self, key: GraphKey) -> bool:
        """Whether so many sizes of the phase failed alike that this one would too. Then it counts as failed.

        Running out of memory does not count: a smaller size may fit.
        """
        sizes: dict[str, set[int]] = {}
        for failed, why in self.failed.items():
            alike = (failed.phase, failed.is_rest) == (key.phase, key.is_rest)
            if alike and "OutOfMemory" not in why and not why.startswith(_NOT_TRIED):
                sizes.setdefault(why, set()).add(failed.size)
        # A size that has failed itself, with another sampler, is tried: the sampler may have been the cause.
        same = next((why for why, failed in sizes.items() if len(failed - {key.size}) >= _FAILURES_ALIKE), None)
        if same is None:
            return False
        others = " and ".join(map(str, sorted(sizes[same])))
        self.failed[key] = f"{_NOT_TRIED}, because {others} failed: {same}"
        self._tell(GraphEventKind.FAILED, key, self.failed[key])
        return True

    @property
    def pending(self) -> list[GraphKey]:
        """What was wanted often enough, the most wanted first."""
        if not self.settings.lazy or self._recorder is None or self.suspended is not None:
            return []
        often = [key for key, count in self._wanted.most_common() if count >= self._uses_before_capture(key)]
        missing = [key for key in often if key not in self._recordings and key not in self.failed]
        if self.behind is not None:
            missing.sort(key=lambda key: key != self._behind_key)
        return [key for key in missing if self._recorder(key, True) is not None]

    @property
    def _behind_key(self) -> GraphKey | None:
        return None if self.behind is None else self.behind[0]

    def _uses_before_capture(self, key: GraphKey) -> int:
        return self._patience.get(key, self.settings.capture_after)

    def capture_pending(self) -> bool:
        """Record what was wanted most; returns whether more is left that can be recorded now. Not to be called while
        requests run."""
        pending = self.pending
        if pending:
            self._capture(pending[0], lazy=True)
        return len(pending) > 1 and self.behind is None

    def _capture(self, key: GraphKey, *, lazy: bool) -> None:
        recorder = None if self._recorder is None else self._recorder(key, lazy)
        if recorder is None:
            return
        self._make_room()
        uses = self._wanted.pop(key, 0)
        try:
            start = time.perf_counter()
            steps = self.check_open()
            steps.prepare(key)
            known = self._known.pop(key, None)
            recorded = recorder.record(key, partial(steps.run, key), known)
            seconds = time.perf_counter() - start
            self._made(key)
        except NotReadyError:
            if self.behind is None:
                self.behind = key, recorder
            self._wanted[key] = max(uses, self._uses_before_capture(key))
            if known is not None:
                self._known[key] = known
            return
        except Exception as error:
            self._made(key)
            if isinstance(error, LostRanks):
                raise
            if is_fatal(error):  # as the error of any failed capture looks; this raises only if the device is lost
                torch.cuda.synchronize()
            self._fail(key, error)
            return
        finally:
            self._changed()
        if known not in (None, (recorded.plain_seconds, recorded.seconds)):
            self._doubt_known()
        self.timings.note(key, recorded.plain_seconds)
        self._clock += 1
        recording = Recording(
            key,
            recorded,
            recorder,
            lazy,
            checked=recorded.exact and not self._validates,
            capture_seconds=seconds,
            last_used=self._clock,
        )
        self._recordings[key] = recording
        self.counts.lazy_captures += lazy
        self._tell(GraphEventKind.CAPTURED, key, f"{'while idle' if lazy else 'at warm-up'}, {recorded.bytes:,} bytes")
        self._keep_within_bytes(recording)

    def _made(self, key: GraphKey) -> None:
        """Note that this recording is no longer being made."""
        if self._behind_key == key:
            self.behind = None

    def _fail(self, key: GraphKey, error: Exception) -> None:
        message = described(error)
        self.failed[key] = message
        self.counts.capture_failures += 1
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
        if newest.recorded.bytes > limit:  # dropping others would not be enough
            self.drop(newest, f"its capture took {newest.recorded.bytes:,} bytes, above max_graph_memory={limit:,}")
        while self.bytes > limit:
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        oldest = min(self._recordings.values(), key=lambda recording: recording.last_used)
        self.counts.evictions += 1
        self._patience[oldest.key] = 2 * self._uses_before_capture(oldest.key)
        self.drop(oldest)
        self._tell(GraphEventKind.EVICTED, oldest.key, f"after {oldest.hits} replays")

    def drop(self, recording: Recording, why: str | None = None) -> None:
        """Forget a recording; with a reason it is not recorded again."""
        self._recordings.pop(recording.key, None)
        recording.recorded.release()
        if why is not None:
            self.failed[recording.key] = why
            self._counters.fall_back(f"{describe(recording.key)} is not used any more: {why}")
            self._tell(GraphEventKind.FAILED, recording.key, why)
        self._changed()

    def drop_all(self, why: str) -> None:
        """Forget what is recorded, because the model changed; all of it is wanted again."""
        self._stop_behind()
        keys = [recording.key for recording in self.recordings]
        for recording in self.recordings:
            self.drop(recording)
            self._tell(GraphEventKind.EVICTED, recording.key, why)
        if not keys:
            return
        self._counters.fall_back(f"{why}; what was recorded is dropped and recorded again")
        for key in keys:
            self._wanted[key] = max(self._wanted[key], self._uses_before_capture(key))

    def _stop_behind(self) -> None:
        behind, self.behind = self.behind, None
        if behind is not None:
            behind[1].close()

    def suspend(self, why: str | None) -> None:
        """Run every step without a recording for this reason, and record nothing; None: with recordings again."""
        if why is not None and why != self.suspended and self._recorder is not None:
            self._counters.fall_back(f"{why}, which a replay does not call; steps are not recorded")
        self.suspended = why
        self._changed()

    def _changed(self) -> None:
        self.version += 1

    def check_open(self) -> CapturedSteps:
        """The steps that are recorded.

        Raises:
            EngineError: the store is closed.
        """
        if self._steps is None:
            raise EngineError("this engine is closed; load a new one with Engine.load()")
        return self._steps

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

    def close(self) -> None:
        """Release every recording."""
        self._stop_behind()
        recorders = {id(r.recorder): r.recorder for r in self._recordings.values()}
        for recording in self.recordings:
            recording.recorded.release()
        self._recordings.clear()
        self._recorder = None
        # They hold the weights, which would wait for the garbage collector.
        self._steps = None
        self._changed()
        for recorder in recorders.values():
            recorder.close()
