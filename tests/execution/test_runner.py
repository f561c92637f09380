"""Steps built by hand: what a call feeds, what it keeps, and the state it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import families
import pytest
import torch
from runners import free_runner, make_runner

from hybridgen.execution import ModelRunner, ring
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.execution.ring import LaunchedStep
from hybridgen.graphs import GraphSettings, StandInRecorder
from hybridgen.graphs.key import GraphKey
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerPlan, resolve
from hybridgen.telemetry.statistics import Counters

PROMPT = families.prompts_of((21,))[0]


@pytest.fixture
def runner() -> Iterator[ModelRunner]:
    runner = make_runner()
    yield runner
    free_runner(runner)


def admit(runner: ModelRunner, slot: int, pages: list[int]) -> None:
    runner.admit(Admission(slot, pages, resolve(SamplingParams(temperature=0.0), None, (), families.VOCAB), PROMPT))


def chunk(slot: int, start: int, stop: int) -> PrefillChunk:
    return PrefillChunk(slot, PROMPT[start:stop], start, len(PROMPT), 0, stop == len(PROMPT))


@pytest.mark.parametrize("cuts", [(21,), (1, 21), (20, 21), (5, 16, 17, 21)])
def test_chunks_of_any_length_give_the_same_tokens(runner: ModelRunner, cuts: tuple[int, ...]) -> None:
    admit(runner, 2, [3, 1])
    start = 0
    for stop in cuts:
        launched = runner.prefill([chunk(2, start, stop)])
        assert launched.rows == (stop == len(PROMPT))
        start = stop
    tokens = [launched.read().tokens[0][0]]
    assert runner.state.table[1].tolist() == [0, 0, 21, 0, 0]
    assert runner.state.table[2].tolist() == [0, 0, 1, 0, 0]
    tokens += [runner.decode((2,)).read().tokens[0][0] for _ in range(8)]
    assert tokens == families.reference(families.build("llama"), PROMPT, 9)[0]
    assert runner.state.table[1, 2] == 29


def test_a_call_samples_only_for_chunks_that_end(runner: ModelRunner) -> None:
    admit(runner, 0, [1, 2])
    admit(runner, 1, [3, 4])
    launched = runner.prefill([chunk(0, 0, 10), chunk(1, 0, 21)])
    assert len(launched.read().tokens) == 1
    assert runner.state.table[1].tolist() == [0, 21, 0, 0, 0]


def test_other_slots_are_left_alone(runner: ModelRunner) -> None:
    admit(runner, 0, [1, 2])
    admit(runner, 1, [3, 4])
    runner.prefill([chunk(0, 0, 21), chunk(1, 0, 21)])
    keys = runner.bound.sites[0].module._hybridgen.keys
    before = keys[[3, 4]].clone()
    runner.decode((0,))
    assert torch.equal(keys[[3, 4]], before)
    assert runner.state.table[1].tolist() == [22, 21, 0, 0, 0]


def test_a_failed_row_leaves_a_valid_token_behind(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    admit(runner, 0, [1, 2])
    runner.prefill([chunk(0, 0, 21)])
    monkeypatch.setattr(runner.bound, "forward", lambda ids, step, keep: torch.full((1, families.VOCAB), torch.nan))
    assert runner.decode((0,)).read().tokens == [[-1]]
    assert runner.state.table[0, 0] == 0


def record(runner: ModelRunner, *keys: GraphKey, **settings: object) -> None:
    stand_in = StandInRecorder()
    runner.use_graphs(
        GraphSettings(**{"decode": (1, 4), "prefill": (8, 32), "max_rows": 4, "max_padding_ratio": 64} | settings),
        recorder=lambda key, lazy: stand_in,
        why_plain="",
        counters=Counters(),
    )
    runner.capture(keys, lambda: None)


def test_recorded_steps_leave_the_state_of_plain_ones(runner: ModelRunner) -> None:
    def run() -> tuple[list, list[int]]:
        admit(runner, 0, [1, 2])
        admit(runner, 2, [3, 4])
        found = [runner.prefill([chunk(0, 0, 15)]), runner.prefill([chunk(0, 15, 21)])]
        found += [runner.prefill([chunk(2, 0, 21)]), *(runner.decode((2, 0)) for _ in range(3)), runner.decode((0,))]
        outputs = [step.read().tokens for step in found]
        return [outputs, [step.rows for step in found], runner.state.table.tolist()], found

    expected, _ = run()
    record(runner, *(GraphKey.decode(n, SamplerPlan()) for n in (1, 4)),
           *(GraphKey.prefill(n, 1, SamplerPlan()) for n in (8, 32)))  # fmt: skip
    actual, steps = run()
    assert actual == expected
    assert [step.reason for step in steps] == [
        *(f"padded to bucket {size}" for size in (32, 8, 32)),
        *["padded to bucket 4"] * 3,
        "bucket 1",
    ]
    assert runner.state.table[:, -1].tolist() == [0, 0, 0]


def test_the_same_batch_is_looked_up_once_until_the_store_changes(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = GraphKey.decode(1, SamplerPlan())
    record(runner, key)
    admit(runner, 0, [1, 2])
    runner.prefill([chunk(0, 0, 21)])
    looked_up: list[GraphKey] = []
    route = runner.router.route
    monkeypatch.setattr(runner.router, "route", lambda key: looked_up.append(key) or route(key))
    batch = (0,)
    assert {runner.decode(batch).kind for _ in range(4)} == {"layers, stand-in"}
    assert looked_up == [key]
    with pytest.warns(RuntimeWarning, match="of no use"):
        runner.graphs.drop(runner.graphs.recordings[0], "of no use")
    assert {runner.decode(batch).kind for _ in range(4)} == {"layers, eager"}
    assert looked_up == [key] * 2
    assert runner.decode((*batch,)).kind == "layers, eager"  # an equal batch, but another
    assert len(looked_up) == 3


@pytest.mark.parametrize("count", [2, 4])
def test_a_size_that_was_met_before_is_not_decided_again(
    runner: ModelRunner, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lookup takes as long with many recordings as with few: it looks at none of them."""
    record(runner, *(GraphKey.decode(size, SamplerPlan()) for size in range(1, count + 1)))
    keys = [GraphKey.decode(size, SamplerPlan()) for size in (1, 2)]
    first = [runner.router.route(key) for key in keys]
    looked_at: list[object] = []
    monkeypatch.setattr(runner.graphs, "find", lambda key: looked_at.append(key))
    monkeypatch.setattr(runner.router, "_larger", lambda key: looked_at.append(key) or iter(()))
    for _ in range(3):
        assert [runner.router.route(key) for key in keys] == first
    assert looked_at == []


