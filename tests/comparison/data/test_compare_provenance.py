"""Where and with what something was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridgen.comparison.data import provenance as facts


def test_the_commit_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDGEN_COMMIT", "abc123")
    assert facts.commit() == "abc123"


@pytest.mark.skipif(not (Path(__file__).parents[3] / ".git").exists(), reason="no repository")
def test_the_commit_is_the_repository_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRIDGEN_COMMIT", raising=False)
    where = Path(facts.__file__).resolve().parents[3]
    if not (where / ".git").exists():
        pytest.skip("hybridgen is installed elsewhere")
    head = subprocess.run(["git", "-C", where, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith((facts.commit() or "none").removesuffix("+"))


def test_what_nvidia_smi_says_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "580.159.04, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 41, 120.5 W, 700.00 W"
    monkeypatch.setattr(facts, "_output", lambda *command: line)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="u"))
    state = facts.gpu_state(torch.device("cuda", 0))
    assert (state["driver"], state["clocks.sm"], state["power.limit"]) == ("580.159.04", "1980 MHz", "700.00 W")


def test_without_nvidia_smi_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **options: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    assert set(facts.gpu_state(torch.device("cuda", 0)).values()) == {None}
