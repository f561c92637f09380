"""The store on its own: which recording runs a step, which are dropped, and what is counted."""

from __future__ import annotations

import itertools
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from store_cases import GREEDY, SAMPLED, Harness, decode, prefill

from hybridgen.core import GraphEvent, GraphEventKind
from hybridgen.errors import EngineError
from hybridgen.graphs import capture_plan, describe
from hybridgen.graphs.report import graph_stats
from hybridgen.models.attention import Phase
from hybridgen.sampling import SamplerPlan
from hybridgen.telemetry.statistics import PhaseCounts

BUCKETS = (1, 2, 4, 8)


class Model:
    """A least-recently-used cache, as plainly as it can be written."""

    def __init__(self, room: int, *, pads: bool) -> None:
        self.room, self.pads = room, pads
        self.held: list[int] = []  # the least recently used first
        self.patience = dict.fromkeys(BUCKETS, 1)
        self.wanted = dict.fromkeys(BUCKETS, 0)
        self.hits = self.padded = self.misses = self.evictions = self.captures = 0

    def use(self, size: int) -> list[tuple[str, Any]]:
        """What happens when a step of this size runs and everything is idle afterwards."""
        fits = [held for held in self.held if held == size or (self.pads and held > size)]
        if fits:
            chosen = min(fits)
            self.held.remove(chosen)
            self.held.append(chosen)
            self.hits += 1
            self.padded += chosen != size
            events = [("replay", decode(chosen))]
        else:
            self.misses += 1
            events = [("run", decode(size))]
        if size in self.held:
            return events
        self.wanted[size] += 1
        if self.wanted[size] < self.patience[size]:
            return events
        self.wanted[size] = 0
        while len(self.held) >= self.room:
            evicted = self.held.pop(0)
            self.patience[evicted] *= 2
            events.append(("release", decode(evicted)))
            self.evictions += 1
        self.held.append(size)
        self.captures += 1
        return [*events, ("record", decode(size))]


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_every_order_of_uses(room: int, pads: bool) -> None:
    """Evicted is the least recently used, before the capture; it comes back after twice the uses; counts are exact."""
    for order in itertools.product(BUCKETS, repeat=6):
        harness = Harness(max_graphs=room, max_padding_ratio=7 if pads else 0)
        model = Model(room, pads=pads)
        for size in order:
            harness.use(decode(size))
            harness.settle()
            assert harness.take() == model.use(size), order
            assert harness.held == sorted(model.held), order
        stats = graph_stats(harness.store)
        assert (stats.hits, stats.padded_hits, stats.evictions) == (model.hits, model.padded, model.evictions)
        assert (stats.lazy_captures, sum(stats.misses.values())) == (model.captures, model.misses)
        assert not stats.failures
        assert not harness.counters.fallbacks


@pytest.mark.parametrize("room", [2, 3])
def test_survivors_of_an_eviction_replay_themselves(room: int) -> None:
    for order in itertools.permutations(BUCKETS):
        harness = Harness(max_graphs=room, max_padding_ratio=0)
        for size in order:
            harness.use(decode(size))
            harness.settle()
        harness.take()
        for size in order[-room:]:
            harness.use(decode(size))
        assert harness.take() == [("replay", decode(size)) for size in order[-room:]]


def test_captured_at_start_largest_first_and_each_once() -> None:
    harness = Harness(prefill=(16, 32))
    bars: list[int] = []
    keys = [decode(size) for size in BUCKETS] + [prefill(16), prefill(32)]
    harness.store.capture(keys, lambda: bars.append(1))
    harness.store.capture(keys)
    assert [key.tokens for kind, key in harness.log if kind == "record"] == [32, 16, 8, 4, 2, 1]
    assert [kind for kind, _ in harness.log] == ["prepare", "record"] * 6
    assert len(bars) == 6
    assert {lazy for _, lazy in harness.asked} == {False}
    stats = graph_stats(harness.store)
    assert (stats.lazy_captures, stats.evictions) == (0, 0)
    assert not any(row.lazy for row in stats.graphs)


def test_capturing_more_than_fit_keeps_the_last() -> None:
    harness = Harness(max_graphs=2)
    harness.store.capture([decode(size) for size in BUCKETS])
    assert harness.take() == [
        ("record", decode(8)),
        ("record", decode(4)),
        ("release", decode(8)),
        ("record", decode(2)),
        ("release", decode(4)),
        ("record", decode(1)),
    ]


