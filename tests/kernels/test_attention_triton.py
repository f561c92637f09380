"""The Triton attention kernels where there is no GPU: in the interpreter, and how decode cuts its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interpreter import Interpreter

pytest.importorskip("triton")

from hybridgen.kernels.attention.common import heads_of
from hybridgen.kernels.attention.decode import _SCRATCH_BYTES, Tuning, plan


@pytest.mark.parametrize("case", range(5))
def test_kernels_in_the_interpreter(case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("interpreter_checks.py"), "check_case", case)


@pytest.mark.parametrize("case", range(5))
def test_decode_by_a_schedule_in_the_interpreter(case: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("interpreter_checks.py"), "check_balanced", case)


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
