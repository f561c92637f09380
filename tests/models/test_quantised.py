"""Quantised weights behind the contract of weights, and the modules that hold them."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from torch import nn

from hybridgen.kernels.linear import layout
from hybridgen.kernels.linear.layout import Block
from hybridgen.models.projections import fuse_projections, unfuse_projections
from hybridgen.models.quantised import QuantisedLinear, QuantisedWeight, stack, why_not_stacked
from hybridgen.models.rounding import quantise
from hybridgen.models.twin import twin
from hybridgen.models.weights import ModuleWeights, Shard, WeightError, WeightFormat

QKV = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]


def random(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def make(kind: str, outputs: int = 24, inputs: int = 70, dtype: torch.dtype = torch.float32) -> QuantisedWeight:
    """Of random codes, with zero points where the kind has them."""
    g = torch.Generator().manual_seed(outputs + inputs)
    width = -(-inputs // layout.codes_per_item(kind))
    block = Block(8, 16) if kind == "fp8" else Block(1, 32 if kind == "mxfp4" else 16)
    grid = block.grid(outputs, inputs)
    scales = torch.rand(grid, generator=g) + 0.5
    zeros = None
    if kind == "int4":
        data = torch.randint(-(2**31), 2**31, (outputs, width), generator=g).int()
        zeros = torch.randint(0, 16, grid, generator=g, dtype=torch.uint8)
    elif kind == "int8":
        data = torch.randint(-128, 128, (outputs, width), generator=g, dtype=torch.int8)
        zeros = torch.randint(-128, 128, grid, generator=g, dtype=torch.int16)
    elif kind == "fp8":
        data = torch.randn(outputs, width, generator=g).to(torch.float8_e4m3fn)
    else:
        data = torch.randint(0, 256, (outputs, width), generator=g, dtype=torch.uint8)
        scales = torch.randint(120, 130, grid, generator=g, dtype=torch.uint8)
    assert layout.problem(kind, data, scales, zeros, inputs, block) is None
    return QuantisedWeight(kind, data, scales, zeros, inputs, block, dtype)


@pytest.mark.parametrize("kind", layout.KINDS)
def test_values_are_those_of_the_definition(kind: str) -> None:
    weight = make(kind)
    values = weight.dequantise()
    table = [*layout.E2M1, *(-value for value in layout.E2M1)]
    for n, k in ((0, 0), (3, 1), (17, 69), (23, 33), (9, 16)):
        at = n // weight.block.outputs, k // weight.block.inputs
        zero = 0 if weight.zeros is None else int(weight.zeros[at])
        if kind == "int4":
            place = k % 8 // 2 + 4 * (k % 2)
            code: float = (int(weight.data[n, k // 8]) >> 4 * place) & 15
        elif kind == "mxfp4":
            code = table[(int(weight.data[n, k // 2]) >> 4 * (k % 2)) & 15]
        else:
            code = float(weight.data[n, k])
        scale = 2.0 ** (int(weight.scales[at]) - 127) if kind == "mxfp4" else float(weight.scales[at])
        assert float(values[n, k]) == pytest.approx((code - zero) * scale, rel=1e-7)


@pytest.mark.parametrize("kind", layout.KINDS)
def test_large_weights_are_dequantised_in_parts_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make(kind, outputs=37)
    whole = weight.dequantise()
    monkeypatch.setattr(layout, "_PART", 70 * 16)
    assert torch.equal(weight.dequantise(), whole)
    assert weight.dequantise(torch.bfloat16).dtype == torch.bfloat16


def test_int4_survives_packing() -> None:
    codes = torch.randint(0, 16, (5, 21), generator=torch.Generator().manual_seed(0))
    packed = layout.pack_int4(codes)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, 3)
    assert torch.equal(layout.unpack_int4(packed, 21), codes.int())
    ordered = layout.pack_int4(codes, layout.IN_ORDER)
    assert int(ordered[0, 0]) & 0xFF == int(codes[0, 0]) + 16 * int(codes[0, 1])
    assert torch.equal(layout.interleave(ordered), packed)


@pytest.mark.parametrize("kind", layout.KINDS)
@pytest.mark.parametrize("rows", [(), (1,), (2, 3)])
def test_a_product_is_that_of_the_values(kind: str, rows: tuple[int, ...]) -> None:
    weight, x, bias = make(kind), random(*rows, 70), random(24)
    wanted = nn.functional.linear(x, weight.dequantise(), bias)
    assert torch.equal(weight.matmul(x, bias), wanted)
    module = QuantisedLinear(70, 24, bias=True)
    module.fill(weight)
    module.bias = nn.Parameter(bias)
    with torch.no_grad():
        assert torch.equal(module(x), wanted)
        module.dequantises = True
        assert torch.equal(module(x), wanted)


def test_a_module_compiles_for_any_number_of_rows() -> None:
    module = QuantisedLinear(70, 24, bias=False)
    module.fill(make("int4"))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 5):
        with torch.no_grad():
            assert torch.equal(compiled(random(rows, 70)), module(random(rows, 70)))


def test_what_a_weight_says_of_itself() -> None:
    weight = make("int4", dtype=torch.bfloat16)
    assert weight.shape == (24, 70)
    assert weight.bytes_read == 24 * 9 * 4 + 24 * 5 * 4 + 24 * 5
    assert weight.format == WeightFormat("int4", torch.bfloat16, (1, 16))
    assert set(weight.tensors()) == {"data", "scales", "zeros"}
    assert set(make("fp8").tensors()) == {"data", "scales"}


@pytest.mark.parametrize("kind", layout.KINDS)
def test_rows_and_columns_are_views_of_the_same_values(kind: str) -> None:
    weight = make(kind, inputs=96)
    values = weight.dequantise()
    rows, columns = weight.rows(8, 24), weight.columns(32, 64)
    assert torch.equal(rows.dequantise(), values[8:24])
    assert torch.equal(columns.dequantise(), values[:, 32:64])
    for part in (rows, columns):
        assert part.data.untyped_storage().data_ptr() == weight.data.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="blocks of"):
        weight.columns(0, 33)


def test_stacked_weights_keep_their_values() -> None:
    for kind in layout.KINDS:
        parts = [make(kind, outputs) for outputs in (24, 16, 21)]
        if kind == "fp8":  # the last one does not end with a block
            assert stack(parts[:2]).block == Block(8, 16)
            assert stack(parts).block == Block(1, 16)
        assert torch.equal(stack(parts).dequantise(), torch.cat([part.dequantise() for part in parts]))


def test_what_cannot_be_stacked() -> None:
    weight = make("int8")
    assert why_not_stacked([weight, make("int8", 8)]) is None
    assert "input sizes" in str(why_not_stacked([weight, make("int8", 8, 71)]))
    assert "formats differ" in str(why_not_stacked([weight, make("int4")]))
    without = QuantisedWeight("int8", weight.data, weight.scales, None, 70, weight.block, weight.dtype)
    assert "zero points" in str(why_not_stacked([weight, without]))


def quantised(family: str = "qwen2", kind: str = "int8") -> nn.Module:
    """A model whose projections are quantised where they are."""
    model = families.build(family)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            place = QuantisedLinear(linear.in_features, linear.out_features, bias=False)
            place.bias = linear.bias
            place.fill(quantise(linear.weight.detach(), kind, torch.float32, group=32))
            model.set_submodule(name, place)
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_joined_projections_compute_the_same(kind: str) -> None:
    """With biases; also through a twin, which has the same storage."""
    model = quantised(kind=kind)
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits
    values = [model.get_submodule(name).weight_stored.dequantise() for name in QKV]
    assert len(fuse_projections(model).groups) == 8
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    other = twin(model)
    assert torch.equal(other(ids).logits, model(ids).logits)
    for each in (model, other):
        weight = ModuleWeights(each).get(QKV)
        assert torch.equal(weight.dequantise(), torch.cat(values))
        assert weight.data is model.get_submodule(QKV[0]).data
        for name, value in zip(QKV, values, strict=True):
            assert torch.equal(ModuleWeights(each).get([name]).dequantise(), value)
        bias = ModuleWeights(each).bias(QKV)
        assert torch.equal(bias, torch.cat([model.get_submodule(name).bias for name in QKV]))
    assert unfuse_projections(model) == 8
    assert {type(model.get_submodule(name)) for name in QKV} == {QuantisedLinear}
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


def test_projections_of_different_formats_stay_apart() -> None:
    model = quantised()
    place = model.get_submodule(QKV[1])
    place.fill(quantise(place.weight_stored.dequantise(), "fp8", torch.float32))
    report = fuse_projections(model)
    [skipped] = report.skipped
    assert "formats differ" in skipped.reason
    with pytest.raises(WeightError, match="not joined"):
        ModuleWeights(model).get(QKV)
    with pytest.raises(WeightError, match="cannot be stacked: formats differ"):
        ModuleWeights(model, may_copy=True).get(QKV)


def test_a_ranks_part() -> None:
    model = quantised(kind="int4")
    whole = ModuleWeights(model).get([QKV[0]]).dequantise()
    assert torch.equal(ModuleWeights(model).get([QKV[0]], Shard(1, 2)).dequantise(), whole[32:])
    assert torch.equal(ModuleWeights(model).get([QKV[0]], Shard(1, 2, axis=1)).dequantise(), whole[:, 32:])
    with pytest.raises(WeightError, match="cannot be cut into 4 parts: inputs 16 to 32"):
        ModuleWeights(model).get([QKV[0]], Shard(1, 4, axis=1))


def test_the_identity_names_formats_and_no_values() -> None:
    one, other = quantised(kind="fp8"), quantised(kind="fp8")
    other.get_submodule(QKV[0]).scales.mul_(2)
    identity = ModuleWeights(one).identity
    assert identity == ModuleWeights(other).identity
    assert identity not in (ModuleWeights(quantised(kind="int8")).identity, "dense")


def test_a_cast_leaves_codes_and_scales_as_they_are() -> None:
    module = QuantisedLinear(70, 24, bias=True)
    module.fill(make("fp8"))
    cast = copy.deepcopy(module).to(torch.bfloat16)
    assert cast.data.dtype == torch.float8_e4m3fn
    assert cast.scales.dtype == torch.float32
    assert cast.bias is not None
    assert cast.bias.dtype == torch.bfloat16


def test_a_weight_of_another_size_is_not_taken() -> None:
    with pytest.raises(ValueError, match="in place of"):
        QuantisedLinear(70, 25, bias=False).fill(make("int8"))