def test_rates_are_counted_by_phase_and_outlive_their_graphs() -> None:
    harness = Harness(prefill=(16,), max_padding_ratio=1)
    assert graph_stats(harness.store).hit_rate is None
    harness.store.capture([decode(2), decode(8), prefill(16)])
    for size, times in ((1, 1), (2, 3), (8, 2), (9, 4)):
        harness.use(decode(size), times)
    harness.use(prefill(16), 1)
    harness.use(prefill(12), 2)
    harness.use(prefill(99), 3)
    for gone in range(2):  # as counted, whether the graphs are still held or not
        stats = graph_stats(harness.store)
        assert stats.phases == {
            "prefill": PhaseCounts(hits=3, padded_hits=2, misses=3),
            "decode": PhaseCounts(hits=6, padded_hits=1, misses=4),
        }, gone
        assert {phase: counts.hit_rate for phase, counts in stats.phases.items()} == {"prefill": 0.5, "decode": 0.6}
        assert (stats.hits, stats.padded_hits, stats.hit_rate) == (9, 3, 9 / 16)
        assert stats.misses == {"above the largest bucket, 8": 4, "above the largest bucket, 16": 3}
        with nullcontext() if gone else pytest.warns(RuntimeWarning, match="the model changed"):
            harness.store.drop_all("the model changed")
    assert not harness.store.recordings


def test_only_captures_that_were_tried_count_as_failed_captures() -> None:
    harness = Harness(max_padding_ratio=0, errors={8: RuntimeError("refused"), 4: RuntimeError("refused")})
    with pytest.warns(RuntimeWarning):
        harness.store.capture([decode(size) for size in BUCKETS])
    stats = graph_stats(harness.store)
    assert (stats.capture_failures, len(stats.failures)) == (2, 4)


# ------------------------------------------------------------------ memory


def test_over_its_bytes_the_least_recently_used_goes() -> None:
    harness = Harness(max_bytes=250, max_padding_ratio=0, costs={"size": lambda key: 100})
    for size in (1, 2):
        harness.use(decode(size))
        harness.settle()
    assert harness.store.bytes == 200
    harness.use(decode(1))
    harness.use(decode(4))
    harness.settle()
    assert harness.held == [1, 4]
    stats = graph_stats(harness.store)
    assert (stats.bytes, stats.evictions) == (200, 1)
    assert {row.bytes for row in stats.graphs} == {100}


def test_a_large_one_can_push_out_several() -> None:
    costs = {"size": lambda key: key.tokens * 100}
    harness = Harness(max_bytes=850, max_padding_ratio=0, costs=costs)
    for size in (1, 2, 4):
        harness.use(decode(size))
        harness.settle()
    assert harness.store.bytes == 700
    harness.use(decode(8))
    harness.settle()
    assert (harness.held, graph_stats(harness.store).evictions) == ([8], 3)


def test_exactly_its_bytes_is_within_them() -> None:
    harness = Harness(max_bytes=200, max_padding_ratio=0, costs={"size": lambda key: 100})
    for size in (1, 2):
        harness.use(decode(size))
        harness.settle()
    assert (harness.held, graph_stats(harness.store).evictions) == ([1, 2], 0)


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("broken", BUCKETS)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory\nmore"), RuntimeError("refused"), ValueError()])
def test_a_failed_capture_costs_its_bucket_alone(broken: int, error: Exception) -> None:
    events: list[GraphEvent] = []
    harness = Harness(max_padding_ratio=0, errors={broken: error}, notify=events.append)
    with pytest.warns(RuntimeWarning, match=f"the decode graph of {broken} rows failed") as caught:
        harness.store.capture([decode(size) for size in BUCKETS])
    assert len(caught) == 1
    assert harness.held == [size for size in BUCKETS if size != broken]
    harness.take()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            for size in BUCKETS:
                route = harness.use(decode(size))
                assert (route.recording is None) == (size == broken)
            harness.settle()
        harness.store.capture([decode(broken)])  # not tried again
    assert not any(kind == "record" for kind, _ in harness.take())
    stats = graph_stats(harness.store)
    message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    assert stats.failures == {f"the decode graph of {broken} rows (greedy)": message}
    reason = "padding above max_padding_ratio=0" if broken < 8 else "bucket 8 failed, see GraphStats.failures"
    assert stats.misses == {reason: 4}
    assert stats.hits == 12
    assert list(harness.counters.fallbacks.values()) == [1]
    failed = [event for event in events if event.kind is GraphEventKind.FAILED]
    assert [(event.tokens, event.message) for event in failed] == [(broken, message)]


