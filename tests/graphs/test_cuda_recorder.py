"""What the recorder asks of torch, in which order, without a GPU: a stand-in for the part of `torch.cuda` it uses.

What CUDA makes of it is tested on a GPU (`tests/gpu/test_graphs_cuda.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridgen.graphs.cuda import CudaGraphRecorder
from hybridgen.graphs.key import GraphKey
from hybridgen.sampling import SamplerPlan

KEY = GraphKey.decode(4, SamplerPlan())


class Cuda:
    """Notes what is asked for, with the stream and the pool that are current then."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.modes: list[str] = []
        self.stream = "the caller's"
        self.pool: object = None
        self.capturing = False

    def note(self, what: str) -> None:
        where = "capture" if self.capturing else f"{self.stream} stream, {'pool' if self.pool else 'no pool'}"
        self.log.append(f"{what}: {where}")

    @contextmanager
    def streamed(self, stream: object) -> Iterator[None]:
        before, self.stream = self.stream, "own"
        yield
        self.stream = before

    @contextmanager
    def pooled(self, pool: object, device: object) -> Iterator[None]:
        before, self.pool = self.pool, pool
        yield
        self.pool = before

    def graph(self) -> Any:
        def begin(pool: object, capture_error_mode: str) -> None:
            self.capturing = True
            self.modes.append(capture_error_mode)

        def end() -> None:
            self.capturing = False

        return SimpleNamespace(
            capture_begin=begin, capture_end=end, replay=lambda: self.note("replay"), reset=lambda: None
        )


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    for name, value in {
        "Stream": lambda device: object(),
        "MemPool": lambda: SimpleNamespace(id=(0, 1)),
        "CUDAGraph": fake.graph,
        "stream": fake.streamed,
        "use_mem_pool": fake.pooled,
        "synchronize": lambda device=None: fake.note("wait"),
        "mem_get_info": lambda device: (1000, 2000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: fake.note("clear"), raising=False)
    return fake


def record(cuda: Cuda, known: tuple[float, float] | None) -> list[str]:
    recorder = CudaGraphRecorder(torch.device("cpu"))
    cuda.log.clear()
    recorder.record(KEY, lambda: cuda.note("step"), known)
    return cuda.log


@pytest.mark.parametrize("known", [None, (1e9, 1e9)])
def test_a_step_is_warm_before_anything_is_timed_or_captured(cuda: Cuda, known: tuple[float, float] | None) -> None:
    """Compiled, loaded and tuned on the stream that captures, with memory of the pool."""
    log = record(cuda, known)
    first_capture = log.index("step: capture")
    warm = [entry for entry in log[:first_capture] if entry.startswith("step")]
    assert set(warm) == {"step: own stream, pool"}
    # Two runs of its own, or one where the run that checks a known time is another; then the timed ones.
    until_timed = log[log.index(warm[0]) :]
    assert until_timed[: 2 if known is None else 1] == ["step: own stream, pool"] * (2 if known is None else 1)
    assert until_timed[2 if known is None else 1].startswith("wait")
    assert log.count("step: capture") == 1


def test_nothing_runs_while_a_capture_begins_and_the_graph_is_uploaded_before_it_serves(cuda: Cuda) -> None:
    log = record(cuda, None)
    capture = log.index("step: capture")
    assert log[capture - 2].startswith("wait")
    assert [entry.partition(":")[0] for entry in log[capture - 1 : capture + 3]] == ["clear", "step", "clear", "replay"]


def test_other_threads_do_not_invalidate_a_capture(cuda: Cuda) -> None:
    """In the default mode, `global`, an allocation on any thread does."""
    record(cuda, None)
    assert len(cuda.modes) == 2  # the graph that keeps the pool, and the step's
    assert set(cuda.modes) == {"thread_local"}
