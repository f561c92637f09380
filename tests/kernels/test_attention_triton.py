"""The Triton attention kernels where there is no GPU: in the interpreter, and how decode cuts its rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interpreter import Interpreter

pytest.importorskip("triton")

from hybridgen.device.launcher import Device
from hybridgen.kernels.attention import balanced
from hybridgen.kernels.attention.common import heads_of
from hybridgen.kernels.attention.decode import _SCRATCH_BYTES, Tuning, plan


@pytest.mark.parametrize("case", range(5))
def test_kernels_in_the_interpreter(case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("interpreter_checks.py"), "check_case", case)


@pytest.mark.parametrize("case", range(5))
def test_decode_by_a_schedule_in_the_interpreter(case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("interpreter_checks.py"), "check_balanced", case)


def test_chunks_are_dealt_to_the_least_load(triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("interpreter_checks.py"), "check_schedules")


@pytest.mark.parametrize("case", [2, *(pytest.param(case, marks=pytest.mark.slow) for case in (0, 5))])
@pytest.mark.parametrize("check", ["check_case_fp8", "check_balanced_fp8"])
def test_pages_of_8_bits_in_the_interpreter(check: str, case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("interpreter_checks.py"), check, case)


@pytest.mark.parametrize("case", range(3))
def test_two_numbers_of_8_bits_at_once_in_the_interpreter(case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("interpreter_checks.py"), "check_pairs", case)


@pytest.mark.parametrize("case", range(2))
def test_two_numbers_of_8_bits_at_once_by_a_schedule(case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("interpreter_checks.py"), "check_balanced_pairs", case)


def _cut(tiles: int, splits: int, chunk_tiles: int, least: int) -> tuple[int, int]:
    """The kernel's `_cut` for a row of some tiles: tiles a chunk, and chunks."""
    per = max(min(-(-tiles // splits), chunk_tiles), least)
    per = -(-tiles // -(-tiles // per))
    return per, -(-tiles // per)


@given(
    tokens=st.integers(1, 300),
    kv_heads=st.sampled_from([1, 2, 3, 8, 32, 71]),
    max_tiles=st.integers(1, 5000),
    processors=st.sampled_from([4, 108, 132]),
    least=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_a_rows_chunks_fit_their_scratch(
    tokens: int, kv_heads: int, max_tiles: int, processors: int, least: int, data: st.DataObject
) -> None:
    tune = Tuning(block=64, warps=4, stages=3, programs=4, programs_single=2)
    heads = heads_of(2 * kv_heads, kv_heads, 64, 64, 64, 2)
    cut = plan(tokens, heads, max_tiles, processors, tune)
    tiles = data.draw(st.integers(1, max_tiles))
    per, chunks = _cut(tiles, cut.splits, cut.chunk_tiles, least)
    assert (chunks - 1) * per < tiles <= chunks * per
    assert chunks <= cut.row_chunks
    assert cut.programs % kv_heads == 0
    if tokens == 1:
        assert chunks <= cut.programs // kv_heads  # each program takes at most one chunk
    else:
        scratch = tokens * cut.row_chunks * heads.queries * heads.value_dim * 4
        assert scratch <= _SCRATCH_BYTES or cut.row_chunks == cut.splits


@given(
    dim=st.sampled_from([8, 64, 80, 128, 256]),
    group=st.sampled_from([1, 4, 7, 71]),
    element=st.sampled_from([2, 4]),
    memory=st.sampled_from([99, 163, 227]),
)
def test_tiles_of_all_programs_fit_shared_memory(dim: int, group: int, element: int, memory: int) -> None:
    """Or as few of them are asked for as can be."""
    tune = balanced.tuning(heads_of(group, 1, dim, dim, 64, element), memory * 2**10)
    tiles = (tune.stages - 1) * tune.block * 2 * max(16, dim) * element
    assert tune.stages == 2 or tune.programs * tiles <= memory * 2**10
    assert tune.chunk % tune.block == 0


@given(
    rows=st.integers(1, 700),
    kv_heads=st.sampled_from([1, 8, 32]),
    max_pages=st.integers(1, 4000),
    window=st.sampled_from([0, 100, 4096]),
    length=st.integers(1, 200_000),
)
def test_a_rows_chunks_fit_the_scratch_of_a_schedule(
    rows: int, kv_heads: int, max_pages: int, window: int, length: int
) -> None:
    heads = heads_of(4 * kv_heads, kv_heads, 128, 128, 64, 2)
    tune = balanced.tuning(heads, 227 * 2**10)
    device = Device(processors=132, shared_memory=227 * 2**10, overlap=True)
    shares = balanced.shares_of(heads, rows, max_pages, window, 0, device, tune)
    tiles = min(-(-length // 64), shares.row_tiles(max_pages))
    per = max(shares.chunk_tiles, -(-tiles // shares.row_chunks))  # as `_chunk_size` of the kernel
    chunks = -(-tiles // per)
    assert chunks <= shares.row_chunks
    assert per <= 4095  # what a mark can count
    if rows * shares.row_chunks * heads.queries * 129 * 4 > balanced._SCRATCH_BYTES:
        assert shares.row_chunks <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("case", [0, *(pytest.param(case, marks=pytest.mark.slow) for case in (1, 2, 3))])
def test_streamed_pages_on_a_cpu(case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("streamed_checks.py"), "check_streamed", case)