def test_a_failed_preparation_is_a_failed_capture() -> None:
    harness = Harness()
    harness.prepare = lambda key: (_ for _ in ()).throw(torch.OutOfMemoryError("tables"))
    with pytest.warns(RuntimeWarning, match="tables"):
        harness.store.capture([decode(4)])
    assert harness.held == []
    assert harness.use(decode(4)).reason == "bucket 4 failed, see GraphStats.failures"


def test_an_interrupt_in_a_capture_is_not_a_failure() -> None:
    harness = Harness(errors={4: KeyboardInterrupt()})
    harness.store.capture([decode(8)])
    with pytest.raises(KeyboardInterrupt):
        harness.store.capture([decode(4)])
    assert harness.held == [8]
    assert not graph_stats(harness.store).failures
    harness.recorder.errors.clear()
    harness.store.capture([decode(4)])
    assert harness.held == [4, 8]


def test_a_dropped_recording_is_released_once_and_not_recorded_again() -> None:
    events: list[GraphEvent] = []
    harness = Harness(notify=events.append, max_padding_ratio=0)
    harness.store.capture([decode(4), decode(8)])
    harness.use(decode(4), 3)
    recording = next(r for r in harness.store.recordings if r.key == decode(4))
    with pytest.warns(RuntimeWarning, match="the decode graph of 4 rows is not used any more: it is wrong"):
        harness.store.drop(recording, "it is wrong")
    harness.use(decode(4), 5)
    harness.settle()
    assert [event for event in harness.take() if event[0] in ("release", "record")] == [
        ("record", decode(8)),
        ("record", decode(4)),
        ("release", decode(4)),
    ]
    stats = graph_stats(harness.store)
    assert (stats.hits, stats.evictions) == (3, 0)
    assert stats.failures == {"the decode graph of 4 rows (greedy)": "it is wrong"}
    assert [(event.kind, event.tokens) for event in events] == [
        (GraphEventKind.CAPTURED, 8),
        (GraphEventKind.CAPTURED, 4),
        (GraphEventKind.FAILED, 4),
    ]


def test_a_listener_that_raises_is_counted_and_changes_nothing() -> None:
    def notify(event: GraphEvent) -> None:
        raise ValueError("mine")

    harness = Harness(notify=notify, max_graphs=1, max_padding_ratio=0)
    for size in BUCKETS:
        harness.use(decode(size))
    with pytest.warns(RuntimeWarning, match="on_graph_event raised ValueError: mine") as caught:
        harness.settle()
    assert len(caught) == 1
    assert harness.counters.fallbacks == {"on_graph_event raised ValueError: mine": 7}  # 4 captures, 3 evictions


def test_events_say_what_happened() -> None:
    events: list[GraphEvent] = []
    harness = Harness(
        prefill=(16,), notify=events.append, max_graphs=1, max_padding_ratio=0, costs={"size": lambda key: 2000}
    )
    harness.store.capture([decode(4)])
    harness.use(decode(4), 2)
    harness.use(prefill(16, 3))
    harness.settle()
    assert [(e.kind.value, e.phase, e.tokens, e.rows, e.message) for e in events] == [
        ("captured", "decode", 4, 4, "at warm-up, 2,000 bytes"),
        ("evicted", "decode", 4, 4, "after 2 replays"),
        ("captured", "prefill", 16, 4, "while idle, 2,000 bytes"),
    ]


# ------------------------------------------------------------------ decisions


@pytest.mark.parametrize(("size", "ratio", "bucket"), [(3, 1 / 3, 4), (3, 0.33, None), (5, 0.6, 8), (5, 0.59, None)])
def test_padding_up_to_a_ratio(size: int, ratio: float, bucket: int | None) -> None:
    harness = Harness(max_padding_ratio=ratio, costs={"seconds": lambda key: 100.0})
    harness.store.capture([decode(bucket) for bucket in BUCKETS])
    route = harness.use(decode(size))
    if bucket is None:
        assert (route.kind, route.key, route.padded) == ("layers, eager", decode(size), False)
        assert graph_stats(harness.store).misses == {f"padding above max_padding_ratio={ratio:g}": 1}
    else:
        assert (route.kind, route.key, route.reason) == ("layers, fake", decode(bucket), f"padded to bucket {bucket}")
        assert graph_stats(harness.store).padded_hits == 1


