"""The one place that decides how a step runs: which executor, recorded or not, padded to what, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from hybridgen.graphs.buckets import FEW_PROMPTS, MANY_PROMPTS, USUAL_PROMPT
from hybridgen.graphs.executor import Executor, StateExecutor
from hybridgen.graphs.key import LAYERS, GraphKey
from hybridgen.graphs.steps import RunSteps
from hybridgen.graphs.store import GraphStore, Recording
from hybridgen.models.attention import Phase
from hybridgen.sampling import SamplerPlan

FAILED = "failed, see GraphStats.failures"
"""How the reason of a step ends that has no graph because its capture failed, was not tried, or it was wrong."""
_MOST_ROUTES = 4096
"""Routes that are remembered: prompts have every length."""


@dataclass(eq=False)
class Route:
    """How steps of one size run, until the store changes."""

    key: GraphKey
    """What runs: the size that was asked for, or the bucket that holds it; with the executor."""
    run: Callable[[], None]
    kind: str
    """The executor and how it is launched, see `StepSummary.kind`."""
    reason: str
    recording: Recording | None = None
    padded: bool = False
    finish: Callable[[], None] | None = None
    """The part of `run` after the recording: sampling, where the recording ends at the logits."""
    wanted: GraphKey | None = None
    """What would serve these steps better, if it were recorded."""
    rests: dict[SamplerPlan, Route] = field(default_factory=dict)
    """How what is left runs of steps that end at their logits, as far as it was asked for; see `Router.rest`."""

    @property
    def only_replays(self) -> bool:
        """Whether the step is a graph's launch and nothing else, which needs nothing set up around it."""
        recording = self.recording
        if recording is None or self.finish is not None or recording.addresses is not None or not recording.checked:
            return False
        return recording.recorded.is_graph


