"""What tests of drafts share."""

from __future__ import annotations

import families
import pytest
from draft_cases import PROMPTS, Streams, each, loaded


@pytest.fixture(scope="session")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Streams:
    """A model, 17 requests of every kind, and what they give without drafts."""
    path = families.write("llama", tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=2)
    params = each(17, 40)
    with loaded(path) as engine:
        return path, params, engine.generate(PROMPTS, params)