def test_an_exact_size_is_not_padding() -> None:
    harness = Harness(max_padding_ratio=0, costs={"seconds": lambda key: 100.0})
    harness.store.capture([decode(4)])
    route = harness.use(decode(4))
    assert (route.reason, route.padded, graph_stats(harness.store).padded_hits) == ("bucket 4", False, 0)


@pytest.mark.parametrize(("seconds", "replays"), [(1.9, True), (2.0, True), (2.01, False)])
def test_padding_where_measured_times_say_so(seconds: float, replays: bool) -> None:
    """Without a graph 2 rows take 1 s and 4 take 3 s, so that 3 are taken to need 2 s."""
    plain = {2: 1.0, 4: 3.0}
    costs = {"plain": lambda key: plain[key.tokens], "seconds": lambda key: seconds}
    harness = Harness((2, 4), costs=costs)
    harness.store.capture([decode(2), decode(4)])
    route = harness.use(decode(3))
    assert (route.recording is not None) == replays
    assert route.reason == (
        "padded to bucket 4" if replays else "without a graph is faster (measured) than padded to bucket 4"
    )
    assert harness.use(decode(4)).reason == "bucket 4"  # its own size is what it was recorded for


@pytest.mark.parametrize(("size", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8)])
def test_the_smallest_bucket_that_holds_a_step(size: int, bucket: int) -> None:
    harness = Harness()
    harness.store.capture([decode(bucket) for bucket in BUCKETS])
    route = harness.use(decode(size))
    assert route.key == decode(bucket)
    assert harness.take()[-1] == ("replay", decode(bucket))
    assert graph_stats(harness.store).padded_hits == (size != bucket)


def test_a_larger_one_serves_until_the_bucket_is_there() -> None:
    harness = Harness(capture_after=2)
    harness.store.capture([decode(8)])
    assert [harness.use(decode(3)).reason for _ in range(2)] == ["padded to bucket 8"] * 2
    harness.settle()
    assert harness.use(decode(3)).reason == "padded to bucket 4"
    assert harness.held == [4, 8]
    harness.use(decode(3), 9)
    assert not harness.store.pending


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (decode(9), "above the largest bucket, 8"),
        (decode(3), "bucket 4 is not captured"),
        (decode(2, SAMPLED), "no graph with this sampling, or with so many prompts"),
        (prefill(16, 2), "no graph with this sampling, or with so many prompts"),
        (prefill(17), "bucket 32 is not captured"),
        (prefill(33), "above the largest bucket, 32"),
    ],
)
def test_a_miss_has_a_reason(key: Any, reason: str) -> None:
    harness = Harness(prefill=(16, 32))
    harness.store.capture([decode(2), prefill(16)])
    route = harness.use(key, 2)
    assert (route.kind, route.key, route.reason) == ("layers, eager", key, reason)
    assert harness.take()[-1] == ("run", key)
    assert graph_stats(harness.store).misses == {reason: 2}


