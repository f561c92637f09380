"""Weights behind their contract: what a module's are, and what is refused."""

from __future__ import annotations

import families
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hybridgen.models import weights as weights_module
from hybridgen.models.projections import fuse_projections
from hybridgen.models.twin import twin
from hybridgen.models.weights import DenseWeight, ModuleWeights, Shard, WeightError, WeightFormat

QKV = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
DOWN = "model.layers.1.mlp.down_proj"


def joined() -> PreTrainedModel:
    """With biases, which are joined too."""
    model = families.build("qwen2")
    assert fuse_projections(model).groups
    return model


def linears(model: PreTrainedModel, names: list[str] = QKV) -> list[nn.Linear]:
    found = [model.get_submodule(name) for name in names]
    assert all(isinstance(each, nn.Linear) for each in found)
    return found  # type: ignore[return-value]


def random(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 3)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_is_a_linear_layers(rows: tuple[int, ...], has_bias: bool) -> None:
    linear = nn.Linear(12, 5, bias=has_bias)
    bias = linear.bias.detach() if has_bias else None
    x = random(*rows, 12)
    with torch.no_grad():
        assert torch.equal(DenseWeight(linear.weight).matmul(x, bias), linear(x))


def test_a_product_in_another_dtype_is_computed_in_that_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_PART", 24)  # two rows of the weight at a time
    values, bias, x = random(5, 12).bfloat16(), random(5).bfloat16(), random(3, 12)
    out = DenseWeight(values).matmul(x, bias)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x @ values.float().T + bias.float(), rtol=1e-6, atol=1e-6)


def test_a_product_compiles() -> None:
    weight, bias = DenseWeight(random(5, 12)), random(5)
    compiled = torch.compile(lambda x: weight.matmul(x, bias), backend="eager", fullgraph=True)
    for rows in (1, 4):
        assert torch.equal(compiled(random(rows, 12)), weight.matmul(random(rows, 12), bias))


def test_what_a_dense_weight_says_of_itself() -> None:
    weight = DenseWeight(random(5, 12).bfloat16())
    assert weight.shape == (5, 12)
    assert weight.bytes_read == 5 * 12 * 2
    assert weight.tensors()["values"] is weight.values
    assert weight.format == WeightFormat("dense", torch.bfloat16)
    assert str(weight.format) == "dense bfloat16"
    assert str(WeightFormat("int4", torch.bfloat16, (1, 128))) == "int4 bfloat16 in blocks of 1x128"


def test_one_projection_is_the_modules_own_storage() -> None:
    model = families.build("llama")
    weight = ModuleWeights(model).get([DOWN])
    assert weight.values.data_ptr() == linears(model, [DOWN])[0].weight.data_ptr()
    assert ModuleWeights(model).bias([DOWN]) is None


@pytest.mark.parametrize("may_copy", [False, True])
def test_joined_projections_are_one_weight_in_the_joined_storage(may_copy: bool) -> None:
    model = joined()
    provider = ModuleWeights(twin(model), may_copy=may_copy)
    q, k, v = linears(model)
    weight, bias = provider.get(QKV), provider.bias(QKV)
    assert bias is not None
    assert weight.values.data_ptr() == q.weight.data_ptr()
    assert bias.data_ptr() == q.bias.data_ptr()
    assert torch.equal(weight.values, torch.cat([q.weight, k.weight, v.weight]))
    assert torch.equal(bias, torch.cat([q.bias, k.bias, v.bias]))
    assert provider.get(QKV[1:2]).values.data_ptr() == k.weight.data_ptr()


def test_what_is_not_joined_is_copied_only_when_asked_to() -> None:
    model = families.build("qwen2")
    for wanted in (ModuleWeights(model).get, ModuleWeights(model).bias):
        with pytest.raises(WeightError, match="q_proj/k_proj/v_proj are not joined"):
            wanted(QKV)
    q, k, v = linears(model)
    copying = ModuleWeights(model, may_copy=True)
    assert torch.equal(copying.get(QKV).values, torch.cat([q.weight, k.weight, v.weight]))
    k.bias = None
    bias = copying.bias(QKV)
    assert bias is not None
    assert torch.equal(bias, torch.cat([q.bias, torch.zeros(k.out_features), v.bias]))


