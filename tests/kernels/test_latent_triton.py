"""The Triton kernels for latents where there is no GPU: in the interpreter, and how decode cuts its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import Interpreter

pytest.importorskip("triton")

from hybridgen.kernels.attention.latent_launches import (
    _SCRATCH_BYTES,
    Shape,
    _shared_bytes,
    plan,
    shape_of,
    tuning,
)

CHECKS = Path(__file__).with_name("latent_interpreter.py")


@pytest.mark.parametrize("case", range(4))
def test_kernels_in_the_interpreter(case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(CHECKS, "check_case", case)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 30))])
def test_random_cases_in_the_interpreter(seed: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(CHECKS, "check_random", seed)


@given(
    tokens=st.integers(1, 300),
    heads=st.sampled_from([1, 16, 40, 128]),
    max_tiles=st.integers(1, 5000),
    processors=st.sampled_from([4, 108, 132]),
    data=st.data(),
)
def test_a_rows_chunks_fit_their_scratch(
    tokens: int, heads: int, max_tiles: int, processors: int, data: st.DataObject
) -> None:
    shape = Shape(heads, 512, 64, 64, 2)
    tune = tuning(shape, 227 * 2**10)
    cut = plan(tokens, shape, max_tiles, processors, tune)
    tiles = data.draw(st.integers(1, max_tiles))
    per = max(min(-(-tiles // cut.splits), cut.chunk_tiles), 1)  # as `_cut` of the kernel
    per = -(-tiles // -(-tiles // per))
    chunks = -(-tiles // per)
    assert chunks <= cut.row_chunks
    assert cut.programs % -(-heads // tune.rows) == 0
    scratch = tokens * cut.row_chunks * heads * shape.rank * 4
    assert tokens == 1 or scratch <= _SCRATCH_BYTES or cut.row_chunks == cut.splits


@given(
    heads=st.sampled_from([1, 16, 20, 40, 64, 128]),
    sizes=st.sampled_from([(512, 64), (256, 32), (16, 8), (384, 64)]),
    element=st.sampled_from([2, 4]),
    memory=st.sampled_from([99, 163, 227]),
    prefill=st.booleans(),
)
def test_tiles_fit_shared_memory(heads: int, sizes: tuple[int, int], element: int, memory: int, prefill: bool) -> None:
    shape = Shape(heads, *sizes, 64, element)
    tune = tuning(shape, memory * 2**10, prefill)
    assert _shared_bytes(shape, tune.block, tune.rows, tune.stages) <= memory * 2**10
    assert tune.rows >= 16


@pytest.mark.parametrize(
    ("size", "rank", "message"),
    [((2, 1, 12, 24), 16, "page size 12"), ((2, 1, 8, 24), 12, "latents of 12"), ((2, 1, 8, 1024), 1016, "latents of")],
)
def test_other_sizes_are_refused(size: tuple[int, ...], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_of(torch.zeros(1, 4, rank), torch.zeros(size), rank)