class Router:
    """Decides how each step runs. Looks up and compares; nothing is captured here."""

    def __init__(
        self,
        store: GraphStore,
        executors: Sequence[Executor],
        steps: RunSteps,
        *,
        why_plain: str,
        note: str = "",
        reads_layers: bool = False,
        keeps_executor: bool = False,
    ) -> None:
        """
        Args:
            executors: in order of preference; the last one serves every step.
            why_plain: the reason of a step without a recording where nothing is recorded.
            note: what else to say of every recorded step.
            reads_layers: whoever drafts goes on from what the model's layers compute: where somebody drafts, they run,
                or an executor that leaves it.
            keeps_executor: never pad a decode step to a size that another executor serves: that one rounds otherwise.
        """
        self._store = store
        self._executors = tuple(executors)
        self._steps = steps
        self._why_plain = why_plain
        self._note = note
        self._reads_layers = reads_layers
        self._keeps_executor = keeps_executor
        self._routes: dict[GraphKey, Route] = {}
        self._version = -1

    @property
    def version(self) -> int:
        """Changes whenever a route may."""
        return self._store.version

    def route(self, wanted: GraphKey) -> Route:
        """How a step of this size runs now.

        Args:
            wanted: its size and sampler; the executor that it names does not matter.
        """
        if self._version != self._store.version or len(self._routes) >= _MOST_ROUTES:
            self._routes.clear()
            self._version = self._store.version
        route = self._routes.get(wanted)
        if route is None:
            route = self._routes[wanted] = self._decide(wanted)
        return route

    def forget(self) -> None:
        """Nothing runs any more: let go of steps and recordings, which refer to whoever has the router."""
        self._routes.clear()
        self._executors = ()

    def served(self, key: GraphKey) -> GraphKey:
        """The same step with the executor that serves it: the first that does not refuse."""
        if key.is_rest:
            return key
        for executor in self._executors:
            leaves = executor.name == LAYERS or isinstance(executor, StateExecutor)
            if self._reads_layers and not key.quiet and not leaves:
                continue
            if executor.refuses(key) is None:
                return key._replace(executor=executor.name)
        raise RuntimeError(f"no executor serves {key}; the last one must serve every step")

    def plain(self, key: GraphKey, reason: str, wanted: GraphKey | None = None) -> Route:
        """A step of exactly this size without a recording."""
        key = self.served(key)
        if key.is_rest:
            return Route(key, partial(self._steps.run, key), f"{key.executor}, eager", reason, wanted=wanted)
        executor = next(executor for executor in self._executors if executor.name == key.executor)
        kind = f"{key.executor}, {executor.launch}"
        return Route(key, partial(self._steps.run, key), kind, reason + _with_drafts(key), wanted=wanted)

    def rest(self, ran: Route, sampler: SamplerPlan) -> Route:
        """How what is left of a step runs that ended at its logits, and has rows with a grammar: recorded where the
        step is, but for prefill."""
        route = ran.rests.get(sampler)
        if route is None:
            route = ran.rests[sampler] = self._decide_rest(ran, ran.key.rest(sampler))
        return route

    def _decide_rest(self, ran: Route, key: GraphKey) -> Route:
        if ran.recording is None or key.phase is not Phase.DECODE:
            return self.plain(key, ran.reason)
        wanted = key if self._store.settings.sample_in_graph else None
        alike = (other for other in self._larger(key) if other.key.tokens == key.tokens)
        best = self._store.find(key) or min(alike, key=_preference, default=None)
        if best is None:
            return self.plain(key, f"{ran.reason}, sampler outside", wanted)
        return self._replay(best, f"{ran.reason}, sampler recorded apart", key, wanted)

    def without_recording(self, route: Route, reason: str) -> Route:
        """The same step, padding and all, without its recording."""
        plain = self.plain(route.key, reason)
        if route.finish is None:
            return plain
        run, finish = plain.run, route.finish

        def both() -> None:
            run()
            finish()

        return Route(plain.key, both, plain.kind, plain.reason)

    def by_any_thread(self, route: Route, reason: str) -> Route:
        """The same step where its recording belongs to another thread: padded to a recording that any thread replays,
        else without one. A decode step is staged alike for every size, so that another one can run it."""
        if route.key.phase is Phase.DECODE and route.finish is None:
            free = (other for other in self._larger(route.key) if other.recorded.thread is None)
            best = min(free, key=_preference, default=None)
            if best is not None and self._why_not(best, route.key) is None:
                return self._replay(best, f"padded to bucket {best.key.size}, {reason}", route.key)
        return self.without_recording(route, reason)

    def _decide(self, key: GraphKey) -> Route:
        self._store.check_open()
        settings = self._store.settings
        if self._store.suspended is not None:
            return self.plain(key, self._store.suspended)
        if not self._store.records:
            return self.plain(key, self._why_plain)
        if not self._buckets(key):
            why = settings.no_prefill if key.phase is Phase.PREFILL else "it has no buckets"
            return self.plain(key, f"{key.phase} is not recorded: {why}")
        exact = self._store.find(self.served(key))
        if exact is not None:
            return self._replay(exact, f"bucket {exact.key.size}", key)
        wanted = self._bucket_of(key)
        best = min(self._larger(key), key=_preference, default=None)
        if best is None:
            return self.plain(key, self._why_none(key, wanted), wanted)
        reason = self._why_not(best, key)
        if reason is not None:
            return self.plain(key, reason, wanted)
        padded = "padded to " if best.key.tokens != key.tokens else ""
        return self._replay(best, f"{padded}bucket {best.key.size}", key, wanted)

    def _replay(self, recording: Recording, reason: str, key: GraphKey, wanted: GraphKey | None = None) -> Route:
        if wanted == recording.key or not self._store.settings.improves:
            wanted = None
        if not recording.key.is_rest:
            reason += _with_drafts(recording.key) + self._note
        recorded, ran = recording.recorded, recording.key
        padded = ran.tokens != key.tokens
        kind = f"{ran.executor}, {recorded.owner}"
        if ran.sampler is not None or key.sampler is None or not ran.rows:
            return Route(ran, recorded.replay, kind, reason, recording, padded, wanted=wanted)
        # The recording ends at the logits: the sampler runs after it.
        finish = partial(self._steps.finish, ran, key.sampler)

        def run() -> None:
            recorded.replay()
            finish()

        return Route(ran, run, kind, f"{reason}, sampler outside", recording, padded, finish, wanted)

    def _larger(self, key: GraphKey) -> Iterator[Recording]:
        """Recordings that can run the step with padding."""
        only = self.served(key).executor if self._keeps_executor and key.phase is Phase.DECODE else None
        for recording in self._store.recordings:
            other = recording.key
            alike = _kind(other) == _kind(key)
            enough = other.tokens >= key.tokens and other.rows >= key.rows
            samples = other.sampler is None or (key.sampler is not None and other.sampler.covers(key.sampler))
            if alike and enough and samples and only in (None, other.executor):
                yield recording

    def _why_not(self, best: Recording, key: GraphKey) -> str | None:
        """Why a step is not padded to this recording's size."""
        ratio = self._store.settings.max_padding_ratio
        if ratio is not None:
            waste = (best.key.tokens - key.tokens) / key.tokens
            return None if waste <= ratio else f"padding above max_padding_ratio={ratio:g}"
        plain = self._store.timings.estimate(self.served(key)._replace(sampler=best.key.sampler))
        if plain is not None and best.recorded.seconds > plain:
            return f"without a graph is faster (measured) than padded to bucket {best.key.size}"
        return None

    def _why_none(self, key: GraphKey, wanted: GraphKey | None) -> str:
        if wanted is None:
            return f"above the largest bucket, {self._buckets(key)[-1]}"
        if wanted in self._store.failed:
            return f"bucket {wanted.size} {FAILED}"
        alike = (r.key for r in self._store.recordings if _kind(r.key) == _kind(key))
        if any(other.tokens >= key.tokens for other in alike):
            return "no graph with this sampling, or with so many prompts"
        return f"bucket {wanted.size} is not captured"

    def _buckets(self, key: GraphKey) -> tuple[int, ...]:
        """The sizes at which steps of its phase are recorded, in order."""
        settings = self._store.settings
        return settings.decode if key.phase is Phase.DECODE else settings.prefill

    def _bucket_of(self, key: GraphKey) -> GraphKey | None:
        """The bucket that such a step belongs to, with the executor that serves it; None above the largest."""
        settings = self._store.settings
        size = next((bucket for bucket in self._buckets(key) if bucket >= key.size), None)
        if size is None:
            return None
        large = key.phase is Phase.PREFILL and size > USUAL_PROMPT
        sampler = key.sampler if settings.sample_in_graph and not large else None
        if key.phase is Phase.DECODE:
            rows = key.rows if settings.exact_when_lazy else size
            return self.served(GraphKey.decode(rows, sampler, query_len=key.query_len, quiet=key.quiet))
        rows = 1 if sampler is not None else MANY_PROMPTS if large else FEW_PROMPTS
        while rows < key.rows:
            rows *= 2
        return self.served(GraphKey.prefill(size, min(rows, settings.max_rows), sampler))


def _kind(key: GraphKey) -> tuple[Phase, int, bool, bool]:
    """Steps that differ in it cannot stand for each other, whatever their sizes and samplers."""
    return key.phase, key.query_len, key.quiet, key.is_rest


def _with_drafts(key: GraphKey) -> str:
    """How a reason goes on where drafts are checked, or none are made."""
    if key.quiet:
        return ", drafting pauses"
    return f", {key.query_len - 1} drafts a row" if key.query_len > 1 else ""


def _preference(recording: Recording) -> tuple[int, int, bool, float]:
    """Less padding first, then those that sample, then the faster."""
    key = recording.key
    return key.tokens, key.rows, key.sampler is None, recording.recorded.seconds
