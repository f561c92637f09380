"""Modules that keep a state by slot: how they are found, given their state, and refused."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hybridgen.cache import MixerShapes, SlotShape
from hybridgen.errors import UnsupportedModelError
from hybridgen.models import bind, mixers
from hybridgen.models.mixers import (
    SlotMixer,
    check_claimed,
    check_mixers,
    continues_runs,
    find_mixers,
    same_in_every_layer,
)
from hybridgen.models.probe import probe_model
from hybridgen.models.slot_cache import SlotCache


@pytest.mark.parametrize(
    ("name", "recurrent"),
    [("lfm2", None), ("qwen3_5_text", torch.float32), ("bamba", torch.float32), ("mamba", torch.float32)],
)
def test_states_have_the_shapes_and_dtypes_that_transformers_keeps(name: str, recurrent: Any) -> None:
    model = families.build(name).to(torch.bfloat16)
    bound = bind(model)
    try:
        assert [site.layer for site in bound.mixers] == [layer for layer in bound.layers if list(find_mixers(layer))]
        assert bound.layers == tuple(model.base_model.layers)
        for site in bound.mixers:
            assert isinstance(site.module, SlotMixer)
            assert site.shapes.convolution is not None
            assert site.shapes.convolution.dtype is torch.bfloat16
            assert (site.shapes.recurrent and site.shapes.recurrent.dtype) == recurrent
    finally:
        bound.release()
    assert not any(isinstance(module, SlotMixer) or "_hybridgen" in vars(module) for module in model.modules())


@pytest.mark.parametrize("runs", [(7,), (2, 1, 4), (1, 1, 1, 4)])
def test_a_mixer_computes_the_same_with_either_cache(runs: tuple[int, ...]) -> None:
    model = families.build("qwen3_5_text")
    mixer = next(find_mixers(model))
    theirs = DynamicCache(config=model.config)
    hidden = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    ours = SlotCache(None, None, 4, previous=False)
    with torch.inference_mode():
        for part in hidden.split(runs, dim=1):
            wanted = mixer(part, cache_params=theirs)
            torch.testing.assert_close(mixer(part, cache_params=ours), wanted)
            ours = SlotCache(ours.conv_states[0], ours.recurrent_states[0], 4, previous=True)
    assert torch.equal(ours.conv_states[0], theirs.layers[mixer.layer_idx].conv_states[0])
    torch.testing.assert_close(ours.recurrent_states[0], theirs.layers[mixer.layer_idx].recurrent_states[0])


@pytest.mark.parametrize(
    ("name", "continues", "shortest"),
    [("mamba", False, 1), ("jamba", False, 1), ("mamba2", True, 2), ("lfm2", True, 1), ("kimi_linear", True, 2)],
)
def test_a_scan_that_begins_every_run_at_zeros_is_seen(name: str, continues: bool, shortest: int) -> None:
    bound = bind(families.build(name))
    assert {mixer.continues for mixer in bound.mixers} == {continues}
    assert bound.shortest_run == shortest


class Forgetful(nn.Module):
    layer_idx = 0

    def forward(self, hidden_states: torch.Tensor, cache_params: Any) -> torch.Tensor:
        cache_params.update_recurrent_state(hidden_states, 0)
        return hidden_states


def test_a_mixer_that_ignores_its_state_is_refused() -> None:
    shapes = MixerShapes(None, SlotShape((64,), torch.float32))
    with pytest.raises(UnsupportedModelError, match="Forgetful of layer 0 computes the same whatever state"):
        continues_runs(Forgetful(), torch.randn(2, 64), shapes)


class Indexed(nn.Module):
    """Looks its layer up in the cache, as transformers does before 5.24."""

    def __init__(self, layer_idx: int, scale: bool) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor, cache_params: Any) -> torch.Tensor:
        state = cache_params.layers[self.layer_idx].recurrent_states[0]
        cache_params.update_recurrent_state(state + hidden_states[:, -1], self.layer_idx)
        return hidden_states + state[:, None] * (self.layer_idx if self.scale else 1)


def test_an_index_that_is_for_the_cache_alone_is_the_same_in_every_layer() -> None:
    shapes = MixerShapes(None, SlotShape((64,), torch.float32))
    mixer = Indexed(3, scale=False)
    assert same_in_every_layer(mixer, torch.randn(2, 64), shapes)
    assert mixer.layer_idx == 3
    assert not same_in_every_layer(Indexed(3, scale=True), torch.randn(2, 64), shapes)


def test_mixers_have_their_own_index_again_once_they_are_released() -> None:
    model = families.build("lfm2")
    own = [mixer.layer_idx for mixer in find_mixers(model)]
    bound = bind(model)
    assert {mixer.module.layer_idx for mixer in bound.mixers} == {0}
    check_mixers(bound.model)  # sees their own all the same
    bound.release()
    assert [mixer.layer_idx for mixer in find_mixers(model)] == own


class Strange(nn.Module):
    layer_idx = 0

    def forward(self, hidden_states: torch.Tensor, cache_params: Any, other: torch.Tensor) -> torch.Tensor:
        cache_params.update_recurrent_state(other, 0)
        return hidden_states


class StrangeShortConv(Strange):
    pass


@pytest.mark.parametrize("kind", [Strange, StrangeShortConv])
def test_a_mixer_with_unknown_arguments_is_refused(kind: type[Strange]) -> None:
    model = families.build("llama")
    model.model.layers[0].mlp = kind()
    with pytest.raises(UnsupportedModelError, match="takes hidden_states, cache_params, other"):
        probe_model(model, 64)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_cache_is_given_by_the_name_that_transformers_has_for_it() -> None:
    bind(families.build("lfm2")).release()


def test_a_state_without_a_mixer_is_refused() -> None:
    model = families.build("lfm2")
    mixers = list(find_mixers(model))
    with pytest.raises(UnsupportedModelError, match=r"layers \[3\] keep a state"):
        check_claimed(mixers[:-1], DynamicCache(config=model.config))


def test_two_states_of_one_layer_are_refused() -> None:
    model = families.build("lfm2")
    model.model.layers[2].conv.layer_idx = 0
    with pytest.raises(UnsupportedModelError, match="one state a layer"):
        check_mixers(model)


def test_a_mixer_beside_experts_is_given_slots_once() -> None:
    bound = bind(families.build("lfm2_moe"))
    before = [type(mixer.module) for mixer in bound.mixers]
    bound.use_experts(lambda site: True)
    assert bound.experts
    assert [type(mixer.module) for mixer in bound.mixers] == before
    with bound.original_attention():
        assert not any(isinstance(mixer.module, SlotMixer) for mixer in bound.mixers)
    bound.release()
    assert not any(isinstance(mixer.module, SlotMixer) for mixer in bound.mixers)


def test_runs_that_are_alike_make_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixers, "_BATCH", 10)
    runs = [(4, True), (3, True), (4, False), (4, True), (4, True), (30, True), (4, False)]
    found = list(mixers._alike(runs))
    assert found == [
        ((4, True), [0, 3]), ((4, True), [4]), ((3, True), [1]), ((4, False), [2, 6]), ((30, True), [5]),
    ]  # fmt: skip
