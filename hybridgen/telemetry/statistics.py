"""What happened, counted."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from hybridgen.display import html_table
from hybridgen.fields import about, described

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Counters:
    """Counts of an engine's steps and of every time something ran another way than asked for."""

    steps: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(phase, kind, reason) of each launched call."""
    tokens: Counter[str] = field(default_factory=Counter)
    """`prompt` (fed), `cached` (of prompts, not fed because their keys and values were there), `truncated` (cut from
    prompts, see `SamplingParams.truncate_prompt`), `generated` and `scored` (of prompts)."""
    requests: Counter[str] = field(default_factory=Counter)
    """`submitted`, and each finish reason."""
    drafts: Counter[str] = field(default_factory=Counter)
    """Of decode steps, where somebody drafts: `rows`, `tokens` that they brought, drafts `checked` and `accepted`."""
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


@described
@dataclass(frozen=True, kw_only=True)
class GraphRow:
    """One recorded step."""

    executor: str = field(
        metadata=about(
            "`layers`, `chain`, `persistent` or `rows`; `sampler`: what is left of steps in which rows have a grammar."
        )
    )
    phase: str = field(metadata=about("`prefill` or `decode`."))
    tokens: int = field(metadata=about("Its bucket: tokens of a prefill, rows of a decode step."))
    rows: int = field(metadata=about("Rows that it samples."))
    sampling: str = field(
        metadata=about("The parts of the sampler that it has; `greedy` has none, `outside`: it ends at the logits.")
    )
    owner: str = field(metadata=about("`cuda graph`, `cudagraph tree` or `stand-in`."))
    lazy: bool = field(metadata=about("Captured while idle, not at warm-up."))
    hits: int = field(metadata=about("Steps that it ran."))
    padded_hits: int = field(metadata=about("Those of them that were padded to its size."))
    bytes: int = field(metadata=about("Device memory that its capture took."))
    seconds: float = field(
        metadata=about(
            "A replay with padding rows only, until the device is done. It decides whether padding is worth its time."
        )
    )
    plain_seconds: float = field(metadata=about("The same step without the recording."))


@described
@dataclass(frozen=True, kw_only=True)
class PhaseCounts:
    """Steps of one phase, by what graphs did for them. Steps are `hits + misses`."""

    hits: int = field(default=0, metadata=about("Steps that a graph ran."))
    padded_hits: int = field(default=0, metadata=about("Those of them that were padded to a larger bucket."))
    misses: int = field(default=0, metadata=about("Steps that ran without a graph."))

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


@described
@dataclass(frozen=True, kw_only=True)
class GraphStats:
    """What the graph store holds and has done."""

    graphs: tuple[GraphRow, ...] = field(default=(), metadata=about("A row for each graph that is kept."))
    bytes: int = field(default=0, metadata=about("Device memory that their captures took."))
    hits: int = field(default=0, metadata=about("Steps that a graph ran."))
    padded_hits: int = field(default=0, metadata=about("Those of them that were padded to a larger bucket."))
    misses: Mapping[str, int] = field(
        default_factory=dict,
        metadata=about("Steps that ran without a graph, by reason; empty in modes without graphs."),
    )
    phases: Mapping[str, PhaseCounts] = field(
        default_factory=dict,
        metadata=about("The same steps by phase, `prefill` and `decode`; empty in modes without graphs."),
    )
    lazy_captures: int = field(default=0, metadata=about("Graphs that were captured while idle."))
    evictions: int = field(default=0, metadata=about("Graphs that were dropped for others."))
    behind: Mapping[str, str] = field(
        default_factory=dict,
        metadata=about("What is made while steps run without it, and by whom, such as a process that compiles."),
    )
    capture_failures: int = field(default=0, metadata=about("Captures that were tried and failed."))
    failures: Mapping[str, str] = field(
        default_factory=dict, metadata=about("Messages of failed captures and of graphs that were found wrong.")
    )

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
            *(f"{name}: {what}" for name, what in self.behind.items()),
            f"{len(self.failures)} failed",
        ]
        return ", ".join(parts)


@described
@dataclass(frozen=True, kw_only=True)
class DecodeStats:
    """Decode steps that followed one another, over all requests."""

    steps: int = field(default=0, metadata=about("How many there were."))
    seconds: float = field(default=0.0, metadata=about("Wall time of those steps, from read to read."))
    read_bandwidth: float | None = field(
        default=None,
        metadata=about(
            "Bytes per second: each step's weights and its rows' keys and values, over that time. None with experts."
        ),
    )
    ceiling: float | None = field(
        default=None, metadata=about("Bytes per second that the device reads at best, as measured; None on a CPU.")
    )
    mbu: float | None = field(
        default=None, metadata=about("`read_bandwidth` as a share of `ceiling` (model bandwidth utilisation).")
    )

    def summary(self) -> str:
        """One line."""
        if not self.steps:
            return "no steps"
        mean = f"{self.steps} steps of {1e3 * self.seconds / self.steps:.3f} ms"
        if self.read_bandwidth is None:
            return mean
        share = "" if self.mbu is None else f", {self.mbu:.0%} of {(self.ceiling or 0) / 1e9:,.0f}"
        return f"{mean}, {self.read_bandwidth / 1e9:,.1f} GB/s{share}"


@described
@dataclass(frozen=True, kw_only=True)
class PrefixStats:
    """What requests shared with earlier ones."""

    state: str = field(default="on", metadata=about("`on`, or why nothing is shared."))
    pages: int = field(default=0, metadata=about("Pages that can be found by their tokens, those in use included."))
    prompt_tokens: int = field(default=0, metadata=about("Of the requests that were admitted."))
    cached_tokens: int = field(default=0, metadata=about("How many of them had their keys and values already."))
    evicted: int = field(default=0, metadata=about("Pages that made room for others."))

    @property
    def hit_rate(self) -> float | None:
        """Cached tokens as a share of all prompt tokens; None before the first request."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    def summary(self) -> str:
        """One line."""
        if self.state != "on" or not self.prompt_tokens:
            return self.state
        return (
            f"{self.cached_tokens:,} of {self.prompt_tokens:,} prompt tokens ({self.hit_rate:.0%}), "
            f"{self.pages:,} pages kept, {self.evicted:,} evicted"
        )


