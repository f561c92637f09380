"""Fixtures of the tests of models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from runners import free_runner

from hybridgen.execution import ModelRunner


@pytest.fixture
def runners() -> Iterator[list[ModelRunner]]:
    """A list for what a test makes; its runners are freed afterwards."""
    made: list[ModelRunner] = []
    yield made
    for runner in made:
        free_runner(runner)
