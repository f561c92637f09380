"""Families whose layers keep a state of one size, token for token against Hugging Face `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
from test_families import FEW_TOKENS, GRAPHS, LENGTHS, NEW_TOKENS, SETTINGS, check_engine, check_replays

import hybridgen
from hybridgen.loading.support import STATES_BY_SLOT

MODES = ("eager", "graph", "jit", "hybrid")
USUAL = {"mamba": ("eager",), "mamba2": ("hybrid",)}
"""In the usual run; all others only with `-m slow`, because `test_families` compares a few tokens of each."""
TOLERANCES = dict.fromkeys(("qwen3_next",), 1.5e-4)
"""Of log-probabilities. Gated delta nets with such weights round so: between the whole text at once and token by token,
transformers' own differ by 1.2e-4 (Qwen3.5, prompt of 7 tokens)."""
CASES = [
    pytest.param(name, mode, marks=() if mode in USUAL.get(name, ()) else pytest.mark.slow)
    for name in sorted(STATES_BY_SLOT - families.FAMILIES.keys())
    for mode in MODES
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_tokens(name: str, mode: str, tmp_path: Path) -> None:
    """Batches, late requests, chunks and borders, and log-probabilities, as for the families of `test_families`."""
    if families.is_absent(name):
        pytest.skip(f"this transformers has no {name}")
    model = families.build(name)
    expected = [families.reference(model, prompt, NEW_TOKENS) for prompt in families.prompts_of(LENGTHS)]
    fields: dict[str, Any] = {"mode": mode, "compile_backend": "eager", "run_ahead": 1, **SETTINGS}
    fields |= GRAPHS if mode in ("graph", "hybrid") else {}
    with hybridgen.Engine.load(families.write(name, tmp_path), **fields) as engine:
        assert engine._runner.bound.mixers
        check_engine(engine, expected, NEW_TOKENS if mode == "eager" else FEW_TOKENS, TOLERANCES.get(name, 1e-4))
        stats = engine.stats()
        assert not stats.fallbacks
        assert stats.late_compiles == 0
        assert stats.free_pages == stats.pages
        if mode in ("graph", "hybrid"):
            check_replays(engine)
