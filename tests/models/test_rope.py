"""Rotary tables per token against Hugging Face's for a request alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import CONFIG_MAPPING

import hybridgen
from hybridgen.errors import UnsupportedModelError
from hybridgen.models.probe import probe_config
from hybridgen.models.rope import PerTokenRope, replace_length_dependent_rope, restore_rope


@pytest.mark.parametrize("variant", ["dynamic", "longrope"])
def test_each_length_gets_its_own_table(variant: str) -> None:
    name, changes = families.ROPE_VARIANTS[variant]
    ours = PerTokenRope(families.build(name, **changes).model.rotary_emb)
    for length in (3, 63, 64, 65, 79, 80, 81, 200):
        original = families.build(name, **changes).model.rotary_emb
        positions = torch.arange(length)[None]
        expected = original(torch.zeros(1), positions)
        actual = ours.table(positions, torch.full_like(positions, length), torch.float32)
        for a, e in zip(actual, expected, strict=True):
            assert torch.allclose(a, e, atol=1e-5), length


@pytest.mark.parametrize("variant", ["dynamic", "longrope"])
def test_lengths_of_one_batch_do_not_mix(variant: str) -> None:
    name, changes = families.ROPE_VARIANTS[variant]
    ours = PerTokenRope(families.build(name, **changes).model.rotary_emb)
    positions = torch.tensor([[2, 2, 9]])
    cos, _ = ours.table(positions, torch.tensor([[10, 200, 10]]), torch.float32)
    alone, _ = ours.table(positions[:, :1], torch.tensor([[10]]), torch.float32)
    assert torch.equal(cos[:, :1], alone)
    assert not torch.allclose(cos[:, 0], cos[:, 1])


def test_only_length_dependent_modules_are_replaced_and_put_back() -> None:
    for variant, (name, changes) in families.ROPE_VARIANTS.items():
        model = families.build(name, **changes)
        original = model.model.rotary_emb
        replaced: list = []
        replace_length_dependent_rope(model, replaced)
        assert bool(replaced) == (variant in ("dynamic", "longrope"))
        restore_rope(replaced)
        assert model.model.rotary_emb is original


def _longrope(size: int) -> dict:
    fields = {"short_factor": [1.0] * size, "long_factor": [1.0 + i for i in range(size)]}
    return {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 40, **fields}


def _switch(name: str, **changes: Any) -> int | None:
    model = families.build(name, num_hidden_layers=1, rope_parameters=_longrope(8), **changes)
    replaced: list = []
    replace_length_dependent_rope(model, replaced)
    return model.model.rotary_emb.switch_length


def test_only_models_whose_cache_is_dropped_are_prefilled_again() -> None:
    """transformers drops the cache of Phi-3 where its own field says, and goes on with a Llama's old keys."""
    assert _switch("phi3", original_max_position_embeddings=40) == 41
    assert _switch("phi3", original_max_position_embeddings=90) == 91
    assert _switch("llama") is None
    name, changes = families.ROPE_VARIANTS["dynamic"]
    assert PerTokenRope(families.build(name, **changes).model.rotary_emb).switch_length is None


def test_a_factor_for_each_length_and_one_table() -> None:
    """PhiMoE scales cos and sin by two numbers, and uses the frequencies of short texts for all."""
    rope = _longrope(8) | {"short_mscale": 1.25, "long_mscale": 1.5}
    original = families.build("phimoe", num_hidden_layers=1, rope_parameters=rope).model.rotary_emb
    ours = PerTokenRope(original)
    assert ours.scalings == (1.25, 1.5)
    for length in (7, 40, 41, 200):
        positions = torch.arange(length)[None]
        actual = ours.table(positions, torch.full_like(positions, length), torch.float32)
        for a, e in zip(actual, original(torch.zeros(1), positions), strict=True):
            assert torch.allclose(a, e, atol=1e-5), length


def test_an_unknown_layout_is_refused_before_weights_are_read() -> None:
    """DeepSeek-V2's tables are complex numbers."""
    changes = {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    config = CONFIG_MAPPING["deepseek_v2"](**families.CONFIGS["deepseek_v2"] | changes)
    with pytest.raises(UnsupportedModelError, match=r"does not know .*'dynamic'"):
        probe_config(config, 512)


@pytest.mark.parametrize(("name", "size"), [("llama", 8), ("minicpm3", 4)])
def test_a_request_goes_on_with_the_keys_of_the_first_table(name: str, size: int, tmp_path: Path) -> None:
    """As transformers does, for keys and for latents, where a text of 33 tokens passes 40."""
    model = families.build(name, num_hidden_layers=1, rope_parameters=_longrope(size))
    model.save_pretrained(tmp_path)
    prompts = families.prompts_of((33, 60))
    expected = [families.reference(model, prompt, 12)[0] for prompt in prompts]
    settings: dict[str, Any] = {"mode": "eager", "max_batch": 2, "max_context": 128, "kv_memory": "4MiB"}
    with hybridgen.Engine.load(tmp_path, token_budget=24, **settings) as engine:
        assert [list(out.token_ids) for out in engine.generate(prompts, max_new_tokens=12)] == expected


def test_an_unknown_layout_is_refused() -> None:
    name, changes = families.ROPE_VARIANTS["dynamic"]
    original = families.build(name, **changes).model.rotary_emb
    original.attention_scaling = 1.0

    class Other(type(original)):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            cos, sin = super().forward(x, position_ids)
            return cos * 2, sin

    original.__class__ = Other
    with pytest.raises(UnsupportedModelError, match="does not know"):
        PerTokenRope(original)


def test_it_refuses_to_run_outside_a_step() -> None:
    name, changes = families.ROPE_VARIANTS["dynamic"]
    rope = PerTokenRope(families.build(name, **changes).model.rotary_emb)
    with pytest.raises(RuntimeError, match="outside a hybridgen step"):
        rope(torch.zeros(1), torch.zeros(1, 3, dtype=torch.long))
