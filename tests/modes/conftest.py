"""The checkpoint of these tests, what mode eager generates, and `mode_cases` to import from here."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
from mode_cases import PROMPTS, loaded, mixed

from hybridgen import Completion


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("modes"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Completion]:
    """Mode eager: requests of every kind at once."""
    with loaded(path, "eager") as engine:
        return engine.generate(PROMPTS, mixed(len(PROMPTS)))
