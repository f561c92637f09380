"""What the doctor says; that it runs is in `test_cli.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hybridgen.cli import doctor


@pytest.mark.parametrize(
    ("cxx", "words"),
    [("ccache g++", "not one program"), ("no-such-compiler", "is not found"), ("", "not one program")],
)
def test_a_compiler_that_inductor_would_not_run(monkeypatch: pytest.MonkeyPatch, cxx: str, words: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    finding = doctor._compiler()
    assert not finding.ok
    assert words in finding.detail
    assert f'CXX="{cxx}"' in finding.detail
    assert "set CXX to a compiler alone" in finding.detail
    assert "install" not in finding.detail


def test_a_compiler_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("CXX", "clang++-18")
    assert doctor._compiler() == ("compiler", True, "/bin/clang++-18")
    monkeypatch.delenv("CXX")
    assert doctor._compiler() == ("compiler", True, "/bin/g++")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++ or set CXX" in doctor._compiler().detail


def test_the_compile_cache_is_the_one_that_engines_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HYBRIDGEN_COMPILE_CACHE")
    monkeypatch.setenv("HYBRIDGEN_CACHE_DIR", str(tmp_path / "store"))
    finding = doctor._compile_cache()
    assert finding == ("compile cache", True, f"{tmp_path / 'store'}, 0 entries, 0.0 MiB")
    (tmp_path / "store").chmod(0o755)
    finding = doctor._compile_cache()
    assert not finding.ok
    assert f"chmod 700 {tmp_path / 'store'}" in finding.detail
    monkeypatch.setenv("HYBRIDGEN_COMPILE_CACHE", "0")
    assert "off: HYBRIDGEN_COMPILE_CACHE=0" in doctor._compile_cache().detail