@described
@dataclass(frozen=True, kw_only=True)
class SpeculationStats:
    """What drafts brought."""

    drafter: str = field(default="off", metadata=about("Its name, or `off` with the reason."))
    steps: int = field(default=0, metadata=about("Decode steps, counted for each of their requests."))
    tokens: int = field(default=0, metadata=about("Tokens that they brought."))
    drafted: int = field(default=0, metadata=about("Drafts that were checked."))
    accepted: int = field(default=0, metadata=about("Those of them that were right."))
    weight_bytes: int = field(default=0, metadata=about("Of the weights of the model that drafts, if one does."))
    cache_bytes: int = field(default=0, metadata=about("Of its keys and values; `EngineStats.cache_bytes` has them."))

    @property
    def tokens_per_step(self) -> float | None:
        """Mean tokens of a request in a decode step; None before the first one."""
        return self.tokens / self.steps if self.steps else None

    def summary(self) -> str:
        """One line."""
        own = ""
        if self.weight_bytes:
            own = f" ({self.weight_bytes / 2**20:,.0f} MiB, and {self.cache_bytes / 2**20:,.0f} MiB of the KV cache)"
        if not self.steps:
            return f"{self.drafter}{own}"
        return (
            f"{self.drafter}{own}: {self.accepted:,} of {self.drafted:,} drafts accepted, "
            f"{self.tokens_per_step:.2f} tokens a step"
        )


@described
@dataclass(frozen=True, kw_only=True)
class ArtifactStats:
    """What came from the compile cache. A hit was in it, a miss had to be made."""

    state: str = field(default="off", metadata=about("`hit`, `miss`, or `off` where nothing is kept."))
    reason: str = field(default="", metadata=about("Why there was no entry, or where it is from."))
    key: str = field(default="", metadata=about("The digest that names the entry."))
    path: str = field(default="", metadata=about("The store."))
    hits: Mapping[str, int] = field(
        default_factory=dict,
        metadata=about(
            "By phase of start-up: `artifacts` (the entry), `tuning` (documents), `compile` (units), "
            "`capture` (planned graphs)."
        ),
    )
    misses: Mapping[str, int] = field(default_factory=dict, metadata=about("The same of what had to be made."))
    notes: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "What keeps the cache from working as well as it could: variables that a user set, a store "
            "that cannot be written."
        ),
    )


class StartupRow(NamedTuple):
    """One phase of start-up."""

    phase: str
    seconds: float
    hits: int
    misses: int


