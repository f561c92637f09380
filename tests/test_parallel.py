"""How the tests are divided over processes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

pytest.importorskip("xdist")

from parallel import ByFile, Turns
from waiting import HANGS


def test_a_files_tests_stay_together_and_families_are_pieces_of_their_own() -> None:
    pieces = ByFile._split_scope
    names = ["tests/a/test_b.py::test_c", "tests/a/test_b.py::test_d[x-y]"]
    assert {pieces(None, name) for name in names} == {"tests/a/test_b.py"}  # type: ignore[arg-type]
    names = ["test_families.py::test_eager[gpt2]", "test_families.py::test_rope[jit-gpt2]", "test_families.py::test_x"]
    found = [pieces(None, name) for name in names]  # type: ignore[arg-type]
    assert found == ["test_families.py[gpt2]"] * 2 + ["test_families.py[test_x]"]


def test_tests_run_side_by_side_or_alone(tmp_path: Path) -> None:
    first, second = Turns(tmp_path), Turns(tmp_path)
    entered = threading.Event()

    def run() -> None:
        with second.take(alone=True):
            entered.set()

    with first.take(alone=False), second.take(alone=False):
        pass
    thread = threading.Thread(target=run)
    with first.take(alone=False):
        thread.start()
        assert not entered.wait(0.1)
    thread.join(HANGS)
    assert entered.is_set()
