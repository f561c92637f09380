"""What a store of recorded steps has done and holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from hybridgen.graphs.key import describe, describe_sampler
from hybridgen.graphs.store import GraphStore
from hybridgen.models.attention import Phase
from hybridgen.telemetry.statistics import GraphRow, GraphStats, PhaseCounts


def graph_stats(store: GraphStore) -> GraphStats:
    """Counts so far, and what is recorded. Steps may count meanwhile."""
    counts, behind = store.counts, store.behind
    return GraphStats(
        graphs=tuple(
            GraphRow(
                executor=r.key.executor,
                phase=str(r.key.phase),
                tokens=r.key.tokens,
                rows=r.key.rows,
                sampling=describe_sampler(r.key),
                owner=r.recorded.owner,
                lazy=r.lazy,
                hits=r.hits,
                padded_hits=r.padded_hits,
                bytes=r.recorded.bytes,
                seconds=r.recorded.seconds,
                plain_seconds=r.recorded.plain_seconds,
            )
            for r in store.recordings
        ),
        bytes=store.bytes,
        hits=counts.hits.total(),
        padded_hits=counts.padded_hits.total(),
        misses=dict(_misses_by(store, lambda phase, reason: reason)) if store.records else {},
        phases=_by_phase(store) if store.records else {},
        lazy_captures=counts.lazy_captures,
        evictions=counts.evictions,
        behind={} if behind is None else {describe(behind[0]): getattr(behind[1], "behind", "being made")},
        capture_failures=counts.capture_failures,
        failures={f"{describe(key)} ({describe_sampler(key)})": why for key, why in dict(store.failed).items()},
    )


def _misses_by(store: GraphStore, name: Callable[[Phase, str], str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (phase, reason), count in dict(store.counts.misses).items():
        found[name(phase, reason)] += count
    return found


def _by_phase(store: GraphStore) -> dict[str, PhaseCounts]:
    """Counts of every phase that had steps."""
    counts, misses = store.counts, _misses_by(store, lambda phase, reason: str(phase))
    return {
        str(phase): PhaseCounts(
            hits=counts.hits[phase], padded_hits=counts.padded_hits[phase], misses=misses[str(phase)]
        )
        for phase in Phase
        if counts.hits[phase] or misses[str(phase)]
    }
