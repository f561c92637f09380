"""The capture plan: what was used comes first, within the budget."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from hybridgen.graphs import capture_plan as history
from hybridgen.graphs.capture_plan import PlannedGraph
from hybridgen.graphs.key import GraphKey
from hybridgen.models.attention import Phase
from hybridgen.sampling import SamplerPlan

GREEDY, SAMPLED = SamplerPlan(), SamplerPlan(sample=True, ranked=40)


def decode(size: int, plan: SamplerPlan | None = GREEDY) -> GraphKey:
    return GraphKey.decode(size, plan)


def planned(key: GraphKey, uses: float, seconds: float = 0.1) -> PlannedGraph:
    return PlannedGraph(key, uses, (2e-3, 1e-3), seconds)


KEYS = [decode(1), decode(2), decode(4), GraphKey.prefill(64, 1, GREEDY)]


def test_without_a_plan_everything_is_recorded() -> None:
    assert history.first(KEYS, []) == KEYS


def test_what_was_used_comes_first_and_nothing_else() -> None:
    graphs = [planned(decode(4), 5), planned(decode(1), 70), planned(decode(2), 0)]
    assert history.first(KEYS, graphs) == [decode(1), decode(4)]


def test_a_plan_that_nobody_used_records_what_the_budget_allows() -> None:
    graphs = [planned(key, 0, 0.8) for key in KEYS]
    assert history.first(KEYS, graphs) == KEYS[:2]
    assert history.first(KEYS, graphs, budget=0.1) == KEYS[:1]


def test_other_samplers_come_along_other_buckets_do_not() -> None:
    graphs = [planned(decode(2, SAMPLED), 9), planned(decode(3), 99)]
    assert history.first(KEYS, graphs) == [decode(2, SAMPLED)]


def test_buckets_that_the_user_named_are_recorded_whatever_was_used() -> None:
    graphs = [planned(decode(4), 5, 3.0), planned(KEYS[3], 9), planned(decode(2, SAMPLED), 1), planned(decode(8), 9)]
    decodes = KEYS[:3]
    assert history.first(KEYS, graphs, named={Phase.DECODE}) == [*decodes, KEYS[3], decode(2, SAMPLED)]
    # What is named takes nothing of the budget, and the budget is not for what nobody used.
    assert history.first(KEYS, graphs, named={Phase.DECODE}, budget=0.15) == [*decodes, KEYS[3]]
    assert history.first(KEYS, graphs[:1], named={Phase.DECODE}) == decodes
    assert history.first(KEYS, graphs, named=frozenset(Phase), budget=0.0) == KEYS
    assert history.first(KEYS, [planned(decode(1), 0)], named={Phase.DECODE}) == KEYS


class FakeStore:
    """What `history.write` reads of a store."""

    def __init__(self, recordings: list[Any], wanted: dict[GraphKey, int], times_changed: bool = False) -> None:
        self.recordings = recordings
        self.wanted = wanted
        self.times_changed = times_changed


class Times(NamedTuple):
    plain_seconds: float
    seconds: float


class FakeRecording:
    def __init__(self, key: GraphKey, hits: int, padded: int = 0) -> None:
        self.key, self.hits, self.padded_hits = key, hits, padded
        self.capture_seconds = 0.25
        self.recorded = Times(2e-3, 1e-3)


def test_written_and_read_again() -> None:
    store: Any = FakeStore([FakeRecording(decode(1), 10, 4), FakeRecording(decode(2, SAMPLED), 0)], {decode(4): 3})
    before = [planned(decode(1), 8), planned(decode(4), 2), planned(decode(8), 1)]
    document = history.write(store, before)
    found = {graph.key: graph for graph in history.read(document)}
    assert {key: graph.uses for key, graph in found.items()} == {
        decode(1): 10.0,  # 6 exact hits now, 8 before
        decode(2, SAMPLED): 0.0,
        decode(4): 4.0,  # wanted 3 times now, 2 uses before
        decode(8): 0.5,
    }
    assert found[decode(1)].capture_seconds == 0.25
    assert found[decode(1)].times == found[decode(8)].times == (2e-3, 1e-3)


def test_times_that_proved_wrong_are_not_kept_for_what_was_not_measured() -> None:
    recording = FakeRecording(decode(1), 10)
    recording.recorded = Times(4e-3, 2e-3)
    store: Any = FakeStore([recording], {}, times_changed=True)
    document = history.write(store, [planned(decode(1), 8), planned(decode(8), 1)])
    found = {graph.key: graph for graph in history.read(document)}
    assert (found[decode(1)].times, found[decode(8)].times) == ((4e-3, 2e-3), None)
    assert (found[decode(8)].uses, found[decode(8)].capture_seconds) == (0.5, 0.1)


@pytest.mark.parametrize(
    "document",
    [
        None,
        {},
        {"format": 2, "graphs": []},
        {"format": 1},
        {"format": 1, "graphs": [{"phase": "decode"}]},
        {"format": 1, "graphs": [{"phase": "neither", "sampling": None}]},
        {"format": 1, "graphs": [{"phase": "decode", "sampling": {"unknown": 1}}]},
    ],
)
def test_what_is_no_plan_is_none(document: dict[str, Any] | None) -> None:
    assert history.read(document) == []
