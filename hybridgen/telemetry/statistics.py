"""What happened, counted."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Counters:
    """Counts of an engine's steps and of every time something ran another way than asked for."""

    steps: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(phase, kind, reason) of each launched call."""
    tokens: Counter[str] = field(default_factory=Counter)
    """`prompt` (fed), `cached` (of prompts, not fed because their keys and values were there) and `generated`."""
    requests: Counter[str] = field(default_factory=Counter)
    """`submitted`, and each finish reason."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Reasons."""
    first_token: float | None = None
    """Seconds from the first request to its first token."""

    def fall_back(self, reason: str, count: int = 1) -> None:
        """Count a fallback, once or several times; warn the first time that a reason occurs.

        Never raises, because its callers go on after it. Where warnings are errors, it logs instead.
        """
        first = reason not in self.fallbacks
        self.fallbacks[reason] += count
        if not first:
            return
        try:
            warnings.warn(reason, RuntimeWarning, stacklevel=3)
        except RuntimeWarning:
            logger.error("%s", reason)


@dataclass(frozen=True, kw_only=True)
class GraphRow:
    """One recorded step."""

    executor: str
    """`layers`, `chain` or `persistent`."""
    phase: str
    tokens: int
    """Its bucket: tokens of a prefill, rows of a decode step."""
    rows: int
    """Rows that it samples."""
    sampling: str
    """The parts of the sampler that it has; `greedy` has none, `outside`: it ends at the logits."""
    owner: str
    """`cuda graph`, `cudagraph tree` or `stand-in`."""
    lazy: bool
    """Captured while idle, not at warm-up."""
    hits: int
    padded_hits: int
    bytes: int
    seconds: float
    """A replay with padding rows only, until the device is done. It decides whether padding is worth its time."""
    plain_seconds: float
    """The same step without the recording."""


@dataclass(frozen=True, kw_only=True)
class PhaseCounts:
    """Steps of one phase, by what graphs did for them. Steps are `hits + misses`."""

    hits: int = 0
    """Steps that a graph ran."""
    padded_hits: int = 0
    """Those of them that were padded to a larger bucket."""
    misses: int = 0
    """Steps that ran without a graph."""

    @property
    def hit_rate(self) -> float | None:
        """Hits over steps, from 0 to 1; None before the first step."""
        return hit_rate(self.hits, self.misses)

    def plus(self, after: PhaseCounts, before: PhaseCounts) -> PhaseCounts:
        """These and the steps between two snapshots."""
        return PhaseCounts(
            hits=self.hits + after.hits - before.hits,
            padded_hits=self.padded_hits + after.padded_hits - before.padded_hits,
            misses=self.misses + after.misses - before.misses,
        )


def hit_rate(hits: int, misses: int) -> float | None:
    """Steps that a graph ran as a share of all steps, from 0 to 1; None where there was no step."""
    return hits / (hits + misses) if hits + misses else None