def test_another_order_is_not_the_joined_weight() -> None:
    model = joined()
    for order in (QKV[::-1], [QKV[0], QKV[2], QKV[1]], QKV[:2]):
        with pytest.raises(WeightError, match="joined in another order"):
            ModuleWeights(model).get(order)
    turned = ModuleWeights(model, may_copy=True).get(QKV[::-1])
    assert torch.equal(turned.values, torch.cat([each.weight for each in linears(model)[::-1]]))


def test_shards_put_together_are_the_whole() -> None:
    model = joined()
    plain, copying = ModuleWeights(model), ModuleWeights(model, may_copy=True)
    for axis in (0, 1):
        parts = [plain.get([DOWN], Shard(rank, 4, axis)).values for rank in range(4)]
        assert torch.equal(torch.cat(parts, axis), linears(model, [DOWN])[0].weight)
    assert copying.get([DOWN], Shard(1, 4, 1)).values.is_contiguous()
    with pytest.raises(WeightError, match="cannot be cut into 5"):
        plain.get([DOWN], Shard(0, 5))


def test_of_several_projections_a_rank_has_its_part_of_each() -> None:
    model = joined()
    plain, copying, mine = ModuleWeights(model), ModuleWeights(model, may_copy=True), Shard(1, 2)
    with pytest.raises(WeightError, match=r"not joined|one piece"):
        plain.get(QKV, mine)
    assert torch.equal(copying.get(QKV, mine).values, torch.cat([x.weight.chunk(2)[1] for x in linears(model)]))
    bias = copying.bias(QKV, mine)
    assert bias is not None
    assert torch.equal(bias, torch.cat([x.bias.chunk(2)[1] for x in linears(model)]))


def test_where_inputs_are_cut_the_bias_is_whole() -> None:
    model = joined()
    bias = ModuleWeights(model).bias(QKV[:1], Shard(1, 2, 1))
    assert bias is not None
    assert torch.equal(bias, linears(model)[0].bias)


class _OwnLinear(nn.Linear):
    pass


class _OwnParameter(nn.Parameter):
    pass


def _replaced(linear: nn.Linear, what: str) -> nn.Module:
    if what == "class":
        return _OwnLinear(4, 4)
    if what == "none":
        linear.register_parameter("weight", None)
    elif what == "parameter":
        linear.weight = _OwnParameter(linear.weight.detach())
    else:
        linear.weight = nn.Parameter(linear.weight.detach().to(getattr(torch, what)), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("class", "a _OwnLinear, not a plain nn.Linear"),
        ("none", "no weight"),
        ("parameter", "class _OwnParameter"),
        ("int8", "int8"),
        ("float8_e4m3fn", "float8"),
    ],
)
def test_what_is_no_plain_weight_is_refused(what: str, why: str) -> None:
    model = families.build("llama")
    model.model.layers[1].mlp.down_proj = _replaced(linears(model, [DOWN])[0], what)
    with pytest.raises(WeightError, match=rf"down_proj (is|has) .*{why}"):
        ModuleWeights(model).get([DOWN])


@pytest.mark.parametrize("name", ["model.nowhere", "model.norm", "model.embed_tokens"])
def test_what_is_no_projection_is_refused(name: str) -> None:
    with pytest.raises(WeightError, match=name):
        ModuleWeights(families.build("llama")).get([name])


def test_the_identity_is_that_of_every_fine_tune() -> None:
    first, second = families.build("llama"), families.build("llama")
    second.lm_head.weight.data.add_(1)
    assert ModuleWeights(first).identity == ModuleWeights(second).identity == "dense"
