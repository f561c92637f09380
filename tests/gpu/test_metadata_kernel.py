"""`copy_metadata` and `MetadataCopy` on a GPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import metadata_cases as cases

from hybridgen.kernels.step import metadata
from hybridgen.kernels.step.metadata import MetadataCopy, copy_metadata

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def _plan(sources: list[Tensor], destinations: list[Tensor]) -> None:
    MetadataCopy(zip(sources, destinations, strict=True))()


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    before = metadata.fallbacks()
    yield
    assert metadata.fallbacks() == before
    assert not metadata._Triton.failed


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("copy", [copy_metadata, _plan], ids=["op", "plan"])
def test_copies_what_torch_copies(name: str, copy: cases.Copy) -> None:
    cases.check(name, "cuda", copy)
    cases.check(name, "cuda", copy)


def test_offsets_beyond_32_bits() -> None:
    storage = torch.zeros(2**33 + 2**12, dtype=torch.uint8, device="cuda")
    for dtype, rows in ((torch.uint8, 2), (torch.int32, 2)):
        stride = 2**32 // dtype.itemsize + 5 if dtype != torch.uint8 else 2**32 + 5
        far = storage.view(dtype).as_strided((rows, 100), (stride, 1), 3)
        values = torch.randint(1, 100, (rows, 100), device="cuda").to(dtype)
        copy_metadata([values], [far])
        assert torch.equal(far, values)
        back = torch.zeros_like(values)
        copy_metadata([far.t()], [back.t()])
        assert torch.equal(back, values)


def _metadata(seed: int, length: int = 32) -> tuple[list[Tensor], list[Tensor]]:
    make = cases.Maker("cuda", seed)
    wide = make(64, 512)
    pairs = [(make(length), make(length)) for _ in range(3)]
    pairs += [(make(length)[1:], make(length + 1)[2:]), (make(length, 300), wide[:length, :300])]
    return [s for s, _ in pairs], [d for _, d in pairs]


def test_one_launch_and_nothing_allocated() -> None:
    sources, destinations = _metadata(0)
    plan = MetadataCopy(zip(sources, destinations, strict=True))
    copy_metadata(sources, destinations)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        copy_metadata(sources, destinations)
        plan()
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if kernels:  # none where the profiler cannot be used
        assert kernels == ["copy_kernel", "copy_kernel"]


def test_no_compilation_for_other_sizes() -> None:
    from hybridgen.kernels.step import metadata_copy

    copy_metadata(*_metadata(0))
    misses = metadata_copy._compiled.cache_info().misses
    for length in (1, 2, 16, 31, 64):
        copy_metadata(*_metadata(0, length))
    assert metadata_copy._compiled.cache_info().misses == misses


def test_more_calls_than_are_kept_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_MAX_PREPARED", 2)
    monkeypatch.setattr(metadata, "_prepared", {})
    for name in ["seven", "blocks", "slices", "seven"]:
        cases.check(name, "cuda", copy_metadata)
        assert len(metadata._prepared) <= 2


@pytest.mark.parametrize("planned", [True, False])
def test_first_node_of_a_graph(planned: bool) -> None:
    sources, destinations = _metadata(1)
    copy_metadata(*_metadata(2))  # compiles, for other addresses
    plan = MetadataCopy(zip(sources, destinations, strict=True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if planned:
            plan()
        else:
            copy_metadata(sources, destinations)
        out = [d + 1 for d in destinations]
    for seed in (3, 4):
        for source, new in zip(sources, _metadata(seed)[0], strict=True):
            source.copy_(new)
        graph.replay()
        for source, destination, result in zip(sources, destinations, out, strict=True):
            assert torch.equal(destination, source)
            assert torch.equal(result, source + 1)


def test_a_graph_outlives_what_was_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_prepared", {})
    sources, destinations = _metadata(1)
    copy_metadata(sources, destinations)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy_metadata(sources, destinations)
    metadata._prepared.clear()
    for source in sources:
        source += 1
    graph.replay()
    for source, destination in zip(sources, destinations, strict=True):
        assert torch.equal(destination, source)


def _step(sources: list[Tensor], destinations: list[Tensor]) -> list[Tensor]:
    copy_metadata([s + 1 for s in sources], [d[1:] for d in destinations])
    return [d * 2 for d in destinations]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    torch._dynamo.reset()
    dtypes = [torch.int32, torch.int64, torch.float32, torch.bfloat16]
    destinations = [torch.zeros(33 + i, dtype=dtypes[i % 4], device="cuda") for i in range(32)]
    for destination in destinations:
        torch._dynamo.mark_static_address(destination)
    compiled = torch.compile(_step, fullgraph=True, mode=mode)
    for n in range(4):
        sources = [torch.full((len(d) - 1,), n, dtype=d.dtype, device="cuda") for d in destinations]
        for destination, result in zip(destinations, compiled(sources, destinations), strict=True):
            assert bool((destination[1:] == n + 1).all())
            assert torch.equal(result, destination * 2)


def test_refuses_tensors_of_several_devices() -> None:
    with pytest.raises(ValueError, match="on cpu and cuda:0"):
        copy_metadata([torch.zeros(3)], [torch.zeros(3, device="cuda")])
    with pytest.raises(ValueError, match="on cuda:0 and cpu"):
        copy_metadata([torch.zeros(3, device="cuda")], [torch.zeros(3)])


def test_a_failed_compilation_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridgen.kernels.step import metadata_copy

    def fail(*args: object, **named: object) -> None:
        raise RuntimeError("ptxas failed")

    monkeypatch.setattr(metadata_copy.triton, "compile", fail)
    monkeypatch.setattr(metadata, "_prepared", {})
    monkeypatch.setattr(metadata._Triton, "failed", False)
    monkeypatch.setattr(metadata._Triton, "fallbacks", 0)
    metadata_copy._compiled.cache_clear()
    with pytest.warns(RuntimeWarning, match="ptxas failed"):
        cases.check("blocks", "cuda", copy_metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases.check("seven", "cuda", copy_metadata)
        cases.check("mixed dtypes", "cuda", _plan)
    assert metadata.fallbacks() == 3
    monkeypatch.undo()
    metadata_copy._compiled.cache_clear()
