"""Layers that attend to an earlier layer's keys and values, token for token against Hugging Face `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import multimodal
import pytest
import torch
from test_families import FEW_TOKENS, GRAPHS, LENGTHS, NEW_TOKENS, SETTINGS, check_engine

import hybridgen
from hybridgen.cache import SharedKV
from hybridgen.errors import UnsupportedModelError
from hybridgen.models.binding import bind

_LAYERS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
SHARED: dict[str, dict[str, Any]] = {
    "gemma3n_text": _LAYERS | {"intermediate_size": [96] * 6, "activation_sparsity_pattern": [0.0] * 6},
    # As Gemma 4 E2B: heads of 16 in windows and of 32 elsewhere, and embeddings for each layer.
    "gemma4_text": _LAYERS
    | {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": families.VOCAB,
        "hidden_size_per_layer_input": 8,
    },
}


@pytest.mark.parametrize("name", sorted(SHARED))
def test_tokens(name: str, tmp_path: Path) -> None:
    """Batches, late requests and borders as in `test_families`, in all modes."""
    model = families.build(name, **SHARED[name])
    expected = families.references(model, families.prompts_of(LENGTHS), NEW_TOKENS)
    path = families.write(name, tmp_path, **SHARED[name])
    for mode in ("eager", "graph", "jit", "hybrid"):
        fields: dict[str, Any] = {"mode": mode, "compile_backend": "eager", "run_ahead": 1, **SETTINGS}
        fields |= GRAPHS if mode in ("graph", "hybrid") else {}
        with hybridgen.Engine.load(path, **fields) as engine:
            bound = engine._runner.bound
            states = bound.layer_states(SETTINGS["page_size"], torch.float32)
            assert [isinstance(state, SharedKV) for state in states] == [False] * 4 + [True] * 2
            assert all(state.bytes_per_page == 0 for state in states[4:])
            if mode == "jit":  # which runs as mode eager does
                [out] = engine.generate(families.prompts_of(LENGTHS[:1]), max_new_tokens=FEW_TOKENS)
                assert list(out.token_ids) == expected[0][0][:FEW_TOKENS]
            else:
                check_engine(engine, expected, NEW_TOKENS if mode == "eager" else FEW_TOKENS)
            stats = engine.stats()
            # Their layers run uncompiled, counted.
            assert bool(stats.fallbacks) == (mode in ("jit", "hybrid"))
            assert stats.late_compiles == 0
            assert stats.free_pages == stats.pages


def test_whole_model(tmp_path: Path) -> None:
    """A checkpoint with encoders, as Gemma 4 E2B is one."""
    text = {**families.CONFIGS["gemma4_text"], **SHARED["gemma4_text"]}
    model = multimodal.build("gemma4", **text)
    path = multimodal.write("gemma4", tmp_path, **text)
    prompt = families.prompts_of((9,))[0]
    with hybridgen.Engine.load(path, mode="eager", **SETTINGS) as engine:
        tokens = list(engine.generate(prompt, max_new_tokens=10).token_ids)
    assert tokens == families.reference(model, prompt, 10)[0]


def test_layers_that_share_less_than_the_config_says_are_refused() -> None:
    model = families.build("gemma3n_text")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModelError, match=r"num_kv_shared_layers=1, but 2 attention modules .*layers\.2"):
        bind(model, 64)
    assert not any("_hybridgen" in vars(module) for module in model.modules())
