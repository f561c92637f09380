"""What the doctor says; that it runs is in `test_cli.py`."""

from __future__ import annotations

import shutil

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
