"""The tests' own C++ compiler, which copies what it made before."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import compiler
import pytest
from waiting import HANGS


def call(kept: Path, *arguments: str) -> int:
    script = [sys.executable, "-I", "-S", compiler.__file__]
    return subprocess.run([*script, str(kept.parent / "real"), str(kept), *arguments], timeout=HANGS).returncode


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Beside it a compiler that writes its number of calls, and one source of two versions."""
    real = tmp_path / "real"
    real.write_text(
        f'#!/bin/sh\necho >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\n'
        f'if grep -q wrong {tmp_path}/a.cpp; then exit 3; fi\nwc -l < {tmp_path}/calls > "$2"\n'
    )
    real.chmod(0o755)
    (tmp_path / "a.cpp").write_text("one")
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def test_nothing_is_compiled_twice(kept: Path) -> None:
    source, made = kept.parent / "a.cpp", kept.parent / "a.so"

    def compiled(*options: str) -> int:
        assert call(kept, str(source), *options, "-o", str(made)) == 0
        return int(made.read_text())

    assert [compiled("-O3"), compiled("-O3"), compiled("-O1"), compiled("-O3")] == [1, 1, 2, 1]
    made = kept.parent / "elsewhere.so"
    assert compiled("-O1") == 2
    source.write_text("two")
    assert compiled("-O1") == 3


def test_what_does_not_compile_is_not_kept(kept: Path) -> None:
    source, made = kept.parent / "a.cpp", kept.parent / "a.so"
    source.write_text("wrong")
    for _ in range(2):
        assert call(kept, str(source), "-o", str(made)) == 3
    assert not list(kept.iterdir())


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_it_stands_before_the_machines_own() -> None:
    assert "compiler/bin" in (shutil.which("g++") or "")
