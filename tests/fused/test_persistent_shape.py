"""Which models the persistent kernel takes, and that it compiles for them; nothing here runs it."""

from __future__ import annotations

import dataclasses
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders import Shape, in_parts, random_decoder
from nvrtc import needs_nvrtc

from hybridgen.cache import LayerPages
from hybridgen.device import program
from hybridgen.fused.persistent.shape import (
    Tuning,
    as_document,
    check,
    default_tuning,
    inbox_bytes,
    peers,
    shape_of,
)
from hybridgen.fused.persistent.step import ONE_ROW, _packed_layer
from hybridgen.models.decoder import Decoder, Norm, Unfit, dense

SHAPE = Shape(hidden=256, heads=8, kv_heads=2, head_dim=64, intermediate=512, max_context=8)
H200 = {"page_size": 64, "blocks": 132, "shared_memory": 227 * 1024}


def decoder(**changes: Any) -> Decoder:
    return random_decoder(dataclasses.replace(SHAPE, **changes), torch.bfloat16)


def shared(ranks: int) -> Decoder:
    """Rank 1's share of some model."""
    return dataclasses.replace(decoder(), share=SimpleNamespace(rank=1, size=ranks))


def with_layer(model: Decoder, **changes: Any) -> Decoder:
    first = dataclasses.replace(model.layers[0], **changes)
    return dataclasses.replace(model, layers=(first, *model.layers[1:]))


def test_a_llama_is_served() -> None:
    check(decoder(), 64, (9, 0))
    check(decoder(head_norm="head", biases=("qkv",), windows=(0, 8), rotates=(True, False)), 16, (10, 0))