def test_a_step_whose_recording_belongs_to_another_thread_is_padded_to_one_that_does_not(runner: ModelRunner) -> None:
    def run() -> list[list[int]]:
        for slot in (0, 1):
            admit(runner, slot, [1 + 2 * slot, 2 + 2 * slot])
            runner.prefill([chunk(slot, 0, 21)])
        batch = (0, 1)
        steps.extend(runner.decode(batch) for _ in range(3))
        return [step.read().tokens for step in steps[-3:]]

    steps: list[LaunchedStep] = []
    expected = run()
    record(runner, *(GraphKey.decode(size, SamplerPlan()) for size in (2, 4)))
    exact, bucket = (runner.graphs.find(GraphKey.decode(size, SamplerPlan())) for size in (2, 4))
    exact.recorded = replace(exact.recorded, thread=object(), replay=lambda: pytest.fail("replayed elsewhere"))
    with pytest.warns(UserWarning, match="replay on the thread that recorded them"):
        assert run() == expected
    assert {step.kind for step in steps[-3:]} == {"layers, stand-in"}
    why = "its cudagraph tree belongs to another thread"
    assert {step.reason for step in steps[-3:]} == {f"padded to bucket 4, {why}"}
    assert (exact.hits, bucket.hits, bucket.padded_hits) == (0, 3, 3)
    bucket.recorded = replace(bucket.recorded, thread=object())
    with pytest.warns(UserWarning, match="replay on the thread that recorded them"):
        assert run() == expected
    assert {(step.kind, step.reason) for step in steps[-3:]} == {("layers, eager", why)}


def test_a_request_in_a_slot_of_the_batch_changes_the_route(runner: ModelRunner) -> None:
    record(runner, GraphKey.decode(1, SamplerPlan()))
    batch = (0,)
    admit(runner, 0, [1, 2])
    runner.prefill([chunk(0, 0, 21)])
    assert runner.decode(batch).reason == "bucket 1"
    params = resolve(SamplingParams(temperature=1.0, seed=1), None, (), families.VOCAB)
    runner.admit(Admission(0, [1, 2], params, PROMPT))
    runner.prefill([chunk(0, 0, 21)])
    assert runner.decode(batch).reason == "no graph with this sampling, or with so many prompts"


def test_a_capture_leaves_requests_and_unread_steps_as_they_are(runner: ModelRunner) -> None:
    """It is not what the loop does, but a capture between steps does no harm."""
    expected = families.reference(families.build("llama"), PROMPT, 7)[0]
    admit(runner, 2, [3, 1])
    steps = [runner.prefill([chunk(2, 0, 21)])]
    batch = (2,)
    for size in (4, 1, 4):
        steps.append(runner.decode(batch))
        record(runner, GraphKey.decode(size, SamplerPlan()), GraphKey.prefill(8, 1, SamplerPlan()))
        steps.append(runner.decode(batch))
    assert [step.read().tokens[0][0] for step in steps] == expected


def test_a_step_that_failed_can_run_again(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = families.reference(families.build("llama"), PROMPT, 5)[0]
    admit(runner, 0, [1, 2])
    steps = [runner.prefill([chunk(0, 0, 21)])]
    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(runner.bound, "forward", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                runner.decode((0,))
        steps.append(runner.decode((0,)))
    assert [step.read().tokens[0][0] for step in steps] == expected


def test_a_prefill_that_failed_at_its_very_end_can_run_again(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has counted the step and the host has not; the lines of later steps are not shifted."""
    expected = families.reference(families.build("llama"), PROMPT, 5)[0]
    admit(runner, 0, [1, 2])
    advance = ring.advance
    with monkeypatch.context() as patch:
        patch.setattr(ring, "advance", lambda *args: advance(*args) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.prefill([chunk(0, 0, 21)])
    steps = [runner.prefill([chunk(0, 0, 21)]), *(runner.decode((0,)) for _ in range(4))]
    assert [step.read().tokens[0][0] for step in steps] == expected
