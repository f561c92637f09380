"""Fused decode steps of a model that two processes have together."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import Interpreter

pytest.importorskip("triton")

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "check", ["chain", pytest.param("head_norms", marks=slow), pytest.param("one_rank_cannot", marks=slow)]
)
def test_ranks_decode_with_the_chain(check: str, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("chain_rank_checks.py"), f"check_{check}", 0)