@dataclass(frozen=True, kw_only=True)
class GraphStats:
    """What the graph store holds and has done."""

    graphs: tuple[GraphRow, ...] = ()
    bytes: int = 0
    """Device memory that their captures took."""
    hits: int = 0
    """Steps that a graph ran."""
    padded_hits: int = 0
    """Those of them that were padded to a larger bucket."""
    misses: Mapping[str, int] = field(default_factory=dict)
    """Steps that ran without a graph, by reason; empty in modes without graphs."""
    phases: Mapping[str, PhaseCounts] = field(default_factory=dict)
    """The same steps by phase, `prefill` and `decode`; empty in modes without graphs."""
    lazy_captures: int = 0
    evictions: int = 0
    capture_failures: int = 0
    """Captures that were tried and failed."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Messages of failed captures and of graphs that were found wrong."""

    @property
    def hit_rate(self) -> float | None:
        """Steps that a graph ran as a share of all steps, from 0 to 1; None where there was no step to record."""
        return hit_rate(self.hits, sum(self.misses.values()))

    def summary(self) -> str:
        """One line."""
        owners = Counter(row.owner for row in self.graphs)
        held = ", ".join(f"{count} {owner}s" for owner, count in owners.items()) or "none"
        parts = [
            f"{held} ({self.bytes / 2**20:,.0f} MiB)",
            f"{self.hits:,} hits, {self.padded_hits:,} of them padded",
            f"{sum(self.misses.values()):,} misses",
            *(f"{rate:.1%} of {phase} steps" for phase, rate in _rates(self.phases)),
            f"{self.lazy_captures} captured while idle",
            f"{self.evictions} evicted",
            f"{len(self.failures)} failed",
        ]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class DecodeStats:
    """Decode steps that followed one another, over all requests."""

    steps: int = 0
    seconds: float = 0.0
    """Wall time of those steps, from read to read."""
    read_bandwidth: float = math.nan
    """Bytes per second: each step's weights and its rows' keys and values, over that time. NaN with experts."""
    ceiling: float | None = None
    """Bytes per second that the device reads at best, as measured; None on a CPU."""
    mbu: float = math.nan
    """`read_bandwidth` as a share of `ceiling` (model bandwidth utilisation)."""

    def summary(self) -> str:
        """One line."""
        if not self.steps:
            return "no steps"
        mean = f"{self.steps} steps of {1e3 * self.seconds / self.steps:.3f} ms"
        if math.isnan(self.read_bandwidth):
            return mean
        share = "" if math.isnan(self.mbu) else f", {self.mbu:.0%} of {(self.ceiling or 0) / 1e9:,.0f}"
        return f"{mean}, {self.read_bandwidth / 1e9:,.1f} GB/s{share}"


@dataclass(frozen=True, kw_only=True)
class PrefixStats:
    """What requests shared with earlier ones."""

    state: str = "on"
    """`on`, or why nothing is shared."""
    pages: int = 0
    """Pages that can be found by their tokens, those in use included."""
    prompt_tokens: int = 0
    """Of the requests that were admitted."""
    cached_tokens: int = 0
    """How many of them had their keys and values already."""
    evicted: int = 0
    """Pages that made room for others."""

    @property
    def hit_rate(self) -> float:
        """Cached tokens as a share of all prompt tokens; NaN before the first request."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else math.nan

    def summary(self) -> str:
        """One line."""
        if self.state != "on" or not self.prompt_tokens:
            return self.state
        return (
            f"{self.cached_tokens:,} of {self.prompt_tokens:,} prompt tokens ({self.hit_rate:.0%}), "
            f"{self.pages:,} pages kept, {self.evicted:,} evicted"
        )


@dataclass(frozen=True, kw_only=True)
class ArtifactStats:
    """What came from the compile cache. A hit was in it, a miss had to be made."""

    state: str = "off"
    """`hit`, `miss`, or `off` where nothing is kept."""
    reason: str = ""
    """Why there was no entry, or where it is from."""
    key: str = ""
    """The digest that names the entry."""
    path: str = ""
    """The store."""
    hits: Mapping[str, int] = field(default_factory=dict)
    """By phase of start-up: `artifacts` (the entry), `tuning` (documents), `compile` (units), `capture` (planned
    graphs)."""
    misses: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What keeps the cache from working as well as it could: variables that a user set, a store that cannot be
    written."""


class StartupRow(NamedTuple):
    """One phase of start-up."""

    phase: str
    seconds: float
    hits: int
    misses: int