@pytest.mark.parametrize(
    ("model", "page_size", "capability", "reason"),
    [
        (decoder(), 64, (8, 0), "compute capability 8.0"),
        (dataclasses.replace(decoder(), dtype=torch.float32), 64, (9, 0), "float32"),
        (decoder(head_dim=48), 64, (9, 0), "48 dimensions"),
        (decoder(post_norms=True), 64, (9, 0), "what they add"),
        (decoder(head_norm="all"), 64, (9, 0), "spans all heads"),
        (with_layer(decoder(head_norm="head"), key_norm=None), 64, (9, 0), "only one of queries and keys"),
        (with_layer(decoder(), attention_scale=0.5), 64, (9, 0), "multipliers"),
        (with_layer(decoder(), before_mlp=Norm(torch.ones(256), 0.1)), 64, (9, 0), "epsilon"),
        (decoder(hidden=252), 64, (9, 0), "hidden size 252"),
        (decoder(intermediate=516), 64, (9, 0), "intermediate size 516"),
        (decoder(), 48, (9, 0), "page_size=48"),
    ],
)
def test_what_is_not_served_has_a_reason(
    model: Decoder, page_size: int, capability: tuple[int, int], reason: str
) -> None:
    with pytest.raises(Unfit, match=reason):
        check(model, page_size, capability)


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, {"blocks": 4}, "8 query heads"),
        ({}, {"shared_memory": 48 * 1024}, "stages"),
        ({"intermediate": 65536}, {}, "stages"),
    ],
)
def test_a_device_may_be_too_small(changes: dict[str, Any], device: dict[str, int], reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        shape_of(dataclasses.replace(decoder(), **changes), Tuning(), **{**H200, **device})


def test_stages_hold_a_row_and_fit_the_shared_memory() -> None:
    for changes in ({}, {"intermediate": 11008}, {"intermediate": 18944}):
        shape = shape_of(decoder(**changes), Tuning(stage=16384), **H200)
        assert shape.shared_bytes == shape.defines["STAGES"] * shape.defines["STAGE"] + shape.defines["SHARED"]
        assert shape.shared_bytes <= H200["shared_memory"]
        assert shape.defines["STAGE"] >= 2 * changes.get("intermediate", 512)


def test_a_packed_layer_names_every_part_where_it_lies() -> None:
    model = decoder(biases=("qkv", "gate_up"))
    apart = in_parts(model)
    pages = LayerPages(torch.zeros(1), torch.zeros(1))
    joined, parts = (
        struct.unpack(f"<14Q2i{6 if each.separate else 0}Q", _packed_layer(each, each.layers[0], pages))
        for each in (model, apart)
    )
    layer = apart.layers[0]
    (q, k, v), (gate, up) = layer.qkv.parts, layer.gate_up.parts
    assert [parts[4], parts[6], *parts[16:19]] == [x.weight.tensors()["values"].data_ptr() for x in (q, gate, k, v, up)]
    assert [parts[8], parts[10], *parts[19:]] == [x.bias.data_ptr() for x in (q, gate, k, v, up)]  # type: ignore[union-attr]
    others = [i for i in range(16) if i not in (4, 6, 8, 10)]
    assert [joined[i] for i in others] == [parts[i] for i in others]
    # In a model of which only some layers' projections lie apart, joined ones are named by where each begins.
    mixed = dataclasses.replace(model, layers=(model.layers[0], apart.layers[1]))
    check(mixed, 64, (9, 0))
    packed = struct.unpack("<14Q2i6Q", _packed_layer(mixed, mixed.layers[0], pages))
    qkv, gate_up = dense(model.layers[0].qkv), dense(model.layers[0].gate_up)
    assert packed[:16] == joined
    assert packed[16:19] == (qkv[512:].data_ptr(), qkv[640:].data_ptr(), gate_up[512:].data_ptr())


def test_the_long_way_needs_heads_that_share_keys() -> None:
    assert shape_of(decoder(), Tuning(), **H200).has_long
    assert not shape_of(decoder(kv_heads=8), Tuning(), **H200).has_long
    assert not shape_of(decoder(head_dim=32), Tuning(), **H200).has_long


def test_a_tuning_is_a_document() -> None:
    tuning = default_tuning(decoder(), 132)
    assert Tuning(**as_document(tuning)) == tuning


@needs_nvrtc
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_norm": "head", "biases": ("qkv", "out", "gate_up", "down"), "head_dim": 128, "kv_heads": 4},
        {"hidden": 264, "intermediate": 1032, "head_dim": 256, "activation": "gelu_tanh", "kv_heads": 8},
        {"hidden": 896, "heads": 14, "intermediate": 4864, "head_dim": 32},
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_compiles_without_a_gpu(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = dataclasses.replace(decoder(**changes), dtype=dtype)
    shape = shape_of(model, default_tuning(model, 132), **H200)
    assert program.machine_code(shape.defines, (9, 0), ONE_ROW).startswith(b"\x7fELF")


@needs_nvrtc
def test_a_ranks_share_compiles_to_a_kernel_of_its_own() -> None:
    shapes = [shape_of(each, default_tuning(each, 132), **H200) for each in (decoder(), shared(2), shared(8))]
    assert [shape.defines["RANKS"] for shape in shapes] == [1, 2, 8]
    assert len({program.compile_cubin(shape.defines, "sm_90a", ONE_ROW) for shape in shapes}) == 3


def test_partial_sums_have_a_place_for_each_rank_and_projection() -> None:
    model = shared(4)
    assert inbox_bytes(model, 1) == 2 * 4 * 256 * 8
    assert inbox_bytes(model, 8) == 8 * inbox_bytes(model, 1)
    assert inbox_bytes(decoder(), 1) == 0
    assert peers(model, [10, 20, 30, 40]) == [1, 10, 20, 30, 40]
    assert peers(decoder(), []) == []
    with pytest.raises(Unfit, match="not mapped"):
        peers(model, [])


@needs_nvrtc
def test_projections_that_lie_apart_compile_to_another_kernel() -> None:
    model = decoder(biases=("qkv", "gate_up"))
    shapes = [shape_of(each, default_tuning(each, 132), **H200) for each in (model, in_parts(model))]
    assert [shape.defines["SEPARATE"] for shape in shapes] == [0, 1]
    cubins = [program.compile_cubin(shape.defines, "sm_90a", ONE_ROW) for shape in shapes]
    assert cubins[0] != cubins[1]


@needs_nvrtc
def test_a_shape_that_the_kernel_refuses_has_the_compilers_words() -> None:
    shape = shape_of(decoder(), Tuning(), **H200)
    with pytest.raises(Unfit, match="does not compile"):
        program.compile_cubin({**shape.defines, "SHARED": 16}, "sm_90a", ONE_ROW)


@needs_nvrtc
def test_a_key_names_constants_and_architecture() -> None:
    shape = shape_of(decoder(), Tuning(), **H200)
    keys = {
        program.key(shape.defines, "sm_90a", ONE_ROW),
        program.key(shape.defines, "sm_100a", ONE_ROW),
        program.key({**shape.defines, "LAYERS": 3}, "sm_90a", ONE_ROW),
    }
    assert len(keys) == 3
    assert program.key(dict(reversed(shape.defines.items())), "sm_90a", ONE_ROW) in keys


def test_machine_code_is_asked_for_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "compile_cubin", lambda *arguments: repr(arguments).encode())
    monkeypatch.setattr(program, "key", lambda *arguments: repr(arguments))
    assert program.machine_code({"A": 1}, (8, 0), ONE_ROW) == repr(({"A": 1}, "sm_80", ONE_ROW)).encode()
    made = program.machine_code({"A": 1}, (9, 0), ONE_ROW, lambda key, make: key.encode() + b" " + make())
    assert made.split(b" Program")[0] == b"({'A': 1}, 'sm_90a',"
    assert made.count(b"sm_90a") == 2
