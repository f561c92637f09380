"""The Triton sampling kernels where there is no GPU: in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import Interpreter

pytest.importorskip("triton")


CHECKS = Path(__file__).with_name("sampling_interpreter.py")


@pytest.mark.parametrize("check", ["functions", "ties_across_blocks", "history", "plans", "settled", "rough"])
def test_kernels_in_the_interpreter(check: str, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(CHECKS, f"check_{check}")


@pytest.mark.parametrize("examples", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_random_batches_in_the_interpreter(examples: int, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(CHECKS, "check_batches", examples)
