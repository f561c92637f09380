"""The Triton sampling kernels where there is no GPU: in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import Interpreter

pytest.importorskip("triton")


@pytest.mark.parametrize("check", ["functions", "ties_across_blocks", "history", "batches", "plans"])
def test_kernels_in_the_interpreter(check: str, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("sampling_interpreter.py"), f"check_{check}")
