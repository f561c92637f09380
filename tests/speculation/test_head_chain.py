"""A head's passes as a chain of Triton kernels, where there is no GPU: in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import Interpreter

pytest.importorskip("triton")


@pytest.mark.parametrize("check", ["passes", "float16", "refused"])
def test_kernels_in_the_interpreter(check: str, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("head_chain_checks.py"), f"check_{check}", 0)
