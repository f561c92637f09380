"""The capture plan: which recordings were used, what they cost, and so what the next start records first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.store import GraphStore
from hybridgen.models.attention import Phase
from hybridgen.sampling import SamplerPlan

DOCUMENT = "capture-plan"
BUDGET_SECONDS = 2.0
"""What capturing may take on a warm start; what is left out is recorded while idle, when it is wanted."""
_KEPT = 512
_COLD = 0.05
"""Fewer uses than this, after fading, are none."""
_FADES = 0.5
"""What earlier runs' uses count for, against this run's."""


@dataclass(frozen=True)
class PlannedGraph:
    """A recording of an earlier process."""

    key: GraphKey
    uses: float
    """Steps that ran it or wanted it, those of earlier processes faded."""
    times: tuple[float, float] | None
    """Seconds of the step without its recording and with it; None where those that were measured are out of date."""
    capture_seconds: float


def read(document: Mapping[str, Any] | None) -> list[PlannedGraph]:
    """The plan of a document; empty where there is none or it is another version's."""
    if document is None or document.get("format") != 2:
        return []
    found = []
    try:
        for row in document["graphs"]:
            sampling = row["sampling"]
            plan = None if sampling is None else SamplerPlan(**sampling)
            rows, tokens, query_len = (int(row[name]) for name in ("rows", "tokens", "query_len"))
            quiet = bool(row.get("quiet", False))
            key = GraphKey(row["executor"], Phase(row["phase"]), rows, tokens, query_len, plan, quiet)
            measured = [row[name] for name in ("plain_seconds", "seconds")]
            times = None if None in measured else (float(measured[0]), float(measured[1]))
            found.append(PlannedGraph(key, float(row["uses"]), times, float(row["capture_seconds"])))
    except (KeyError, TypeError, ValueError):
        return []
    return found


def write(store: GraphStore, before: Iterable[PlannedGraph]) -> dict[str, Any]:
    """The plan after this process: its recordings, and what earlier ones knew of others."""
    rows = {
        graph.key: replace(graph, uses=graph.uses * _FADES, times=None if store.times_changed else graph.times)
        for graph in before
    }
    for recording in store.recordings:
        recorded, key = recording.recorded, recording.key
        uses = recording.hits - recording.padded_hits + (rows[key].uses if key in rows else 0.0)
        times = recorded.plain_seconds, recorded.seconds
        rows[key] = PlannedGraph(key, uses, times, recording.capture_seconds)
    for key, count in store.wanted.items():
        if key in rows:
            rows[key] = replace(rows[key], uses=rows[key].uses + count)
    kept = sorted(rows.values(), key=lambda graph: graph.uses, reverse=True)[:_KEPT]
    return {"format": 2, "graphs": [_row(graph) for graph in kept]}


def _row(graph: PlannedGraph) -> dict[str, Any]:
    key = graph.key
    return {
        "executor": key.executor,
        "phase": str(key.phase),
        "query_len": key.query_len,
        "quiet": key.quiet,
        "tokens": key.tokens,
        "rows": key.rows,
        "sampling": None if key.sampler is None else key.sampler._asdict(),
        "uses": round(graph.uses, 3),
        "plain_seconds": None if graph.times is None else graph.times[0],
        "seconds": None if graph.times is None else graph.times[1],
        "capture_seconds": graph.capture_seconds,
    }


def first(
    keys: Iterable[GraphKey],
    planned: Iterable[PlannedGraph],
    *,
    named: Collection[Phase] = (),
    budget: float = BUDGET_SECONDS,
) -> list[GraphKey]:
    """What a warm start records: the buckets that the user named, whatever they cost; then of what the config allows,
    what was used, the most used first, as long as the budget lasts. Where nothing was used yet (`hybridgen cache
    warm`), as much as the budget allows of everything.

    Args:
        keys: what a cold start would record, what serves the most first.
        planned: what is known from earlier processes; without any, all keys are recorded, as on a cold start.
        named: phases whose buckets the user named.
        budget: seconds for what the user did not name.
    """
    keys = list(keys)
    known = {graph.key: graph for graph in planned}
    if not known:
        return keys
    asked = dict.fromkeys(key for key in keys if key.phase in named)
    # Hot prompt lengths and batch sizes of samplers that a start without a plan does not record come along.
    buckets = {(key.phase, key.tokens) for key in keys}
    hot = [g.key for g in known.values() if g.uses >= _COLD and (g.key.phase, g.key.tokens) in buckets]
    order = {key: index for index, key in enumerate(hot or keys) if key not in asked}
    ranked = sorted(order, key=lambda key: (-known[key].uses if key in known else 0.0, order[key]))
    typical = sorted(graph.capture_seconds for graph in known.values())[len(known) // 2]
    chosen: list[GraphKey] = []
    for key in ranked:
        budget -= known[key].capture_seconds if key in known else typical
        if budget < 0 and (asked or chosen):
            break
        chosen.append(key)
    return [*asked, *chosen]