class FormatRow(NamedTuple):
    """The projections whose weights are in one format. Experts count where they are stored in small codes; those that
    transformers joins do not."""

    projections: int
    """An expert has two: gate and up are one."""
    bits: float
    """Of a weight, with its share of scales and zero points."""
    error: float | None = None
    """Root mean square of their distances from the weights that they were made of, each relative to its weight; None
    where those were not there."""

    def __str__(self) -> str:
        error = "" if self.error is None else f", rounded with a relative error of {self.error:.2g}"
        return f"{self.bits:.2f} bits a weight{error}"


@described
@dataclass(frozen=True, kw_only=True, repr=False)
class EngineStats:
    """A snapshot of what an engine has done and holds. `str()` of it is a table."""

    model: str = field(metadata=about("Its path or name."))
    mode: str = field(metadata=about("How steps run; never `auto`."))
    device: str = field(metadata=about("Where the model is."))
    dtype: str = field(metadata=about("Of its weights."))
    startup: Mapping[str, float] = field(
        metadata=about(
            "Seconds of each phase of start-up, in order; `first token` is that of the first request, "
            "once there was one."
        )
    )
    artifacts: ArtifactStats = field(default_factory=ArtifactStats, metadata=about("What came from the compile cache."))
    requests: Mapping[str, int] = field(metadata=about("`submitted`, and how many ended by each finish reason."))
    tokens: Mapping[str, int] = field(
        metadata=about(
            "`prompt` (fed), `cached` (of prompts, not fed), `truncated` (cut from prompts), `generated` and "
            "`scored` (of prompts)."
        )
    )
    steps: Mapping[tuple[str, str, str], int] = field(metadata=about("Calls by (phase, kind, reason)."))
    fallbacks: Mapping[str, int] = field(
        metadata=about("How often something ran another way than asked for, by reason.")
    )
    compiled: int = field(
        metadata=about("Functions that `torch.compile` made at warm-up: one per kind of layer and phase.")
    )
    late_compiles: int = field(
        metadata=about("Functions made after it. Each of them stopped the engine while it was compiled.")
    )
    graphs: GraphStats = field(metadata=about("Recorded steps."))
    decode: DecodeStats = field(metadata=about("How fast decode steps read memory."))
    fused: Mapping[str, str] = field(
        metadata=about(
            "What serves which decode sizes in place of the model's own layers, or why nothing does; and what a trial "
            "at the start left as the model does it, because that was as fast."
        )
    )
    running: int = field(metadata=about("Requests that have a slot."))
    waiting: int = field(metadata=about("Requests that wait for one."))
    pages: int = field(metadata=about("Pages of the KV cache."))
    free_pages: int = field(
        metadata=about("Those that no request has; the prefix cache keeps some of them until others need them.")
    )
    page_size: int = field(metadata=about("Positions per page."))
    cache_bytes: int = field(metadata=about("Of the KV cache."))
    kv_dtype: str = field(default="", metadata=about("In what keys and values are cached, and by which scales."))
    prefix: PrefixStats = field(default_factory=PrefixStats, metadata=about("The prefix cache."))
    speculation: SpeculationStats = field(default_factory=SpeculationStats, metadata=about("What drafts brought."))
    weights: Mapping[str, FormatRow] = field(
        default_factory=dict, metadata=about("Projections and bits of a weight, by format.")
    )

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

    def __repr__(self) -> str:
        return (
            f"EngineStats({self.model!r}, {self.mode} on {self.device}, {_counts(self.requests)}, "
            f"{self.tokens.get('generated', 0):,} tokens generated)"
        )

    def __str__(self) -> str:
        return "\n".join(f"{name:<24} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        """What a notebook shows: the same table."""
        return html_table(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("model", f"{self.model} ({self.mode}, {self.dtype} on {self.device})"),
            *(("weights", f"{row.projections} projections {name}, {row}") for name, row in self.weights.items()),
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
                f"{self.cache_bytes / 2**20:,.0f} MiB{f', {self.kv_dtype}' if self.kv_dtype else ''}",
            ),
            ("prefix cache", self.prefix.summary()),
            ("speculation", self.speculation.summary()),
        ]


def _rates(phases: Mapping[str, PhaseCounts]) -> list[tuple[str, float]]:
    """The hit rate of each phase that had steps."""
    return [(phase, counts.hit_rate) for phase, counts in phases.items() if counts.hit_rate is not None]


def _timed(row: StartupRow) -> str:
    counts = f", {row.hits} hits, {row.misses} misses" if row.hits or row.misses else ""
    return f"{row.seconds:7.2f} s{counts}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"
