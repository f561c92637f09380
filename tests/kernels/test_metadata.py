"""`copy_metadata` and `MetadataCopy` on the CPU, in compiled code, and the Triton kernel without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import metadata_cases as cases
import pytest
import torch
from interpreter import Interpreter
from torch import Tensor

from hybridgen.kernels.step import metadata
from hybridgen.kernels.step.metadata import MetadataCopy, copy_metadata


def _plan(sources: list[Tensor], destinations: list[Tensor]) -> None:
    MetadataCopy(zip(sources, destinations, strict=True))()


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("copy", [copy_metadata, _plan], ids=["op", "plan"])
def test_copies_what_torch_copies(name: str, copy: cases.Copy) -> None:
    cases.check(name, "cpu", copy)


def test_nothing_to_copy() -> None:
    copy_metadata([], [])
    MetadataCopy([])()


def test_a_plan_copies_again() -> None:
    source, destination = torch.arange(8), torch.zeros(4, 8, dtype=torch.int64)
    plan = MetadataCopy([(source, destination[2])])
    for _ in range(2):
        source += 1
        plan()
        assert torch.equal(destination[2], source)


def test_op_registration() -> None:
    case = cases.build("mixed dtypes", "cpu")
    torch.library.opcheck(torch.ops.hybridgen.copy_metadata.default, (case.sources, case.destinations))
    blocks = cases.build("blocks", "cpu")
    torch.library.opcheck(torch.ops.hybridgen.copy_metadata.default, (blocks.sources, blocks.destinations))


@pytest.mark.parametrize(
    ("source", "destination", "named"),
    [
        (torch.zeros(3), torch.zeros(4), r"pair 1: shapes \(3,\) and \(4,\)"),
        (torch.zeros(3), torch.zeros(1, 3), r"pair 1: shapes \(3,\) and \(1, 3\)"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float16), "pair 1: dtypes torch.float32 and torch.float16"),
        (torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.complex64), "dtype torch.complex64"),
        (torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), r"shape \(2, 2, 2\); give at most two"),
        (torch.zeros(1).expand(2**30 + 1), torch.zeros(1).expand(2**30 + 1), "1073741825 elements"),
        (torch.zeros(3), torch.zeros(3, device="meta"), "on cpu and meta"),
        (
            torch.zeros(3, device="meta"),
            torch.zeros(3, device="meta"),
            "on meta and meta, the first destination on cpu",
        ),
    ],
)
def test_refuses(source: Tensor, destination: Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MetadataCopy([(torch.zeros(2), torch.zeros(2)), (source, destination)])
    if "meta" not in named:  # the dispatcher takes the op to meta tensors' implementation
        with pytest.raises(ValueError, match=named):
            copy_metadata([torch.zeros(2), source], [torch.zeros(2), destination])


def test_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="0 sources and 1 destinations"):
        copy_metadata([], [torch.zeros(2)])
    with pytest.raises(ValueError, match="2 sources and 1 destinations"):
        copy_metadata([torch.zeros(2)] * 2, [torch.zeros(2)])


def _step(sources: list[Tensor], destinations: list[Tensor], table: Tensor, wide: Tensor) -> Tensor:
    """Sources computed in the graph, destinations that are views made in the graph, and a use of what was copied."""
    copy_metadata([*[s + 1 for s in sources], table], [*[d[1:] for d in destinations], wide[: len(table), :5]])
    return wide.sum() + destinations[0].sum()


def _step_inputs(count: int, length: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    dtypes = [torch.int32, torch.int64, torch.float32]
    sources = [torch.arange(length + i).to(dtypes[i % 3]) for i in range(count - 1)]
    destinations = [torch.full((len(s) + 1,), -7, dtype=s.dtype) for s in sources]
    return sources, destinations, torch.arange(15).view(3, 5).int(), torch.full((6, 9), -7, dtype=torch.int32)


def _assert_step(compiled: Callable[..., Tensor], count: int, length: int) -> None:
    ours, expected = _step_inputs(count, length), _step_inputs(count, length)
    assert torch.equal(compiled(*ours), _step(*expected))
    for a, b in zip([*ours[1], ours[3]], [*expected[1], expected[3]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [2, 7, 32])
def test_compiled_with_aot_eager(count: int) -> None:
    torch._dynamo.reset()
    _assert_step(torch.compile(_step, fullgraph=True, backend="aot_eager"), count, 5)


def test_compiled_with_inductor() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True)
    _assert_step(compiled, 32, 5)
    _, (code,) = torch._inductor.utils.run_and_get_code(compiled, *_step_inputs(32, 5))
    assert "copy_metadata" in code
    assert "clone" not in code


def test_compiled_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, backend="aot_eager", dynamic=True)
    _assert_step(compiled, 7, 11)  # no size equal to one of the tables: Dynamo would guard on that
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (19, 100):
            _assert_step(compiled, 7, length)


def test_the_kernel_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    triton_interpreter.run(Path(cases.__file__), "check_kernel")


@pytest.mark.parametrize("count", [8, 16, 32])
def test_the_kernel_compiles_for_hopper(count: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from hybridgen.kernels.step.metadata_copy import source_of

    source, options = source_of(count, overlap=True)
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except RuntimeError as error:  # a Triton without this backend
        pytest.skip(str(error))
    assert kernel.metadata.shared == 0


def test_launches() -> None:
    pytest.importorskip("triton")
    from hybridgen.kernels.step.metadata_copy import BLOCK, work_of

    sizes = [0, 1, BLOCK, BLOCK + 1, 0, 3 * BLOCK]
    tensors = [torch.zeros(n) for n in sizes]
    (work,) = work_of(tensors, tensors)
    assert work.programs == 1 + 1 + 2 + 3
    assert len(work.words) == 8 * 8
    starts = [word >> 2 for word in work.words[3::8]]
    assert starts[:4] == [0, 1, 2, 4]
    assert min(starts[4:]) > 2**31
    for count, launches in ((0, []), (1, [8]), (9, [16]), (32, [32]), (33, [32, 8])):
        tensors = [torch.zeros(2)] * count
        assert [len(words) // 8 for _, words in work_of(tensors, tensors)] == launches


def test_strides_beyond_32_bits_reach_the_kernel() -> None:
    pytest.importorskip("triton")
    from hybridgen.kernels.step.metadata_copy import work_of

    storage = torch.empty(2**33, dtype=torch.uint8, device="meta")
    far = storage.as_strided((2, 3), (2**32 + 5, 1))
    (work,) = work_of([far], [far])
    assert work.words[4:8] == (2**32 + 5, 1, 2**32 + 5, 1)


def test_a_failed_compilation_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from hybridgen.kernels.step import metadata_copy

    tries = []

    def fail(*args: object) -> None:
        tries.append(args)
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(metadata_copy, "prepare", fail)
    monkeypatch.setattr(metadata._Triton, "failed", False)
    monkeypatch.setattr(metadata._Triton, "fallbacks", 0)
    copy = metadata._copy_cuda  # what CUDA tensors are dispatched to
    source, destination = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="no compiler here"):
        copy([source], [destination])
    assert torch.equal(source, destination)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(2, 5):
            source += 1
            copy([source], [destination])
            assert torch.equal(source, destination)
            assert metadata.fallbacks() == n
    assert len(tries) == 1
    with pytest.raises(ValueError, match="shapes"):
        copy([source], [destination[1:]])