@pytest.mark.parametrize("ladders", [((), (16,)), ((2,), ())])
def test_a_phase_without_buckets_is_never_recorded(ladders: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    harness = Harness(*ladders)
    for key in (decode(2), prefill(16)):
        route = harness.use(key, 5)
        harness.settle()
        recorded = bool(ladders[key.phase is Phase.PREFILL])
        assert (route.wanted is not None) == recorded
        assert (harness.use(key).kind == "layers, fake") == recorded
        if not recorded:
            assert route.reason == f"{key.phase} is not recorded: it has no buckets"


def test_a_covering_sampler_serves_and_the_own_one_is_wanted() -> None:
    everything = SamplerPlan(True, 257, *[True] * 9, 5)
    harness = Harness(capture_after=3)
    harness.store.capture([decode(4, everything)])
    route = harness.use(decode(4), 3)
    assert (route.reason, route.padded, route.key.sampler) == ("bucket 4", False, everything)
    assert harness.store.pending == [decode(4)]
    harness.settle()
    assert harness.use(decode(4)).key.sampler == GREEDY
    assert graph_stats(harness.store).hits == 4


def test_a_plan_that_lacks_something_does_not_serve() -> None:
    for lacking in range(len(GREEDY)):
        values = [True, 64, *[True] * 9, 5]
        full = SamplerPlan(*values)
        values[lacking] = GREEDY[lacking]
        harness = Harness()
        harness.store.capture([decode(4, SamplerPlan(*values))])
        assert harness.use(decode(4, full)).recording is None
        assert harness.use(decode(4, SamplerPlan(*values))).recording is not None


def test_among_equal_buckets_the_faster_and_smaller_one() -> None:
    slow, fast = SAMPLED, SamplerPlan(logprobs=0)
    costs = {"seconds": lambda key: 0.9 if key.sampler == slow else 0.5}
    harness = Harness(prefill=(16,), costs=costs)
    harness.store.capture([decode(4, slow), decode(4, fast), prefill(16, 4), prefill(16, 2)])
    assert harness.use(decode(4)).key.sampler == fast
    assert harness.use(prefill(9, 1)).key.rows == 2
    assert harness.use(prefill(9, 3)).key.rows == 4


@pytest.mark.parametrize(("rows", "recorded"), [(0, 1), (1, 1), (2, 2), (3, 4), (5, 6), (6, 6)])
def test_prompts_of_a_prefill_graph_are_a_power_of_two_or_all(rows: int, recorded: int) -> None:
    harness = Harness((), (16,), max_rows=6)
    harness.use(prefill(9, rows))
    assert harness.store.pending == [prefill(16, recorded)]
    harness.settle()
    route = harness.use(prefill(9, rows))
    assert (route.key, route.padded) == (prefill(16, recorded), True)


@pytest.mark.parametrize(("rows", "recorded"), [(0, 64), (1, 64), (16, 64), (65, 100)])
def test_large_prefill_graphs_end_at_the_logits_of_many_prompts(rows: int, recorded: int) -> None:
    harness = Harness((), (16, 1024), max_rows=100)
    harness.use(prefill(700, rows))
    assert harness.store.pending == [prefill(1024, recorded, None)]
    harness.settle()
    harness.take()
    route = harness.use(prefill(700, rows))
    assert (route.key, route.padded) == (prefill(1024, recorded, None), True)
    assert [name for name, _ in harness.take()] == ["replay", "finish"]
    assert harness.store.pending == []


# ------------------------------------------------------------------ sampler outside


def test_a_graph_up_to_the_logits_serves_every_sampler() -> None:
    harness = Harness(prefill=(16,), capture_after=2)
    harness.store.capture([decode(4, None), prefill(16, 2, None)])
    route = harness.use(decode(3, SAMPLED), 2)
    assert (route.kind, route.reason, route.padded) == ("layers, fake", "padded to bucket 4, sampler outside", True)
    assert harness.take()[-2:] == [("replay", decode(4, None)), ("finish", (Phase.DECODE, 4, SAMPLED))]
    harness.use(prefill(16, 1, SAMPLED))
    assert harness.take() == [("replay", prefill(16, 2, None)), ("finish", (Phase.PREFILL, 2, SAMPLED))]
    assert harness.store.pending == [decode(4, SAMPLED)]  # wanted twice, the prefill once
    harness.settle()
    route = harness.use(decode(3, SAMPLED))
    assert (route.reason, route.finish) == ("padded to bucket 4", None)
    assert graph_stats(harness.store).hits == 4


def test_with_sampling_never_recorded_nothing_more_is_wanted() -> None:
    harness = Harness(sample_in_graph=False)
    harness.store.capture([decode(4, None)])
    harness.use(decode(4, SAMPLED), 9)
    harness.settle()
    assert [recording.key for recording in harness.store.recordings] == [decode(4, None)]


def test_the_rest_of_a_step_is_recorded_apart_and_is_no_step() -> None:
    harness = Harness(capture_after=2)
    harness.store.capture([decode(4, None)])
    ran = harness.router.route(decode(4, None))
    rest = harness.router.rest(ran, SAMPLED)
    assert rest is harness.router.rest(ran, SAMPLED)
    assert (rest.key, rest.kind) == (decode(4, None).rest(SAMPLED), "sampler, eager")
    assert (rest.reason, rest.wanted) == ("bucket 4, sampler outside", rest.key)
    rest.run()
    assert harness.take()[-1] == ("run", rest.key)
    harness.store.want(rest.key, 2)
    harness.settle()
    ran = harness.router.route(decode(4, None))
    again = harness.router.rest(ran, SAMPLED)
    assert (again.kind, again.reason, again.wanted) == ("sampler, fake", "bucket 4, sampler recorded apart", None)
    again.run()
    assert harness.take()[-1] == ("replay", rest.key)
    harness.store.count_hit(again.recording, padded=False)
    stats = graph_stats(harness.store)
    assert (stats.hits, [graph.hits for graph in stats.graphs if graph.executor == "sampler"]) == (0, [1])
    # It covers the greedy sampler of as many rows, which is wanted for itself; it stands for no whole step.
    covered = harness.router.rest(ran, GREEDY)
    assert (covered.recording, covered.wanted) == (again.recording, ran.key.rest(GREEDY))
    assert harness.use(decode(4, SAMPLED)).reason == "bucket 4, sampler outside"
    assert harness.router.rest(harness.router.route(decode(9, None)), SAMPLED).recording is None
    assert rest.key in [graph.key for graph in capture_plan.read(capture_plan.write(harness.store, ()))]


# ------------------------------------------------------------------ lazily


@pytest.mark.parametrize("after", [1, 2, 5])
def test_recorded_after_so_many_uses(after: int) -> None:
    harness = Harness(capture_after=after)
    for _ in range(after - 1):
        harness.use(decode(3))
        assert not harness.store.pending
        assert harness.store.capture_pending() is False
    harness.use(decode(4))
    assert harness.store.pending == [decode(4)]
    assert harness.held == []
    assert harness.store.capture_pending() is False
    assert harness.held == [4]
    assert graph_stats(harness.store).lazy_captures == 1
    assert graph_stats(harness.store).graphs[0].lazy


def test_the_most_wanted_first_and_one_at_a_time() -> None:
    harness = Harness()
    harness.use(decode(1), 2)
    harness.use(decode(8), 3)
    harness.use(decode(2), 1)
    assert harness.store.pending == [decode(8), decode(1), decode(2)]
    assert harness.store.capture_pending() is True
    assert harness.held == [8]


def test_nothing_is_recorded_lazily_where_that_is_off() -> None:
    harness = Harness(lazy=False)
    harness.use(decode(4), 50)
    assert not harness.store.pending
    assert harness.store.capture_pending() is False
    assert harness.held == []


def test_each_eviction_doubles_the_uses_that_it_takes_to_come_back() -> None:
    harness = Harness(max_graphs=1, capture_after=3, max_padding_ratio=0)
    for uses in (3, 6, 12, 24):
        for size in (1, 2):
            harness.use(decode(size), uses - 1)
            assert not harness.store.pending
            harness.use(decode(size))
            assert harness.store.pending == [decode(size)]
            harness.settle()
            assert harness.held == [size]
    assert graph_stats(harness.store).evictions == 7


def test_captures_of_a_phase_that_fail_alike_are_given_up() -> None:
    errors = {size: RuntimeError("refused") for size in (2, 4, 8)} | {16: ValueError("odd")}
    harness = Harness(prefill=(16, 32), errors=errors)
    with pytest.warns(RuntimeWarning) as caught:
        harness.store.capture([*(decode(size) for size in BUCKETS), prefill(16), prefill(32)])
    assert [key.tokens for kind, key in harness.log if kind == "record"] == [32, 16, 8, 4]
    assert len(caught) == 3
    assert harness.held == [32]
    failures = graph_stats(harness.store).failures
    assert failures["the decode graph of 1 rows (greedy)"] == "not tried, because 4 and 8 failed: RuntimeError: refused"
    assert len(failures) == 5
    harness.use(decode(1), 5)
    assert not harness.store.pending


@pytest.mark.parametrize("broken", BUCKETS)
def test_one_size_that_fails_with_every_sampler_ends_no_other(broken: int) -> None:
    events: list[GraphEvent] = []
    harness = Harness(errors={broken: RuntimeError("refused")}, notify=events.append)
    with pytest.warns(RuntimeWarning):
        harness.store.capture([decode(size, plan) for plan in (None, GREEDY, SAMPLED) for size in BUCKETS])
    assert harness.held == sorted(3 * [size for size in BUCKETS if size != broken])
    failed = [event for event in events if event.kind is GraphEventKind.FAILED]
    assert [(event.tokens, event.message) for event in failed] == [(broken, "RuntimeError: refused")] * 3


def test_every_size_that_is_not_tried_is_told() -> None:
    events: list[GraphEvent] = []
    harness = Harness(errors={size: RuntimeError("refused") for size in BUCKETS}, notify=events.append)
    with pytest.warns(RuntimeWarning):
        harness.store.capture([decode(size, plan) for size in BUCKETS for plan in (GREEDY, SAMPLED)])
    failed = [event for event in events if event.kind is GraphEventKind.FAILED]
    assert sorted(event.tokens for event in failed) == sorted(2 * BUCKETS)
    untried = {event.tokens for event in failed if event.message.startswith("not tried, because 4 and 8 failed")}
    assert untried == {1, 2}


def test_out_of_memory_is_no_reason_to_give_up_smaller_ones() -> None:
    harness = Harness(errors={size: torch.OutOfMemoryError("out of memory") for size in (2, 4, 8)})
    with pytest.warns(RuntimeWarning):
        harness.store.capture([decode(size) for size in BUCKETS])
    assert harness.held == [1]


def test_exact_sizes_where_those_are_asked_for() -> None:
    harness = Harness(exact_when_lazy=True)
    harness.store.capture([decode(4)])
    assert harness.use(decode(3)).reason == "padded to bucket 4"
    harness.settle()
    assert harness.use(decode(3)).reason == "bucket 3"
    assert harness.held == [3, 4]


def test_what_nobody_records_lazily_is_not_pending() -> None:
    harness = Harness()
    harness.store._recorder = lambda key, lazy: None if lazy else harness.recorder
    harness.use(decode(4), 9)
    assert not harness.store.pending
    harness.store.capture([decode(4)])
    assert harness.held == [4]


# ------------------------------------------------------------------ routes and the end


def test_the_version_changes_with_whatever_changes_a_route() -> None:
    harness = Harness(max_padding_ratio=0)
    versions = [harness.store.version]

    def changed() -> bool:
        versions.append(harness.store.version)
        return versions[-1] != versions[-2]

    route = harness.use(decode(4))
    assert harness.router.route(decode(4)) is route
    assert not changed()
    harness.store.capture([decode(4)])
    assert changed()
    assert harness.router.route(decode(4)) is not route
    harness.use(decode(4), 9)
    assert not changed()
    with pytest.warns(RuntimeWarning):
        harness.store.drop(harness.store.recordings[0], "wrong")
    assert changed()
    assert harness.router.route(decode(4)).recording is None


def test_a_store_without_a_recorder_runs_everything_plainly() -> None:
    harness = Harness()
    harness.store._recorder = None
    assert harness.use(decode(4), 3).reason == "nothing is recorded"
    assert not harness.store.pending
    harness.store.capture([decode(4)])
    assert harness.held == []
    assert graph_stats(harness.store).misses == {}  # not a miss: nothing was to be recorded


def test_closing_releases_everything() -> None:
    harness = Harness()
    harness.store.capture([decode(size) for size in BUCKETS])
    harness.use(decode(2))
    harness.take()
    harness.store.close()
    assert sorted(harness.take()) == sorted(("release", decode(size)) for size in BUCKETS)
    assert harness.recorder.closed == 1
    with pytest.raises(EngineError, match="closed"):
        harness.use(decode(2))
    harness.store.close()
    assert harness.recorder.closed == 1


def test_routes_of_very_many_sizes_do_not_pile_up() -> None:
    harness = Harness((), (16,))
    for tokens in range(1, 9000):
        harness.router.route(prefill(tokens))
    assert len(harness.router._routes) <= 4096


def test_names() -> None:
    assert describe(decode(4)) == "the decode graph of 4 rows"
    assert describe(prefill(16)) == "the prefill graph of 16 tokens"
    assert describe(prefill(16, 2)) == "the prefill graph of 16 tokens for 2 prompts"
    harness = Harness()
    plans = (GREEDY, SAMPLED, SamplerPlan(logprobs=0), SamplerPlan(True, 64, True, penalties=True, logprobs=3), None)
    harness.store.capture([decode(4, plan) for plan in plans])
    assert [row.sampling for row in graph_stats(harness.store).graphs] == [
        "greedy",
        "sample",
        "logprobs",
        "sample, ranked, nucleus, penalties, logprobs",
        "outside",
    ]
