"""What fails is reported as such, and the run goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare_cases import SMALL, Scripted, measurement

import hybridgen
from hybridgen.comparison.data.schedule import cells
from hybridgen.engine import Engine
from hybridgen.errors import Interrupted, RequestError

CONFIG = SMALL.replace(baselines=())


def by_status(found: Any) -> dict[str, int]:
    counted: dict[str, int] = {}
    for record in found.records.values():
        counted[record.status] = counted.get(record.status, 0) + 1
    return counted


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no such kernel\nsecond line"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RequestError("a step failed: OutOfMemoryError: CUDA out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_cell_that_raises_is_reported_and_the_others_are_measured(error: Exception, status: str) -> None:
    def act(prompts: list[list[int]]) -> None:
        if len(prompts) == 2:
            raise error

    found = measurement(CONFIG)
    found.run({"eager": Scripted("eager"), "hybrid": Scripted("hybrid", act)}, 5.0)
    assert by_status(found) == {"ok": 6, status: 2}
    bad = [record for record in found.records.values() if record.status == status]
    assert {(record.cell.subject, record.cell.batch_size) for record in bad} == {("hybrid", 2)}
    assert all("\n" not in (record.error or "") for record in bad)
    assert found.cell_result(bad[0]).status == status


def test_a_cell_that_fails_later_keeps_its_error() -> None:
    count = 0

    def act(prompts: list[list[int]]) -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise RuntimeError("late")

    found = measurement(CONFIG)
    found.run({"eager": Scripted("eager"), "hybrid": Scripted("hybrid", act)}, 5.0)
    assert by_status(found) == {"ok": 7, "failed": 1}


def test_without_a_reference_nothing_agrees() -> None:
    def fail(prompts: list[list[int]]) -> None:
        raise RuntimeError("eager is broken")

    found = measurement(CONFIG)
    found.run({"eager": Scripted("eager", fail), "hybrid": Scripted("hybrid")}, 5.0)
    assert all(record.agreement is None for record in found.records.values())
    assert by_status(found) == {"ok": 4, "failed": 4}


def test_other_tokens_than_the_reference_are_seen() -> None:
    class Wrong(Scripted):
        def call(self, prompts: list[list[int]], new_tokens: int) -> Any:
            output = super().call(prompts, new_tokens)
            output.tokens[-1][1] += 1
            return output

    found = measurement(CONFIG)
    found.run({"eager": Scripted("eager"), "hybrid": Wrong("hybrid")}, 5.0)
    for cell in cells(CONFIG, ["hybrid"]):
        agreement = found.records[cell].agreement
        assert agreement is not None
        assert agreement.first_difference == (cell.batch_size - 1, 1)
        assert agreement.share == pytest.approx(1 - 1 / (3 * cell.batch_size))


def test_the_budget_ends_the_run_and_is_named() -> None:
    found = measurement(CONFIG.replace(repeats=1000, tolerance=0.0))
    found.run({"eager": Scripted("eager"), "hybrid": Scripted("hybrid")}, 0.05)
    assert {record.stopped for record in found.records.values()} == {"budget"}
    assert 0.05 <= found.spent < 5.0  # a call more


def test_without_a_budget_nothing_is_measured_and_that_is_said() -> None:
    found = measurement(CONFIG)
    found.run({"eager": Scripted("eager")}, 0.0)
    assert by_status(found) == {"not measured": 4}


def test_a_cell_ends_when_its_medians_are_known() -> None:
    found = measurement(CONFIG.replace(repeats=1000, tolerance=1.0))
    found.run({"eager": Scripted("eager")}, 20.0)
    assert {record.stopped for record in found.records.values()} == {"interval"}
    counts = [len(record.walls) for record in found.records.values()]
    assert all(10 <= count < 1000 for count in counts), counts  # more than the fewest where the machine is busy


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("Ctrl-C", [])])
def test_ctrl_c_ends_the_rounds_and_keeps_what_was_measured(error: BaseException) -> None:
    count = 0

    def act(prompts: list[list[int]]) -> None:
        nonlocal count
        count += 1
        if count == 9:  # four calls warm up
            raise error

    found = measurement(CONFIG.replace(repeats=1000))
    found.run({"eager": Scripted("eager", act)}, 5.0)
    assert found.interrupted
    assert sum(len(record.walls) for record in found.records.values()) == 4
    assert {record.stopped for record in found.records.values() if record.walls} == {"interrupted"}


@pytest.fixture
def tiny() -> Any:
    import families

    return families.build("llama")


def test_an_engine_that_cannot_be_built_and_a_call_that_fails_are_rows_of_the_result(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, generate = Engine.__init__, Engine.generate

    def making(self: Engine, checkpoint: Any, loaded: Any, config: Any) -> None:
        if config.mode == "graph":
            raise torch.OutOfMemoryError("CUDA out of memory")
        make(self, checkpoint, loaded, config)

    def generating(self: Engine, prompts: Any, sampling: Any) -> Any:
        if self.config.mode == "hybrid" and len(prompts) == 2:
            raise RuntimeError("injected")
        return generate(self, prompts, sampling)

    monkeypatch.setattr(Engine, "__init__", making)
    monkeypatch.setattr(Engine, "generate", generating)
    found = hybridgen.compare(
        tiny, prompt_lengths=4, batch_sizes=(1, 2), new_tokens=3, repeats=2, budget=600, warm_up=1,
        compile_backend="eager", decode_buckets=[1, 2], prefill_buckets=[8], progress=False,
    )  # fmt: skip
    status = {(cell.subject, cell.batch_size): cell.status for cell in found.cells}
    assert status == {
        ("eager", 1): "ok", ("eager", 2): "ok", ("jit", 1): "ok", ("jit", 2): "ok",
        ("graph", 1): "out of memory", ("graph", 2): "out of memory",
        ("hybrid", 1): "ok", ("hybrid", 2): "failed",
    }  # fmt: skip
    text = str(found)
    assert "graph: out of memory: OutOfMemoryError: CUDA out of memory" in text
    assert "hybrid, prompt 4, batch 2: failed: RuntimeError: injected" in text


@pytest.mark.parametrize("place", ["build", "warm up"])
def test_ctrl_c_before_anything_is_measured_gives_a_result_that_says_so(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    make, generate = Engine.__init__, Engine.generate

    def making(self: Engine, checkpoint: Any, loaded: Any, config: Any) -> None:
        if place == "build" and config.mode == "graph":
            raise KeyboardInterrupt
        make(self, checkpoint, loaded, config)

    def generating(self: Engine, prompts: Any, sampling: Any) -> Any:
        if place == "warm up" and self.config.mode == "graph":
            raise KeyboardInterrupt
        return generate(self, prompts, sampling)

    monkeypatch.setattr(Engine, "__init__", making)
    monkeypatch.setattr(Engine, "generate", generating)
    found = hybridgen.compare(
        tiny, modes=("eager", "graph"), prompt_lengths=4, batch_sizes=(1, 2), new_tokens=3, repeats=2, budget=600,
        decode_buckets=[1, 2], prefill_buckets=[8], progress=False,
    )  # fmt: skip
    assert {cell.status for cell in found.cells} == {"not measured"}
    assert all("interrupted before" in (cell.error or "") for cell in found.cells)
    assert "interrupted" in str(found)
