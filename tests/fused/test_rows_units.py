"""In which order blocks take attention's units: `units.cuh` as C++, against a list of what there is."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("triton")

from hybridgen.device.program import sources
from hybridgen.fused.rows.shape import COLUMNS
from hybridgen.fused.rows.step import ROWS

MAIN = """
extern "C" void find(const int* splits, const int* follows, int count, int* found) {
  for (int n = 0; n < count; n++) {
    const Place at = place_of(n, [&](int c) { return splits[c]; }, [&](int c) { return follows[c] != 0; });
    found[2 * n] = at.column; found[2 * n + 1] = at.split;
  }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("units")
    (folder / "units.cpp").write_text(sources(ROWS)["units.cuh"].decode().replace("#pragma once", "") + MAIN)
    made = folder / "units.so"
    constants = ["-DDEVICE=inline", f"-DCOLUMNS={COLUMNS}"]
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", *constants, "-o", str(made), str(folder / "units.cpp")],
        check=True,
    )
    return ctypes.CDLL(str(made))


def order(library: Any, splits: list[int], follows: list[int], more: int = 0) -> list[tuple[int, int]]:
    """Columns and splits one after the other, and as many that are none."""
    count = sum(splits) + more
    numbers = ctypes.c_int * COLUMNS
    found = (ctypes.c_int * (2 * count))()
    library.find(numbers(*splits), numbers(*follows), count, found)
    return list(zip(found[::2], found[1::2], strict=True))


ALONE = [0] * COLUMNS


@pytest.mark.parametrize(
    ("splits", "follows"),
    [
        ([1] * 8, ALONE),
        ([4, 1, 7, 1, 1, 1, 1, 1], ALONE),
        ([16, 16, 16, 16, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]),
        ([1, 3, 3, 4, 4, 2, 2, 1], [0, 0, 1, 1, 1, 0, 1, 0]),
        ([5] * 8, [0, 1, 1, 1, 1, 1, 1, 1]),
        ([64] * 7 + [65], [0, 1, 1, 1, 1, 1, 1, 1]),
        ([3, 2, 2, 3, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]),  # a window: the first column begins a split earlier
        ([1, 1, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1]),
    ],
)
def test_each_split_of_each_column_comes_once(library: Any, splits: list[int], follows: list[int]) -> None:
    """Those of columns that follow each other side by side; of columns that do not, one after the other."""
    found = order(library, splits, follows)
    assert sorted(found) == [(column, split) for column in range(COLUMNS) for split in range(splits[column])]
    request = [sum(1 - follow for follow in follows[1 : column + 1]) for column in range(COLUMNS)]
    assert [request[column] for column, _ in found] == sorted(request[column] for column, _ in found)
    for (column, split), (later, next_split) in pairwise(found):
        if request[column] == request[later]:
            assert (next_split, later) > (split, column)


def test_a_column_alone_goes_through_its_splits(library: Any) -> None:
    assert order(library, [3, 1, 1, 1, 1, 1, 1, 1], ALONE)[:3] == [(0, 0), (0, 1), (0, 2)]


def test_four_tokens_of_a_request_read_a_split_together(library: Any) -> None:
    found = order(library, [3, 3, 3, 3, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0])
    assert found[:5] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]


def test_a_block_without_a_unit_looks_for_one_and_comes_back(library: Any) -> None:
    """It uses nothing of what it finds."""
    for splits in ([1] * 8, [2] * 8):
        assert len(order(library, splits, [0, 1, 1, 0, 0, 0, 1, 1], 140)) == sum(splits) + 140
