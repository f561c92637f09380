"""Multi-head latent attention, token for token against Hugging Face `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import multimodal
import pytest
import quantised_formats
import torch
from test_families import (
    FEW_LENGTHS,
    FEW_TOKENS,
    GRAPHS,
    LENGTHS,
    NEW_TOKENS,
    SETTINGS,
    WHOLE_TOKENS,
    check_engine,
    check_whole_matrix,
)

import hybridgen
from hybridgen.errors import RequestError
from hybridgen.models.latent import LatentAttention

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v2": ("deepseek_v2", {"rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}),
    "without a latent of queries": ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    "minicpm3": ("minicpm3", {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "glm4_moe_lite": ("glm4_moe_lite", {}),
    "longcat_flash": ("longcat_flash", {}),
}
USUAL = {"deepseek_v3": ("eager", "graph", "jit", "hybrid"), "deepseek_v2": ("eager",), "minicpm3": ("eager", "hybrid")}
"""In the usual run; all others only with `-m slow`."""
CASES = [
    pytest.param(name, mode, marks=() if mode in USUAL.get(name, ()) else pytest.mark.slow)
    for name in VARIANTS
    for mode in ("eager", "graph", "jit", "hybrid")
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_tokens(name: str, mode: str, tmp_path: Path) -> None:
    """Batches, late requests, shared prefixes, chunks and borders, as in `test_families`."""
    family, changes = VARIANTS[name]
    model = families.build(family, **changes)
    expected = families.references(model, families.prompts_of(LENGTHS), NEW_TOKENS)
    fields: dict[str, Any] = {"mode": mode, "compile_backend": "eager", "run_ahead": 1, **SETTINGS}
    fields |= GRAPHS if mode in ("graph", "hybrid") else {}
    with hybridgen.Engine.load(families.write(family, tmp_path, **changes), **fields) as engine:
        assert len(engine._runner.bound.latents) == len(engine._runner.bound.sites)
        check_engine(engine, expected, NEW_TOKENS if mode == "eager" else FEW_TOKENS)
        stats = engine.stats()
        assert stats.prefix.cached_tokens > 0  # prompts that came again
        assert bool(stats.fallbacks) == (mode in ("jit", "hybrid") and family in families.UNCOMPILED)
        assert stats.late_compiles == 0
        assert (stats.graphs.padded_hits > 0) == ("decode_buckets" in fields)
        if "decode_buckets" in fields:
            why = {reason for phase, _, reason in stats.steps if phase == "prefill" and "not recorded" in reason}
            assert not why
        assert stats.free_pages == stats.pages


def few(model: Any) -> list[list[int]]:
    return [tokens for tokens, _ in families.references(model, families.prompts_of(FEW_LENGTHS), FEW_TOKENS)]


def generated(engine: hybridgen.Engine) -> list[list[int]]:
    outs = engine.generate(families.prompts_of(FEW_LENGTHS), max_new_tokens=FEW_TOKENS)
    return [list(out.token_ids) for out in outs]


def test_checked_drafts_change_no_token(tmp_path: Path) -> None:
    path = families.write("minicpm3", tmp_path)
    with hybridgen.Engine.load(path, mode="graph", speculation="ngram", **SETTINGS, **GRAPHS) as engine:
        assert generated(engine) == few(families.build("minicpm3"))


_GROWING = _YARN | {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1, "mscale_all_dim": 1.0}
MISTRAL_4 = families.CONFIGS["deepseek_v3"] | {
    "model_type": "mistral4", "sliding_window": None, "rope_parameters": _GROWING | {"mscale": 1.0},
}  # fmt: skip
"""A text part alone: transformers has no language model of it. Queries grow with their position."""


def test_mistral_4_in_its_wrapper(tmp_path: Path) -> None:
    path = multimodal.write("mistral3", tmp_path, **MISTRAL_4)
    prompt = [token for token in families.prompts_of((110,))[0] if token < multimodal.IMAGE]
    with hybridgen.Engine.load(path, mode="eager", **SETTINGS) as engine:
        assert len(engine._runner.bound.latents) == 2
        tokens = list(engine.generate(prompt, max_new_tokens=FEW_TOKENS).token_ids)
    assert tokens == families.reference(multimodal.build("mistral3", **MISTRAL_4), prompt, FEW_TOKENS)[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "graph", "jit", "hybrid"])
def test_mistral_4_whole_matrix(mode: str, tmp_path: Path) -> None:
    model = multimodal.build("mistral3", **MISTRAL_4)
    prompts = [[min(token, multimodal.IMAGE - 1) for token in ids] for ids in families.prompts_of(LENGTHS)]
    expected = [families.reference(model, prompt, WHOLE_TOKENS) for prompt in prompts]
    check_whole_matrix(multimodal.write("mistral3", tmp_path, **MISTRAL_4), mode, expected, prompts=prompts)


def test_a_live_module_stays_its_owners() -> None:
    model = families.build("deepseek_v3")
    plain = [type(module) for module in model.modules()]
    with hybridgen.Engine.load(model, mode="graph", **SETTINGS, **GRAPHS) as engine:
        assert generated(engine) == few(model)
        assert any(isinstance(module, LatentAttention) for module in engine._runner.bound.model.modules())
        assert [type(module) for module in model.modules()] == plain
        projection: Any = model.model.layers[1].self_attn.kv_b_proj
        with torch.no_grad():
            projection.weight.mul_(-1.5)
        changed = few(model)
        assert generated(engine) == changed
        hook = projection.register_forward_hook(lambda module, inputs, output: output * 2)
        with pytest.raises(RequestError, match="kv_b_proj of a DeepseekV3Attention has forward hooks"):
            engine.generate([5, 6, 7], max_new_tokens=2)
        hook.remove()
        assert generated(engine) == changed


@pytest.mark.parametrize("stored", ["awq", "fp8 block"])
def test_quantised_checkpoints(stored: str, tmp_path: Path) -> None:
    """What expands latents is dequantised, the rest runs as it is stored."""
    writer, config = quantised_formats.FORMATS[stored]
    model = families.build("minicpm3")

    def of_projections(owner: str) -> Any:
        return writer if quantised_formats.projections(owner) else None

    path = quantised_formats.write(tmp_path / "stored", model, of_projections, config)
    with hybridgen.Engine.load(path, mode="eager", dtype="float32", **SETTINGS) as engine:
        assert generated(engine) == few(model)
        assert any("takes their projections apart" in reason for reason in engine.stats().fallbacks)


def test_quantised_while_loading(tmp_path: Path) -> None:
    path = families.write("minicpm3", tmp_path)
    with hybridgen.Engine.load(path, mode="eager", quantization="int8", **SETTINGS) as engine:
        assert all(len(tokens) == FEW_TOKENS for tokens in generated(engine))
        rows = engine.stats().weights
        assert sum(row.projections for kind, row in rows.items() if "int8" in kind) == 14
