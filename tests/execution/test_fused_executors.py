"""What is decided about fused decode, with stand-ins for the kernels and for captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import families
import pytest
import shared_graphs
import torch
from runners import free_runner, make_runner

pytest.importorskip("triton")

from hybridgen.execution import ModelRunner, fused_executors
from hybridgen.execution.following import begin_call
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.execution.warm_up import check_numerics, compile_layers
from hybridgen.fused import build, tuning
from hybridgen.graphs import GraphKey, Recorded, cuda
from hybridgen.graphs.report import graph_stats
from hybridgen.models.attention import Phase
from hybridgen.params import SamplingParams
from hybridgen.sampling import SamplerPlan, resolve

PROMPT = families.prompts_of((21,))[0]


class Chain:
    """Serves 2 to 8 rows as the chain would, with the model's layers."""

    name, launch = "chain", "direct"

    def __init__(self, runner: ModelRunner) -> None:
        self.least, self.most = 2, 8
        self.runner = runner
        self.ran: list[int] = []

    def refuses(self, key: GraphKey) -> str | None:
        decodes = key.phase is Phase.DECODE and key.query_len == 1
        return None if decodes and self.least <= key.rows <= self.most else "not these"

    def logits(self, step: Any, keep: torch.Tensor | None) -> torch.Tensor:
        self.ran.append(step.ids.shape[0])
        return self.runner.executors["layers"].logits(step, keep)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


class Rows(Chain):
    """Serves 1 to 8 tokens as the persistent kernel for several rows would, and more in several launches."""

    name = "rows"
    columns, widest = 8, 16

    def refuses(self, key: GraphKey) -> str | None:
        several = key.query_len > 1 and key.rows * key.query_len <= 8
        one = key.query_len == 1 and self.least <= key.rows <= self.most
        return None if key.phase is Phase.DECODE and (several or one) else "not these"


class Fused:
    """What a runner asks of fused decode."""

    equal_bits = False
    share = None

    def __init__(self, runner: ModelRunner) -> None:
        self.chain: Chain | None = Chain(runner)
        self.rows: Rows | None = None
        self.why: str | None = None
        self.is_stopped = False
        self.refreshed = 0

    @property
    def executors(self) -> tuple[Any, ...]:
        return tuple(executor for executor in (self.rows, self.chain) if executor is not None)

    def refresh(self) -> None:
        self.refreshed += 1

    def use_chain_up_to(self, rows: int, why: str) -> None:
        self.chain.most, self.why = rows, why

    def use_rows(self, least: int, most: int, why: str) -> None:
        self.rows.least, self.rows.most, self.why = least, most, why

    def stopped(self) -> bool:
        return self.is_stopped

    def close(self) -> None:
        self.chain = self.rows = None


