"""What is decided about fused decode, with stand-ins for the kernels and for captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import families
import pytest
import torch
from runners import free_runner, make_runner

pytest.importorskip("triton")

from hybridgen.execution import ModelRunner, fusing
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.fused import decode, tuning
from hybridgen.graphs import cuda
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import Recorded
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve

PROMPT = families.prompts_of((21,))[0]


class Fused:
    """A chain for 2 to 8 rows that is never run."""

    least_chain_rows = 2

    def __init__(self) -> None:
        self.chain: object | None = object()
        self.chain_rows = 8
        self.why: str | None = None
        self.is_stopped = False
        self.refreshed = 0

    def serves(self, rows: int) -> bool:
        return False

    def refresh(self) -> None:
        self.refreshed += 1

    def use_chain_up_to(self, rows: int, why: str) -> None:
        self.chain_rows, self.why = rows, why

    def stopped(self) -> bool:
        return self.is_stopped

    def close(self) -> None:
        self.chain = None


class Captures:
    """In place of CUDA graphs: runs the steps, and says what a replay takes."""

    def __init__(self, runner: ModelRunner, chain: dict[int, float], fault: Exception | None = None) -> None:
        self.runner = runner
        self.chain = chain
        self.fault = fault
        self.recorded: list[tuple[int, bool]] = []
        self.released = 0
        self.closed = 0

    def record(self, key: GraphKey, step: Callable[[], None]) -> Recorded:
        fused = self.runner.steps.fused is not None
        self.recorded.append((key.rows, fused))
        step()
        if self.fault is not None:
            raise self.fault
        return Recorded(
            replay=step, release=self._release, owner="", plain_seconds=9.0,
            seconds=self.chain[key.rows] if fused else 2e-3, bytes=0,
        )  # fmt: skip

    def _release(self) -> None:
        self.released += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def runner() -> Iterator[ModelRunner]:
    runner = make_runner(max_batch=8)
    yield runner
    free_runner(runner)


@pytest.fixture
def fused(runner: ModelRunner) -> Fused:
    runner.steps.fused = Fused()
    return runner.steps.fused


@pytest.fixture
def captures(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Captures:
    made = Captures(runner, {2: 1e-3, 4: 1.5e-3, 8: 2.5e-3})
    monkeypatch.setattr(cuda, "CudaGraphRecorder", lambda device: made)
    return made


def test_the_chain_is_used_up_to_where_the_layers_are_faster(
    runner: ModelRunner, fused: Fused, captures: Captures
) -> None:
    why = fusing.compare(runner, [8, 1, 4, 2, 16])
    assert why == fused.why == "8 rows take it 2.50 ms, and the layers 2.00 ms"
    assert fused.chain_rows == 4
    assert captures.recorded == [(2, True), (2, False), (4, True), (4, False), (8, True), (8, False)]
    assert (captures.released, captures.closed) == (6, 1)
    assert runner.steps.fused is fused


def test_no_size_beyond_one_that_the_layers_win_is_measured(
    runner: ModelRunner, fused: Fused, captures: Captures
) -> None:
    captures.chain[2] = 2e-3  # no faster
    fusing.compare(runner, [2, 4])
    assert fused.chain_rows == 1
    assert {rows for rows, _ in captures.recorded} == {2}


def test_a_chain_that_is_always_faster_is_used_as_it_is(runner: ModelRunner, fused: Fused, captures: Captures) -> None:
    captures.chain[8] = 1.9e-3
    assert fusing.compare(runner, [2, 8]) == ""
    assert (fused.chain_rows, fused.why) == (8, None)
    assert captures.closed == 1


@pytest.mark.parametrize("fault", [None, RuntimeError("no capture")])
def test_comparing_leaves_the_runner_as_it_was(
    runner: ModelRunner,
    fused: Fused,
    captures: Captures,
    fault: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a capture fails: what follows is decoded as if nothing had been measured."""
    recovered, recover = [], runner.recover
    monkeypatch.setattr(runner, "recover", lambda: recovered.append(1) or recover())
    captures.fault = fault
    if fault is None:
        fusing.compare(runner, [2, 4, 8])
    else:
        with pytest.raises(RuntimeError, match="no capture"):
            fusing.compare(runner, [2, 4, 8])
    assert (captures.closed, len(recovered)) == (1, 1)
    assert runner.steps.fused is fused
    assert torch.count_nonzero(runner.state.table) == 0
    runner.admit(Admission(2, [3, 1], resolve(SamplingParams(temperature=0.0), None, (), families.VOCAB), PROMPT))
    assert fused.refreshed == 1
    launched = [runner.prefill([PrefillChunk(2, PROMPT, 0, len(PROMPT), 0, True)])]
    launched += [runner.decode((2,)) for _ in range(6)]
    assert [step.read().tokens[0][0] for step in launched] == families.reference(families.build("llama"), PROMPT, 7)[0]


def test_without_a_chain_nothing_is_measured(runner: ModelRunner, fused: Fused, captures: Captures) -> None:
    fused.chain = None
    assert fusing.compare(runner, [2]) == ""
    runner.steps.fused = None
    assert fusing.compare(runner, [2]) == ""
    assert captures.recorded == []


def test_what_is_tuned(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fusing.tune(runner, 1.0) == {}
    calls: list[Any] = []
    monkeypatch.setattr(tuning, "tune", lambda *given: calls.append((*given, torch.is_inference_mode_enabled())) or {})
    runner.steps.fused = Fused()
    fusing.tune(runner, 2.5)
    assert calls == [(runner.steps.fused, 2.5, True)]


def test_what_is_fused(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, given = Fused(), {}
    monkeypatch.setattr(decode, "fuse_decode", lambda *args, **kwargs: given.update(kwargs, args=args) or fused)
    assert fusing.fuse(runner, runner._bound, 64, tuned={"a": 1}) is runner.steps.fused is fused
    bound, pages, inputs = given.pop("args")
    assert bound is runner._bound
    assert pages == tuple(state.pages for state in runner.states)
    assert inputs.state is runner.state.table
    assert given == {"max_context": 64, "max_rows": 8, "tuned": {"a": 1}, "kept": None}


def test_logits_without_numbers_are_a_stopped_steps_or_not(runner: ModelRunner) -> None:
    assert fusing.inspect(runner) is None
    runner.steps.fused = Fused()
    assert fusing.inspect(runner) is None
    runner.steps.fused.is_stopped = True
    assert fusing.inspect(runner) == "a fused decode step waited in vain and was given up"


def test_warming_up_and_the_numerics_check_go_through_the_layers() -> None:
    runner = make_runner(max_batch=8, compile_backend="aot_eager")
    fused = runner.steps.fused = Fused()
    fused.serves = lambda rows: pytest.fail("a fused step would have been run")
    runner.warm_up()
    assert runner.compiled.compiles == 3
    assert runner.check_numerics() is None
    assert runner.steps.fused is fused
    free_runner(runner)
