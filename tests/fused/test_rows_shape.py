"""Which models and formats the kernel for several columns takes, and how it cuts them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from decoders import Shape, quantised_decoder, random_decoder

from hybridgen.fused.rows.formats import Format, Formats, stored
from hybridgen.fused.rows.shape import Tuning, as_document, check, default_tuning, largest, shape_of, shares, tiles
from hybridgen.kernels.linear.layout import Block
from hybridgen.models.decoder import Decoder, Linear, Unfit
from hybridgen.models.quantised import QuantisedWeight

SHAPE = Shape(hidden=1024, heads=16, kv_heads=4, head_dim=64, intermediate=1024, vocab=256, layers=1, max_context=8)
H200: dict[str, Any] = {"page_size": 64, "blocks": 132, "shared_memory": 227 * 1024}
DENSE = Format(16)
ALIKE = Formats.alike(DENSE)
GROUP = Block(1, 128)


def decoder(**changes: Any) -> Decoder:
    return random_decoder(dataclasses.replace(SHAPE, **changes), torch.bfloat16)


def sized(**changes: Any) -> Decoder:
    """Of other sizes, though its weights are not, where that takes time."""
    large = {name: size for name, size in changes.items() if name in ("hidden", "heads")}
    model = decoder(**{name: value for name, value in changes.items() if name not in large})
    return dataclasses.replace(model, **large)


def weight(kind: str, outputs: int = 8, inputs: int = 256, block: Block = GROUP, **changes: Any) -> Linear:
    data = torch.zeros(outputs, inputs // 8 if kind == "int4" else inputs, dtype=torch.int32)
    data = data if kind == "int4" else data.to(torch.float8_e4m3fn if kind == "fp8" else torch.int8)
    made = QuantisedWeight(kind, data, torch.rand(block.grid(outputs, inputs)), None, inputs, block, torch.bfloat16)
    return Linear(dataclasses.replace(made, **changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 32}, "32 dimensions; for several rows"),
        ({"hidden": 8448}, "hidden size 8448 is above 8192"),
        ({"heads": 132}, "attention size 8448 is above 8192"),
        ({"vocab": 257}, "vocabulary of 257 is odd"),
        ({"post_norms": True}, "what they add"),
    ],
)
def test_what_is_not_served_has_a_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        check(sized(**changes), 64, (9, 0))


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (weight("int8", zeros=torch.zeros(8, 2, dtype=torch.int16)), "with zero points"),
        (weight("fp8", block=Block(1, 96)), "8 bits in groups of 32, 64 or 128"),
        (weight("int8", inputs=192, block=Block(1, 128)), "8 bits in groups of 32, 64 or 128"),
        (weight("int4", zeros=torch.zeros(8, 2, dtype=torch.uint8)), "zero points and float32 scales"),
        (weight("int4", block=Block(1, 256)), "groups of 32, 64 or 128"),
    ],
)
def test_a_format_that_is_not_multiplied_has_a_reason(linear: Linear, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        stored(linear)


def test_weights_stay_where_they_are() -> None:
    model = quantised_decoder(decoder(), "int4")
    found = stored(model.layers[0].qkv)
    assert found.format == Format(4, 128, torch.bfloat16)
    assert found.data is model.layers[0].qkv.weight.data
    assert found.scales is model.layers[0].qkv.weight.scales
    assert stored(model.head).format == Format(8)


def test_zero_points_lie_beside_scales() -> None:
    linear = quantised_decoder(decoder(), "int4", zeros=True).layers[0].qkv
    found = stored(linear)
    assert found.format == Format(4, 128, torch.bfloat16, zeros=True)
    assert found.format.scale_bytes == 4
    assert torch.equal(found.scales[..., 0], linear.weight.scales)
    assert torch.equal(8 - found.scales[..., 1], linear.weight.zeros.to(torch.bfloat16))


def test_scales_of_fp8_are_one_for_each_output() -> None:
    for block in (Block(1, 256), Block(4, 256), Block(8, 256)):
        linear = weight("fp8", block=block)
        scales = stored(linear).scales
        assert scales.dtype is torch.float32
        assert torch.equal(scales, linear.weight.scales[:, 0].repeat_interleave(block.outputs))


def test_blocks_are_groups_of_each_output() -> None:
    for kind, block in (("fp8", Block(3, 128)), ("int8", Block(1, 64)), ("fp8", Block(8, 32))):
        linear = weight(kind, block=block)
        found = stored(linear)
        assert found.format == Format(8, block.inputs, torch.float32, integers=kind == "int8", grouped=True)
        assert found.data is linear.weight.data
        assert torch.equal(found.scales, linear.weight.scales.repeat_interleave(block.outputs, 0)[:8])
        assert found.scales.is_contiguous()


@pytest.mark.parametrize(
    ("inputs", "form", "reason"),
    [
        (2560, Format(8, 128, grouped=True), "8-bit weights in groups of 128"),
        (896, DENSE, "multiple of 256"),
        (11008, Format(4, 128), "multiple of 1024"),
        (4864, Format(4, 32), "pieces of 128 bytes"),
    ],
)
def test_sizes_that_the_warps_cannot_share_have_a_reason(inputs: int, form: Format, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        tiles("intermediate", inputs, form, 2048)


@pytest.mark.parametrize("inputs", [1024, 2048, 3072, 4096, 8192, 14336])
@pytest.mark.parametrize(
    "form",
    [
        *(DENSE, Format(8), Format(4), Format(4, 64), Format(4, 32, torch.float32), Format(4, zeros=True)),
        *(Format(8, 128, torch.float32, grouped=True), Format(8, 32, integers=True, grouped=True)),
    ],
)
def test_rows_lie_an_odd_multiple_of_16_bytes_apart(inputs: int, form: Format) -> None:
    cut = tiles("hidden", inputs, form, 2048)
    assert inputs * form.bits // 8 % cut.data == 0
    assert cut.stage // 16 // 16 % 2 == 1
    assert cut.scales % 16 == 0


def test_the_largest_part() -> None:
    assert [largest(256, 2048, size) for size in (14336, 8192, 11008, 5120)] == [2048, 2048, 256, 1280]


@pytest.mark.parametrize("blocks", [132, 144])
def test_shares_cover_all_rows_evenly(blocks: int) -> None:
    model = dataclasses.replace(
        decoder(), hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocab=128256
    )
    found = shares(model, blocks)
    assert [starts[-1] for starts in found] == [6144, 4096, 14336, 128256]
    counts = [np.diff(starts) for starts in found]
    assert all((each % 2 == 0).all() and each.max() - each.min() <= 2 for each in counts)
    assert counts[1].max() <= 32
    read = sum(each * cost for each, cost in zip(counts, (4096, 14336 + 4096, 2 * 4096), strict=False))
    assert read.max() < 1.01 * read.mean()


@pytest.mark.parametrize(("page_size", "box"), [(8, 8), (64, 64), (256, 64)])
def test_keys_and_values_come_in_boxes_of_a_page(page_size: int, box: int) -> None:
    """Stages begin where the copies' swizzle begins anew, and a box is within a page and within a stage."""
    model = dataclasses.replace(decoder(), heads=8, kv_heads=4, head_dim=128)
    found = shape_of(model, ALIKE, DENSE, Tuning(piece=2048), **{**H200, "page_size": page_size})
    assert found.box == box
    assert found.defines["STAGE"] % 1024 == 0
    assert 2 * 2 * 128 * found.box <= found.defines["STAGE"]


