"""Models as data: what is described computes what the model does, and what does not is found out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import families
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridgen.cache import LayerPages
from hybridgen.fused import reference
from hybridgen.fused.persistent import shape
from hybridgen.models.binding import bind
from hybridgen.models.decoder import Decoder, DecoderLayer, Linear, Norm, Unfit, dense, dense_parts, describe
from hybridgen.models.projections import fuse_projections
from hybridgen.models.weights import WHOLE, DenseWeight, ModuleWeights, Shard, WeightFormat

SERVED = {"llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "olmo2", "gemma"}
"""Families that the fused steps are made for."""
PAGE = 8


def _described(model: PreTrainedModel, max_context: int = 128) -> Decoder:
    fuse_projections(model)
    bound = bind(model)
    sites = bound.sites
    bound.release()
    decoder = describe(model, sites, ModuleWeights(model), max_context)
    reference.check(model, decoder)
    return decoder


@cache
def _pair(name: str) -> tuple[PreTrainedModel, Decoder]:
    model = families.build(name)
    return model, _described(model)


def _greedy(decoder: Decoder, prompt: list[int], new_tokens: int) -> list[int]:
    """By single steps over a paged cache of shuffled pages, all of it NaN at first."""
    pages = -(-(len(prompt) + new_tokens) // PAGE)
    size = pages + 1, decoder.kv_heads, PAGE, decoder.head_dim
    cache = tuple(LayerPages(torch.full(size, torch.nan), torch.full(size, torch.nan)) for _ in decoder.layers)
    table = torch.arange(pages, 0, -1, dtype=torch.int32)[None]
    tokens = list(prompt)
    for position in range(len(prompt) + new_tokens - 1):
        step = torch.tensor([tokens[position]]), torch.tensor([position])
        logits = reference.step(decoder, cache, *step, table)
        if position + 1 == len(tokens):
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_is_computed_or_refused(name: str) -> None:
    model = families.build(name)
    prompt = families.prompts_of((13,))[0]
    expected, _ = families.reference(model, prompt, 6)
    if name in SERVED:
        assert _greedy(_described(model), prompt, 6) == expected
        return
    reason = None
    try:
        decoder = _described(model)
    except Unfit as error:
        reason = str(error)
    if reason is None:
        assert _greedy(decoder, prompt, 6) == expected
    else:
        assert len(reason) > 10


@pytest.mark.parametrize("variant", families.ROPE_VARIANTS)
def test_rotary_variants(variant: str) -> None:
    name, fields = families.ROPE_VARIANTS[variant]
    model = families.build(name, **fields)
    prompt = families.prompts_of((90,))[0]
    expected, _ = families.reference(model, prompt, 4)
    if variant in ("dynamic", "longrope"):
        with pytest.raises(Unfit, match="depend on the length"):
            _described(model)
    else:
        assert _greedy(_described(model), prompt, 4) == expected


def test_weights_are_the_models_own() -> None:
    model, decoder = _pair("llama")
    layer = model.model.layers[1]
    assert dense(decoder.layers[1].qkv).data_ptr() == layer.self_attn.q_proj.weight.data_ptr()
    assert dense(decoder.layers[1].down).data_ptr() == layer.mlp.down_proj.weight.data_ptr()
    assert dense(decoder.head).data_ptr() == model.lm_head.weight.data_ptr()
    sizes = [dense(t) for x in decoder.layers for t in (x.qkv, x.out, x.gate_up, x.down)]
    assert decoder.weight_bytes == 4 * sum(w.numel() for w in (*sizes, dense(decoder.head)))


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """A weight of another format: values with a scale, here one that loses nothing."""

    values: Tensor
    bytes_read: int = 7

    @property
    def format(self) -> WeightFormat:
        return WeightFormat("scaled", self.values.dtype, (1, 1))

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, self.values * 4, bias)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "scale": torch.tensor(4.0)}


class _ScaledWeights(ModuleWeights):
    """Gives every projection in that format."""

    def get(self, names: Sequence[str], shard: Shard = WHOLE) -> _Scaled:  # type: ignore[override]
        return _Scaled(super().get(names, shard).values / 4)


def test_weights_of_another_format_are_computed_with_and_refused_where_dense_ones_are_needed() -> None:
    model, plain = _pair("qwen2")
    bound = bind(model)
    sites = bound.sites
    bound.release()
    decoder = describe(model, sites, _ScaledWeights(model), 128)
    reference.check(model, decoder)
    assert decoder.weight_bytes == 7 * (4 * len(plain.layers) + 1)
    for linear in (decoder.head, decoder.layers[0].qkv):
        with pytest.raises(Unfit, match="scaled float32 in blocks of 1x1; dense"):
            dense(linear)
    with pytest.raises(Unfit, match="scaled bfloat16"):
        layers = tuple(dataclasses.replace(x, qkv=Linear(_Scaled(dense(x.qkv).bfloat16()))) for x in plain.layers)
        shape.check(dataclasses.replace(plain, layers=layers, dtype=torch.bfloat16, head_dim=32), 16, (9, 0))


def _with_layer(decoder: Decoder, index: int, **changes: object) -> Decoder:
    layers = list(decoder.layers)
    layers[index] = dataclasses.replace(layers[index], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(decoder, layers=tuple(layers))


def _swapped(linear: Linear) -> Linear:
    gate, up = dense(linear).chunk(2)
    return Linear(DenseWeight(torch.cat((up, gate))), linear.bias)


def _shifted(norm: Norm | None) -> Norm:
    assert norm is not None
    return Norm(norm.scale + 1, norm.eps)


def _coarse(norm: Norm | None) -> Norm:
    assert norm is not None
    return Norm(norm.scale, 0.5)


def _wrong_layers(layer: DecoderLayer) -> dict[str, dict[str, object]]:
    return {
        "gate and up swapped": {"gate_up": _swapped(layer.gate_up)},
        "Gemma's norm": {"before_attention": _shifted(layer.before_attention)},
        "epsilon": {"before_mlp": _coarse(layer.before_mlp)},
        "no norm": {"before_mlp": None},
        "attention scale": {"attention_scale": 2 * layer.attention_scale},
        "window": {"window": 2},
        "no rotary": {"rotates": False},
        "residual multiplier": {"residual": 0.9},
        "post-norm": {"after_attention": layer.before_mlp},
        "bias": {"out": Linear(layer.out.weight, torch.full((layer.out.weight.shape[0],), 0.1))},
        "another layer's weight": {"down": Linear(DenseWeight(dense(layer.down).flip(0)))},
    }


@pytest.mark.parametrize("what", _wrong_layers(_pair("llama")[1].layers[0]))
def test_a_wrong_layer_is_noticed(what: str) -> None:
    model, decoder = _pair("llama")
    wrong = _with_layer(decoder, 2, **_wrong_layers(decoder.layers[2])[what])
    with pytest.raises(Unfit, match="layer 2"):
        reference.check(model, wrong)


@pytest.mark.parametrize(
    ("change", "site"),
    [
        ({"activation": "gelu_tanh"}, "layer 0"),
        ({"embedding_scale": 2.0}, "embedding"),
        ({"logits_scale": 0.5}, "head"),
        ({"rotary": None}, "layer 0"),
    ],
)
def test_a_wrong_model_is_noticed(change: dict[str, object], site: str) -> None:
    model, decoder = _pair("llama")
    with pytest.raises(Unfit, match=site):
        reference.check(model, dataclasses.replace(decoder, **change))  # type: ignore[arg-type]


def test_head_norms_are_noticed() -> None:
    model, decoder = _pair("qwen3")
    with pytest.raises(Unfit, match="layer 1"):
        reference.check(model, _with_layer(decoder, 1, query_norm=None))


def test_a_rotary_table_that_is_wrong_late_is_noticed() -> None:
    model, decoder = _pair("llama")
    assert decoder.rotary is not None
    cos, sin = (table.clone() for table in decoder.rotary)
    cos[-2:], sin[-2:] = 1.0, 0.0
    with pytest.raises(Unfit, match="layer 0"):
        reference.check(model, dataclasses.replace(decoder, rotary=(cos, sin)))


def test_what_cannot_be_described() -> None:
    model = families.build("llama")
    bound = bind(model)
    sites = bound.sites
    bound.release()
    with pytest.raises(Unfit, match="no layers"):
        describe(model, (), ModuleWeights(model), 64)
    fuse_projections(model)
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(Unfit, match="ReLU"):
        describe(model, sites, ModuleWeights(model), 64)


def _read_apart(model: PreTrainedModel, change: Callable[[], object] = lambda: None) -> Decoder:
    """The same as `_described`, of a model whose projections are left alone; `change` is called before it is read."""
    bound = bind(model)
    sites = bound.sites
    bound.release()
    change()
    return describe(model, sites, ModuleWeights(model), 64)


@pytest.mark.parametrize("name", ["llama", "qwen2", "granite", "gemma", "olmo2"])
def test_projections_that_are_not_joined_are_read_where_they_are(name: str) -> None:
    model = families.build(name)
    decoder = _read_apart(model)
    reference.check(model, decoder)
    assert decoder.separate
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    layer = decoder.layers[1]
    for linear, modules in (
        (layer.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.gate_up, (mlp.gate_proj, mlp.up_proj)),
    ):
        for part, weight, module in zip(linear.parts, dense_parts(linear), modules, strict=True):
            assert weight.data_ptr() == module.weight.data_ptr()
            assert (part.bias is None) == (module.bias is None)
            assert part.bias is None or part.bias.data_ptr() == module.bias.data_ptr()
    with pytest.raises(Unfit, match="not joined"):
        dense(layer.qkv)
    joined = _pair(name)[1]
    assert not joined.separate
    assert decoder.weight_bytes == joined.weight_bytes
    prompt = families.prompts_of((9,))[0]
    assert _greedy(decoder, prompt, 6) == _greedy(joined, prompt, 6)


def test_projections_that_lie_apart_and_differ_are_refused() -> None:
    model = families.build("qwen2")
    model.model.layers[0].self_attn.k_proj.bias = None
    with pytest.raises(Unfit, match="only some have a bias"):
        _read_apart(model)
    model = families.build("llama")
    with pytest.raises(Unfit, match="differ in their dtypes"):
        _read_apart(model, lambda: model.model.layers[0].mlp.up_proj.to(torch.bfloat16))
