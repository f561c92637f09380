"""What an editor knows of a call's result. `mypy` checks `typing_cases.py` with the package."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, get_overloads

import pytest

import hybridgen


@pytest.mark.parametrize(
    "call",
    [
        hybridgen.generate,
        hybridgen.Engine.generate,
        hybridgen.Client.generate,
        hybridgen.AsyncClient.generate,
    ],
)
def test_one_prompt_gives_one_completion_and_a_list_a_list(call: Any) -> None:
    found = [(each.__annotations__["prompts"], each.__annotations__["return"]) for each in get_overloads(call)]
    assert found == [("OnePrompt", "Completion"), ("ManyPrompts", "list[Completion]"), ("Any", "Any")]


def test_a_type_checker_sees_the_cases() -> None:
    root = Path(__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["files"] == ["hybridgen", "tests/typing_cases.py"]
    assert (root / "tests" / "typing_cases.py").read_text().count("assert_type(") > 10