@pytest.mark.parametrize(("dim", "page_size", "box"), [(128, 8, 8), (128, 256, 128), (64, 16, 16), (64, 64, 64)])
def test_a_cache_of_8_bits_comes_in_boxes_of_whole_swizzles(dim: int, page_size: int, box: int) -> None:
    model = dataclasses.replace(decoder(), heads=8, kv_heads=4, head_dim=dim)
    found = shape_of(model, ALIKE, DENSE, Tuning(piece=2048), **{**H200, "page_size": page_size}, kv_bytes=1)
    assert (found.box, found.defines["KV8"]) == (box, 1)
    assert found.box * dim % 1024 == 0
    assert 2 * dim * found.box <= found.defines["STAGE"]


def test_pages_of_few_positions_do_not_fit_it() -> None:
    with pytest.raises(Unfit, match="pages of 8 positions in 8 bits"):
        shape_of(decoder(), ALIKE, DENSE, Tuning(), **{**H200, "page_size": 8}, kv_bytes=1)


def eight_rows(wide: bool) -> list[int]:
    """`Attention::order` of `columns.cuh` with KV8."""
    return [((i & 3) << 1) | (i >> 2) if wide else (i & 1) | ((i & 2) << 1) | ((i & 4) >> 1) for i in range(8)]


