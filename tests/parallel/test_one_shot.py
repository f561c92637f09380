"""The kernels for small sums over GPUs: that they compile, and how they cut rows. Nothing here runs them."""

from __future__ import annotations

import pytest
import torch
from nvrtc import needs_nvrtc

from hybridgen.device import program
from hybridgen.parallel.one_shot import ADDS, BLOCKS, DTYPES, PROGRAM, OneShot, defines


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES)
def test_they_compile_without_a_gpu(dtype: torch.dtype) -> None:
    for architecture in ("sm_80", "sm_90a"):
        cubin = program.compile_cubin(defines(4, dtype), architecture, PROGRAM)
        assert all(each.kernel.encode() in cubin for each in (PROGRAM, ADDS))


@pytest.mark.parametrize(
    ("rows", "width", "parts"),
    [(1, 64, 1), (1, 4096, 4), (16, 8192, 8), (16, 16384, 16), (17, 16384, 0), (2, 1030, 0), (1, 1028, 2)],
)
def test_a_row_is_cut_into_blocks_as_far_as_they_go(rows: int, width: int, parts: int) -> None:
    made = object.__new__(OneShot)
    made.dtype, made.adds = torch.bfloat16, False
    assert made.parts(rows, width) == 0  # not before all ranks have tried it
    made.adds = True
    assert made.parts(rows, width) == parts
    assert rows * parts <= BLOCKS
