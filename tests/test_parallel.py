"""How the tests are divided over processes."""

from __future__ import annotations

import pytest

pytest.importorskip("xdist")

from parallel import ByFile


def test_a_files_tests_stay_together_and_families_are_pieces_of_their_own() -> None:
    pieces = ByFile._split_scope
    names = ["tests/a/test_b.py::test_c", "tests/a/test_b.py::test_d[x-y]"]
    assert {pieces(None, name) for name in names} == {"tests/a/test_b.py"}  # type: ignore[arg-type]
    names = ["test_families.py::test_eager[gpt2]", "test_families.py::test_rope[jit-gpt2]", "test_families.py::test_x"]
    found = [pieces(None, name) for name in names]  # type: ignore[arg-type]
    assert found == ["test_families.py[gpt2]"] * 2 + ["test_families.py[test_x]"]