@pytest.mark.parametrize("dim", [64, 128])
def test_keys_and_values_of_8_bits_meet_no_bank_twice(dim: int) -> None:
    """Of 16 lanes that read 8 bytes of four keys each, and of eight that read 16 bytes of a value."""

    def place(position: int, chunk: int) -> int:  # `Row::chunk`
        row, first = position * dim // 128, position * dim % 128 // 16
        return row * 128 + (((first + chunk) ^ (row & 7)) << 4)

    order = eight_rows(dim == 128)
    assert sorted(order) == list(range(8))
    for part in range(dim // 32):
        for half in range(2):
            read = [place(order[4 * half + g], 2 * part + (t >> 1)) + (t & 1) * 8 for g in range(4) for t in range(4)]
            assert len({at // 8 % 16 for at in read}) == 16
    for chunk in range(dim // 16):
        assert len({place(order[i], chunk) // 16 % 8 for i in range(8)}) == 8


def test_dimensions_of_weighed_values_of_8_bits_are_all_there() -> None:
    for dim in (64, 128):
        found = {32 * (d // 4) + 16 * (d & 1) + 2 * g + (d // 2 & 1) for d in range(dim // 8) for g in range(8)}
        assert found == set(range(dim))


def test_a_device_may_be_too_small() -> None:
    model = decoder()
    with pytest.raises(Unfit, match="rows for each of 8 blocks"):
        shape_of(model, ALIKE, DENSE, Tuning(), **{**H200, "blocks": 8})
    with pytest.raises(Unfit, match="stages"):
        shape_of(model, ALIKE, DENSE, Tuning(), **{**H200, "shared_memory": 48 * 1024})
    for bits in (4, 8):
        with pytest.raises(Unfit, match=f"head has {bits} bits in groups"):
            shape_of(model, ALIKE, Format(bits, grouped=True), Tuning(), **H200)


@pytest.mark.parametrize("changes", [{"hidden": 5120}, {"heads": 64, "head_dim": 128}])
def test_more_than_4096_inputs_are_taken_in_int4(changes: dict[str, Any]) -> None:
    """All of them are in registers then, of other weights at most as many as before."""
    model = dataclasses.replace(decoder(), **changes)
    with pytest.raises(Unfit, match="above 4096, and its weights are not int4"):
        shape_of(model, Formats.alike(Format(8)), DENSE, Tuning(), **H200)
    found = shape_of(dataclasses.replace(model, intermediate=8192), Formats.alike(Format(4)), DENSE, Tuning(), **H200)
    assert found.defines["STAGES"] >= 3
    assert tiles("hidden", 8192, Format(4), 2048).data == 1024
    assert tiles("hidden", 8192, Format(4), 2048, 8192).data == 2048


@pytest.mark.parametrize(("heads", "kv_heads", "expected"), [(32, 8, 2), (28, 4, 1), (24, 8, 3), (20, 4, 1)])
def test_heads_of_a_unit_fit_where_warps_put_them_together(heads: int, kv_heads: int, expected: int) -> None:
    model = dataclasses.replace(decoder(hidden=1024), heads=heads, kv_heads=kv_heads, head_dim=128)
    assert shape_of(model, ALIKE, DENSE, Tuning(), **H200).unit_heads == expected


def test_a_tuning_is_a_document() -> None:
    tuning = default_tuning(decoder())
    assert Tuning(**as_document(tuning)) == tuning
