"""Which steps multiply by cublasLt: those that a trial found faster, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridgen.execution import executors, products
from hybridgen.execution.executors import LayersExecutor
from hybridgen.models.attention import Phase
from hybridgen.models.measured import Measured


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether torch multiplies by cublasLt: a device without CUDA has neither library."""
    now = [False]

    @contextmanager
    def other() -> Iterator[None]:
        now[0] = True
        try:
            yield
        finally:
            now[0] = False

    for module in (products, executors):
        monkeypatch.setattr(module, "by_cublaslt", other)
    return now


def layers(count: int, dtype: torch.dtype = torch.bfloat16) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64)).to(dtype) for _ in range(count)]


def test_what_is_faster_is_chosen(inside: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_ENOUGH", 3 * 2 * 64 * 32 * 2)
    asked: list[tuple[int, int, bool]] = []

    def seconds(weights: Sequence[Tensor], rows: int) -> float:
        asked.append((len(weights), rows, inside[0]))
        return {24: 1.0, 64: 0.95, 128: 0.995}[rows] if inside[0] else 1.0

    measured = Measured()
    assert products.choose(layers(5), (8, 24, 64, 128, 256), seconds, measured) == {64}
    assert asked == [(6, rows, other) for rows in (24, 64, 128) for other in (False, True)]
    again = Measured(measured.known)
    assert products.choose(layers(5), (64, 128), lambda weights, rows: pytest.fail("timed again"), again) == {64}
    assert not again.is_new
    assert not inside[0]


@pytest.mark.parametrize("found", [layers(1), layers(5, torch.float32), []])
def test_nothing_is_tried_without_weights(
    found: list[nn.Module], inside: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_ENOUGH", 3 * 2 * 64 * 32 * 2)
    assert products.choose(found, (64,), lambda weights, rows: pytest.fail("tried"), Measured()) == frozenset()


@pytest.mark.parametrize(("phase", "rows", "expected"), [
    (Phase.DECODE, 64, True), (Phase.DECODE, 80, False), (Phase.PREFILL, 64, True), (Phase.PREFILL, 65, False),
])  # fmt: skip
def test_steps_of_a_chosen_size_multiply_so(phase: Phase, rows: int, expected: bool, inside: list[bool]) -> None:
    found = []

    def forward(ids: Tensor, step: Any, keep: Tensor | None) -> Tensor:
        found.append(inside[0])
        return ids

    executor = LayersExecutor(SimpleNamespace(forward=forward))  # type: ignore[arg-type]
    executor.by_cublaslt = frozenset({64})
    step: Any = SimpleNamespace(phase=phase, slots=torch.zeros(rows), ids=torch.zeros(rows), ends=None)
    executor.logits(step, None)
    assert found == [expected]
    assert not inside[0]


def test_the_setting_of_the_process_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = ["cublas"]

    def preferred(name: str | None = None) -> str:
        now[0] = name or now[0]
        return now[0]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    with pytest.raises(RuntimeError, match="inside"), products.by_cublaslt():
        assert now == ["cublaslt"]
        raise RuntimeError("inside")
    assert now == ["cublas"]