class FormatRow(NamedTuple):
    """The projections whose weights are in one format; what transformers joins (experts) is none of them."""

    projections: int
    bits: float
    """Of a weight, with its share of scales and zero points."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot of what an engine has done and holds. `str()` of it is a table."""

    model: str
    mode: str
    device: str
    dtype: str
    startup: Mapping[str, float]
    """Seconds of each phase of start-up, in order; `first token` is that of the first request, once there was one."""
    artifacts: ArtifactStats = field(default_factory=ArtifactStats)
    """What came from the compile cache."""
    requests: Mapping[str, int]
    """`submitted`, and how many ended by each finish reason."""
    tokens: Mapping[str, int]
    """`prompt`, `cached` and `generated`, see `Counters`."""
    steps: Mapping[tuple[str, str, str], int]
    """Calls by (phase, kind, reason)."""
    fallbacks: Mapping[str, int]
    """How often something ran another way than asked for, by reason."""
    compiled: int
    """Functions that `torch.compile` made at warm-up: one per kind of layer and phase."""
    late_compiles: int
    """Functions made after it. Each of them stopped the engine while it was compiled."""
    graphs: GraphStats
    """Recorded steps."""
    decode: DecodeStats
    """How fast decode steps read memory."""
    fused: Mapping[str, str]
    """What serves which decode sizes in place of the model's own layers, or why nothing does."""
    running: int
    waiting: int
    pages: int
    """Pages of the KV cache."""
    free_pages: int
    """Those that no request has; the prefix cache keeps some of them until others need them."""
    page_size: int
    """Positions per page."""
    cache_bytes: int
    prefix: PrefixStats = field(default_factory=PrefixStats)
    """The prefix cache."""
    weights: Mapping[str, FormatRow] = field(default_factory=dict)
    """By format."""

    @property
    def startup_table(self) -> tuple[StartupRow, ...]:
        """Each phase of start-up with its seconds, and its hits and misses in the compile cache."""
        hits, misses = self.artifacts.hits, self.artifacts.misses
        return tuple(
            StartupRow(phase, seconds, hits.get(phase, 0), misses.get(phase, 0))
            for phase, seconds in self.startup.items()
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; steps as a list of objects."""
        values = asdict(self)
        values["steps"] = [
            {"phase": phase, "kind": kind, "reason": reason, "count": count}
            for (phase, kind, reason), count in self.steps.items()
        ]
        graphs = values["graphs"]
        graphs["hit_rate"] = self.graphs.hit_rate
        for phase, counts in self.graphs.phases.items():
            graphs["phases"][phase]["hit_rate"] = counts.hit_rate
        return values

    def __str__(self) -> str:
        rows = [
            ("model", f"{self.model} ({self.mode}, {self.dtype} on {self.device})"),
            *(
                ("weights", f"{row.projections} projections {name}, {row.bits:.2f} bits a weight")
                for name, row in self.weights.items()
            ),
            *((f"start: {row.phase}", _timed(row)) for row in self.startup_table),
            ("compile cache", ", ".join(filter(None, (self.artifacts.state, self.artifacts.reason)))),
            *(("", note) for note in self.artifacts.notes),
            ("requests", _counts(self.requests)),
            ("tokens", _counts(self.tokens)),
            *((f"{phase} calls", f"{count} {kind} ({reason})") for (phase, kind, reason), count in self.steps.items()),
            ("compiled", f"{self.compiled} at warm-up, {self.late_compiles} later"),
            ("graphs", self.graphs.summary()),
            *((size, how) for size, how in self.fused.items()),
            ("decode", self.decode.summary()),
            *(("no graph", f"{count} steps: {reason}") for reason, count in self.graphs.misses.items()),
            ("fallbacks", _counts(self.fallbacks)),
            ("now", f"{self.running} running, {self.waiting} waiting"),
            (
                "KV cache",
                f"{self.free_pages} of {self.pages} pages free, {self.page_size} positions each, "
                f"{self.cache_bytes / 2**20:,.0f} MiB",
            ),
            ("prefix cache", self.prefix.summary()),
        ]
        return "\n".join(f"{name:<24} {value}" for name, value in rows)


def _rates(phases: Mapping[str, PhaseCounts]) -> list[tuple[str, float]]:
    """The hit rate of each phase that had steps."""
    return [(phase, counts.hit_rate) for phase, counts in phases.items() if counts.hit_rate is not None]


def _timed(row: StartupRow) -> str:
    counts = f", {row.hits} hits, {row.misses} misses" if row.hits or row.misses else ""
    return f"{row.seconds:7.2f} s{counts}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"
