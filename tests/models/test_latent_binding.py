"""Attention modules with latents: how they are found, bound, tried and refused."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from hybridgen.cache import LatentShape, PagedLatent
from hybridgen.errors import UnsupportedModelError
from hybridgen.models import bind
from hybridgen.models.latent import LatentAttention, find_latents
from hybridgen.models.probe import probe_model


def attentions(model: nn.Module) -> list[Any]:
    return list(find_latents(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_keeps_one_latent_and_one_rotary_key(dtype: torch.dtype) -> None:
    model = families.build("deepseek_v3").to(dtype)
    plain = [type(module) for module in model.modules()]
    bound = bind(model)
    try:
        assert bound.layers == tuple(model.model.layers)
        assert list(bound.latents) == attentions(model)
        assert all(isinstance(module, LatentAttention) for module in bound.latents)
        assert {site.latent for site in bound.sites} == {LatentShape(16, 8)}
        states = bound.layer_states(16, dtype)
        assert all(isinstance(state, PagedLatent) for state in states)
        assert {state.bytes_per_page for state in states} == {16 * 24 * dtype.itemsize}
        with bound.original_attention():
            assert not any(isinstance(module, LatentAttention) for module in bound.latents)
        assert all(isinstance(module, LatentAttention) for module in bound.latents)
    finally:
        bound.release()
    assert [type(module) for module in model.modules()] == plain
    assert not any({"_hybridgen", "expand_kv"} & set(vars(module)) for module in model.modules())


def test_layers_with_two_attentions_each() -> None:
    model = families.build("longcat_flash")
    bound = bind(model)
    assert bound.layers == tuple(model.model.layers)
    assert len(bound.sites) == 4
    assert [site.layer for site in bound.sites] == [bound.layers[0]] * 2 + [bound.layers[1]] * 2
    bound.release()


def check_refused(model: Any, why: str, before: bool = False) -> None:
    plain = [type(module) for module in model.modules()]
    if before:
        with pytest.raises(UnsupportedModelError, match=why):
            probe_model(model, 64)
    with pytest.raises(UnsupportedModelError, match=why):
        bind(model)
    assert [type(module) for module in model.modules()] == plain
    assert not any({"_hybridgen", "expand_kv"} & set(vars(module)) for module in model.modules())


def test_a_projection_that_cannot_be_taken_apart_is_refused() -> None:
    model = families.build("deepseek_v3")
    attentions(model)[1].kv_b_proj.bias = nn.Parameter(torch.zeros(80))
    check_refused(model, "layers.1.self_attn caches latents, and its kv_b_proj is a Linear", before=True)
    attentions(model)[1].kv_b_proj = nn.Sequential(nn.Linear(16, 80, bias=False))
    check_refused(model, "kv_b_proj is a Sequential", before=True)


def test_a_hook_that_would_not_be_called_is_refused() -> None:
    model = families.build("deepseek_v3")
    hook = attentions(model)[0].kv_b_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    check_refused(model, "has forward hooks")
    hook.remove()
    bind(model).release()


@pytest.mark.parametrize("change", ["scaled", "rotary first", "other values"])
def test_another_expansion_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by its values: the class and the projection are what they were."""
    kind = modeling_deepseek_v3.DeepseekV3Attention
    own = kind.expand_kv

    def expand_kv(self: Any, latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = own(self, latent, rotary)
        if change == "scaled":
            return key * 1.1, value
        return (key.roll(8, -1), value) if change == "rotary first" else (key, value + latent.mean())

    monkeypatch.setattr(kind, "expand_kv", expand_kv)
    check_refused(families.build("deepseek_v3"), "does not expand its latents by kv_b_proj alone")


def test_keys_that_change_behind_the_expansion_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_deepseek_v3.eager_attention_forward
    registry = modeling_deepseek_v3.ALL_ATTENTION_FUNCTIONS

    class Padded:
        def get_interface(self, name: str, default: Any) -> Any:
            found = registry.get_interface(name, own)

            def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any):
                return found(module, query, key, value * 2, *args, **kw)

            return attend

    monkeypatch.setattr(modeling_deepseek_v3, "ALL_ATTENTION_FUNCTIONS", Padded())
    check_refused(families.build("deepseek_v3"), "does not attend to what its expand_kv makes")
