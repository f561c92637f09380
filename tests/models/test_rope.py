"""Rotary tables per token against Hugging Face's for a request alone."""

from __future__ import annotations

import families
import pytest
import torch

from hybridgen.errors import UnsupportedModelError
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


def test_switch_length() -> None:
    longrope, dynamic = (
        PerTokenRope(families.build(name, **changes).model.rotary_emb)
        for name, changes in (families.ROPE_VARIANTS["longrope"], families.ROPE_VARIANTS["dynamic"])
    )
    assert longrope.switch_length == 81
    assert dynamic.switch_length is None


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
