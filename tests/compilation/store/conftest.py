"""A store that two processes filled at once, shared by the tests that start warm from it."""

from __future__ import annotations

import families
import pytest
from workers import Warmed, result, start


@pytest.fixture(scope="session")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Warmed:
    """Two processes at once on an empty store."""
    directory = tmp_path_factory.mktemp("warm")
    model = families.write("llama", directory)
    store = directory / "store"
    processes = [start(model, store) for _ in range(2)]
    return Warmed(model, store, tuple(result(process) for process in processes))
