"""What the persistent kernels' steps have in common, with a kernel that only notes its launches."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridgen.device.program import Program
from hybridgen.fused import kernel_step


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> kernel_step.KernelStep:
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    launches: list[Any] = []
    kernel = SimpleNamespace(launches=launches, launch=lambda *args: launches.append(args))
    monkeypatch.setattr(kernel_step, "Kernel", lambda code, shared, program: kernel)
    sizes = {"x": 5, "hidden": 64, "sums": 33}
    return kernel_step.KernelStep(
        Program(("",), "step.cu", (), "step"),
        b"",
        1024,
        blocks=4,
        threads=96,
        device=torch.device("cpu"),
        sizes=sizes,
        counters=3,
    )


def test_parts_begin_at_sectors_and_do_not_overlap(step: kernel_step.KernelStep) -> None:
    start = step.words.data_ptr()
    assert {name: (part.data_ptr() - start, len(part)) for name, part in step.parts.items()} == {
        "x": (0, 5),
        "hidden": (4 * 32, 64),
        "sums": (4 * 96, 33),
    }
    assert len(step.words) == 32 + 64 + 64
    assert len(step.counters) == 3 * 32


def test_a_step_that_was_given_up_is_mended(step: kernel_step.KernelStep) -> None:
    assert not step.faulted
    step.words.fill_(1)
    step.counters.fill_(1)
    step.give_up()
    assert step.faulted
    step.repair()
    assert not step.faulted
    assert not step.words.any()
    assert not step.counters.any()


def test_it_launches_on_the_current_stream(step: kernel_step.KernelStep) -> None:
    parameters: Any = object()
    step._parameters = parameters
    step._launch()
    assert step.kernel.launches == [(4, 96, parameters, 7)]  # type: ignore[attr-defined]