class Captures:
    """In place of CUDA graphs: runs the steps, and says what a replay takes."""

    def __init__(self, chain: dict[int, float], fault: Exception | None = None) -> None:
        self.chain = chain
        self.rows: dict[int, float] = {}
        self.fault = fault
        self.recorded: list[tuple[int, str]] = []
        self.released = 0
        self.closed = 0

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        self.recorded.append((key.rows, key.executor))
        step()
        if self.fault is not None:
            raise self.fault
        return Recorded(
            replay=step, release=self._release, owner="", plain_seconds=9.0,
            seconds={"chain": self.chain, "rows": self.rows}.get(key.executor, {}).get(key.rows, 2e-3), bytes=0,
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
def wide_runner() -> Iterator[ModelRunner]:
    """For as many rows as several launches of the kernel for several rows are tried for."""
    runner = make_runner(max_batch=16)
    yield runner
    free_runner(runner)


@pytest.fixture
def fused(runner: ModelRunner) -> Fused:
    made = Fused(runner)
    runner.use_fused(made)
    return made


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    made = Captures({2: 1e-3, 4: 1.5e-3, 8: 2.5e-3})
    monkeypatch.setattr(cuda, "CudaGraphRecorder", lambda device: made)
    return made


def test_the_chain_is_used_up_to_where_the_layers_are_faster(
    runner: ModelRunner, fused: Fused, captures: Captures
) -> None:
    why = fused_executors.compare_with_layers(runner, [8, 1, 4, 2, 16])
    assert why == fused.why == "8 rows take it 2.50 ms, and the layers 2.00 ms"
    assert fused.chain.most == 4
    assert captures.recorded == [(rows, by) for rows in (2, 4, 8) for by in ("chain", "layers")]
    assert (captures.released, captures.closed) == (6, 1)
    served = {rows: runner.router.served(GraphKey.decode(rows, None)).executor for rows in (1, 2, 4, 5, 8)}
    assert served == {1: "layers", 2: "chain", 4: "chain", 5: "layers", 8: "layers"}
    assert runner.router.served(GraphKey.decode(2, None, query_len=2)).executor == "layers"
    assert runner.router.served(GraphKey.prefill(16, 2, None)).executor == "layers"


def test_no_size_beyond_one_that_the_layers_win_is_measured(
    runner: ModelRunner, fused: Fused, captures: Captures
) -> None:
    captures.chain[2] = 2e-3  # no faster
    fused_executors.compare_with_layers(runner, [2, 4])
    assert fused.chain.most == 1
    assert {rows for rows, _ in captures.recorded} == {2}


def test_a_chain_that_is_always_faster_is_used_as_it_is(runner: ModelRunner, fused: Fused, captures: Captures) -> None:
    captures.chain[8] = 1.9e-3
    assert fused_executors.compare_with_layers(runner, [2, 8]) == ""
    assert (fused.chain.most, fused.why) == (8, None)
    assert captures.closed == 1


def decode_all(runner: ModelRunner, slots: tuple[int, ...]) -> list[list[int]]:
    """Tokens of a prompt in each slot, and the kinds of its decode steps."""
    for slot in slots:
        sampling = resolve(SamplingParams(temperature=0.0), None, (), families.VOCAB)
        runner.admit(Admission(slot, [1 + 2 * slot, 2 + 2 * slot], sampling, PROMPT))
    launched = [runner.prefill([PrefillChunk(slot, PROMPT, 0, len(PROMPT), 0, True) for slot in slots])]
    launched += [runner.decode(slots) for _ in range(6)]
    assert {step.kind for step in launched[1:]} == {"chain, direct" if len(slots) > 1 else "layers, eager"}
    return [[token for (token,) in step.read().tokens] for step in launched]


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
    captures.chain[8] = 1e-3
    if fault is None:
        fused_executors.compare_with_layers(runner, [2, 4, 8])
    else:
        with pytest.raises(RuntimeError, match="no capture"):
            fused_executors.compare_with_layers(runner, [2, 4, 8])
    assert (captures.closed, len(recovered)) == (1, 1)
    assert torch.count_nonzero(runner.state.table) == 0
    fused.chain.ran.clear()
    tokens = decode_all(runner, (2,))
    assert [row[0] for row in tokens] == families.reference(families.build("llama"), PROMPT, 7)[0]
    assert fused.chain.ran == []


def test_steps_that_the_chain_serves_run_there(runner: ModelRunner, fused: Fused) -> None:
    expected = families.reference(families.build("llama"), PROMPT, 7)[0]
    assert decode_all(runner, (0, 2, 3)) == [[token] * 3 for token in expected]
    assert fused.chain.ran == [3] * 6


def test_without_a_chain_nothing_is_measured(runner: ModelRunner, fused: Fused, captures: Captures) -> None:
    fused.chain = None
    assert fused_executors.compare_with_layers(runner, [2]) == ""
    runner.fused = None
    assert fused_executors.compare_with_layers(runner, [2]) == ""
    assert captures.recorded == []


@pytest.mark.parametrize(
    ("rows", "chain", "least", "most", "why"),
    [
        ({2: 0.9e-3, 4: 0.9e-3, 8: 0.9e-3}, True, 2, 8, "16 rows take it 2.00 ms, and the layers 2.00 ms"),
        ({2: 0.9e-3, 4: 0.9e-3, 8: 0.9e-3, 16: 1.9e-3}, True, 2, 16, None),
        ({2: 1.1e-3, 4: 0.9e-3, 8: 0.9e-3}, True, 3, 8, "2 rows take it 1.10 ms, and the chain 1.00 ms"),
        ({2: 1.1e-3, 4: 0.9e-3, 8: 0.9e-3, 16: 1.9e-3}, True, 3, 16, "2 rows take it 1.10 ms"),
        ({2: 0.9e-3, 4: 0.9e-3, 8: 2.6e-3}, True, 2, 4, "8 rows take it 2.60 ms, and the chain 2.50 ms"),
        ({2: 0.9e-3, 4: 0.9e-3, 8: 2.6e-3, 16: 1.9e-3}, True, 2, 4, "8 rows take it 2.60 ms"),
        ({2: 1.5e-3, 4: 1.9e-3, 8: 2.6e-3}, False, 2, 4, "8 rows take it 2.60 ms, and the layers 2.00 ms"),
        ({2: 3e-3, 4: 3e-3, 8: 3e-3}, False, 2, 1, "2 rows take it 3.00 ms"),
    ],
)
def test_the_kernel_for_several_rows_is_used_where_it_is_faster(
    wide_runner: ModelRunner,
    captures: Captures,
    rows: dict[int, float],
    chain: bool,
    least: int,
    most: int,
    why: str | None,
) -> None:
    runner, fused = wide_runner, Fused(wide_runner)
    fused.rows = Rows(runner)
    if not chain:
        fused.chain = None
    runner.use_fused(fused)
    captures.rows = rows
    said = fused_executors.compare_rows(runner, [8, 1, 4, 2, 16])
    assert (fused.rows.least, fused.rows.most) == (least, most)
    assert said.startswith(why or "")
    assert (said == "") == (why is None)
    assert captures.closed == 1
    captures.recorded.clear()
    fused_executors.compare_with_layers(runner, [2, 4, 8])
    assert not {size for size, _ in captures.recorded} & set(range(least, most + 1))
    after = "chain" if chain else "layers"
    served = {size: runner.router.served(GraphKey.decode(size, None)).executor for size in (2, 4, 8)}
    assert all(by == "rows" if least <= size <= most else by in (after, "layers") for size, by in served.items())


def test_tokens_of_one_row_run_in_the_kernel_for_several(runner: ModelRunner, fused: Fused) -> None:
    fused.rows = Rows(runner)
    runner.use_fused(fused)
    assert runner.router.served(GraphKey.decode(1, None, query_len=4)).executor == "rows"
    assert runner.router.served(GraphKey.decode(2, None, query_len=4)).executor == "rows"
    assert runner.router.served(GraphKey.decode(3, None, query_len=4)).executor == "layers"


def test_a_step_is_not_padded_to_what_another_kernel_serves_where_bits_are_equal(
    runner: ModelRunner, fused: Fused
) -> None:
    from hybridgen.graphs import GraphSettings, StandInRecorder
    from hybridgen.telemetry.statistics import Counters

    stand_in = StandInRecorder()
    fused.rows, fused.chain = Rows(runner), None
    fused.rows.least, fused.rows.most = 1, 2
    for equal, kind in ((False, "layers, stand-in"), (True, "rows, direct")):
        fused.equal_bits = equal
        runner.use_fused(fused)
        runner.use_graphs(
            GraphSettings(decode=(8,), max_rows=8, max_padding_ratio=64),
            recorder=lambda key, lazy: stand_in,
            why_plain="",
            counters=Counters(),
        )
        runner.capture([GraphKey.decode(8, SamplerPlan())], lambda: None)
        assert runner.router.route(GraphKey.decode(2, SamplerPlan())).kind == kind
        assert runner.router.route(GraphKey.decode(3, SamplerPlan())).kind == "layers, stand-in"


def test_what_is_tuned(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_executors.tune_fused(runner, 1.0) == {}
    calls: list[Any] = []
    better = Chain(runner)

    def tune(fused: Fused, seconds: float) -> dict[str, Any]:
        calls.append((fused, seconds, torch.is_inference_mode_enabled()))
        fused.chain = better
        return {}

    monkeypatch.setattr(tuning, "tune", tune)
    fused = Fused(runner)
    runner.use_fused(fused)
    fused_executors.tune_fused(runner, 2.5)
    assert calls == [(fused, 2.5, True)]
    assert runner.executors["chain"] is better


def test_what_is_fused(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, given = Fused(runner), {}
    monkeypatch.setattr(build, "build_fused", lambda *args, **kwargs: given.update(kwargs, args=args) or fused)
    assert fused_executors.make_fused(runner, 64, tuned={"a": 1}) is runner.fused is fused
    bound, pages, inputs = given.pop("args")
    assert bound is runner.bound
    assert pages == tuple(state.pages for state in runner.states)
    assert inputs.state is runner.state.table
    assert given == {
        "max_context": 64,
        "max_rows": 8,
        "query_len": 1,
        "reads": (),
        "equal_bits": False,
        "tuned": {"a": 1},
        "kept": None,
        "share": None,
        "scaled_cache": False,
    }
    assert list(runner.executors) == ["chain", "layers"]
    monkeypatch.setattr(runner.states[0], "scales", (1.0, 2.0))
    fused_executors.make_fused(runner, 64)
    assert given["scaled_cache"] is True


def test_logits_without_numbers_are_a_stopped_steps_or_not(runner: ModelRunner) -> None:
    assert fused_executors.inspect_fused(runner) is None
    fused = Fused(runner)
    runner.use_fused(fused)
    assert fused_executors.inspect_fused(runner) is None
    fused.is_stopped = True
    assert fused_executors.inspect_fused(runner) == "a fused decode step waited in vain and was given up"


def test_warming_up_and_the_numerics_check_go_through_the_layers() -> None:
    shared_graphs.forget()
    runner = make_runner(max_batch=8, compile_backend="eager")
    fused = Fused(runner)
    runner.use_fused(fused)
    compile_layers(runner)
    assert runner.compiled.compiles == 3
    assert check_numerics(runner) is None
    assert fused.chain.ran == []
    free_runner(runner)


def test_recordings_are_kept_apart_by_executor(runner: ModelRunner, fused: Fused) -> None:
    """A bucket is recorded with the executor that serves it; another executor's recording is not its own."""
    from hybridgen.graphs import GraphSettings, StandInRecorder
    from hybridgen.telemetry.statistics import Counters

    stand_in = StandInRecorder()
    runner.use_graphs(
        GraphSettings(decode=(1, 4), max_rows=8, max_padding_ratio=64),
        recorder=lambda key, lazy: stand_in,
        why_plain="",
        counters=Counters(),
    )
    runner.capture([GraphKey.decode(rows, SamplerPlan()) for rows in (1, 4)], lambda: None)
    assert [row.executor for row in graph_stats(runner.graphs).graphs] == ["chain", "layers"]
    fused.chain.ran.clear()
    assert runner.router.route(GraphKey.decode(3, SamplerPlan())).kind == "chain, stand-in"
    assert runner.router.route(GraphKey.decode(1, SamplerPlan())).kind == "layers, stand-in"


def test_hooks_put_fused_executors_aside_and_what_changed_makes_them_anew() -> None:
    model = families.build("llama")
    runner = make_runner(live=model, max_batch=8)
    first, second = Fused(runner), Fused(runner)
    first.chain.most = 4
    runner.use_fused(first)
    runner.following.fuse_again = lambda: runner.use_fused(second)
    reasons: list[str] = []
    runner.fall_back = reasons.append
    for calls in (1, 2):
        begin_call(runner)
        begin_call(runner)
        assert (runner.fused, first.refreshed) == (first, calls - 1)
        decode_all(runner, (0, 1))
        assert first.refreshed == calls  # norms are made again behind each call's prefill
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    begin_call(runner)
    assert runner.fused is None
    assert list(runner.executors) == ["layers"]
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    begin_call(runner)
    assert (runner.fused, first.chain is None) == (None, False)
    handle.remove()
    begin_call(runner)
    assert runner.fused is second
    assert first.chain is None
    assert second.chain.most == 4  # as it was measured
    assert reasons == ["the model's tensors or attributes changed; the fused kernels are made anew"]
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    begin_call(runner)
    free_runner(runner)
    assert second.chain is None  # closed, although it was put aside
