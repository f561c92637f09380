"""What the tests leave out of Triton's interpreter changes no value."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import Interpreter

pytest.importorskip("triton")


@pytest.mark.parametrize("check", ["launches", "overflow", "shapes", "it_is_quick"])
def test_in_the_interpreter(check: str, triton_interpreter: Interpreter) -> None:
    triton_interpreter.run(Path(__file__).with_name("quick_checks.py"), f"check_{check}", 0)
