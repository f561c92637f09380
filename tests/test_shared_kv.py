"""Layers that attend to an earlier layer's keys and values, token for token against Hugging Face `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from test_families import GRAPHS, LENGTHS, SETTINGS, check_engine

import hybridgen
from hybridgen.cache import SharedKV

NEW_TOKENS = 40
_LAYERS = ["sliding_attention", "full_attention"] * 3
_COMMON: dict[str, Any] = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": _LAYERS,
    "vocab_size_per_layer_input": families.VOCAB,
    "hidden_size_per_layer_input": 8,
}
SHARED: dict[str, dict[str, Any]] = {
    "gemma3n_text": _COMMON
    | {"intermediate_size": [96] * 6, "activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 8},
    # Heads of 16 in windows and of 32 elsewhere, as Gemma 4 has them.
    "gemma4_text": _COMMON | {"global_head_dim": 32},
}


@pytest.mark.parametrize("name", sorted(SHARED))
def test_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, late requests and borders as in `test_families`, in all modes."""
    monkeypatch.setitem(families.CONFIGS, name, families.CONFIGS.get(name, families._BASE) | SHARED[name])
    model = families.build(name)
    expected = [families.reference(model, prompt, NEW_TOKENS) for prompt in families.prompts_of(LENGTHS)]
    path = families.write(name, tmp_path)
    for mode in ("eager", "graph", "jit", "hybrid"):
        fields: dict[str, Any] = {"mode": mode, "compile_backend": "eager", "run_ahead": 1, **SETTINGS}
        fields |= GRAPHS if mode in ("graph", "hybrid") else {}
        with hybridgen.Engine.load(path, **fields) as engine:
            bound = engine._runner.bound
            states = bound.layer_states(SETTINGS["page_size"], torch.float32)
            assert [isinstance(state, SharedKV) for state in states] == [False] * 4 + [True] * 2
            assert all(state.bytes_per_page == 0 for state in states[4:])
            check_engine(engine, expected, NEW_TOKENS if mode == "eager" else 18)
            stats = engine.stats()
            # Their layers run uncompiled, counted.
            assert bool(stats.fallbacks) == (mode in ("jit", "hybrid"))
            assert stats.late_compiles == 0
            assert stats.free_pages == stats.pages
