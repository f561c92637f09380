"""Ranks that start within milliseconds."""

from __future__ import annotations

import subprocess

import forks
import pytest


@pytest.fixture(autouse=True)
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", forks.Popen)
