"""Formats of weights in the kernel for several columns: which ones a model has, and what their codes stand for."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
import torch
from decoders import Shape, make_context, mixed_decoder, quantised_decoder, random_decoder

from hybridgen.fused.rows.formats import PROJECTIONS, Format, Formats, Stored, formats_of, stored
from hybridgen.fused.rows.shape import Tuning, shape_of, tiles
from hybridgen.fused.rows.step import _packed_layer
from hybridgen.kernels.linear.layout import unpack_e2m1
from hybridgen.models.decoder import Decoder, Unfit

SHAPE = Shape(hidden=128, heads=2, kv_heads=1, head_dim=64, intermediate=128, vocab=8, layers=3, max_context=8)
READS = Shape(hidden=1024, heads=1, kv_heads=1, head_dim=16, intermediate=16, vocab=8, layers=1, max_context=8)
DENSE, INT4 = Format(16), Format(4)
H200: dict[str, Any] = {"page_size": 64, "blocks": 132, "shared_memory": 227 * 1024}


def decoder(kind: str = "", shape: Shape = SHAPE, group: int = 0, **how: Any) -> Decoder:
    model = random_decoder(shape, torch.bfloat16)
    return quantised_decoder(model, kind, group, "dense", **how) if kind else model


def weights_of(model: Decoder) -> list[list[Stored]]:
    return [[stored(getattr(layer, name)) for name in PROJECTIONS] for layer in model.layers]


def test_one_format_needs_no_other() -> None:
    found = formats_of(weights_of(decoder("int4")))
    assert found == Formats.alike(INT4)
    assert not found.are_several
    assert found.defines() == {"FORMATS": ",".join([str(INT4.code)] * 4)}


def test_dense_layers_beside_int4_ones() -> None:
    """A layer of the less usual format says so of each projection; all words are fp16 then."""
    mixed = mixed_decoder(decoder("int4"), decoder(), lambda index, name: index == 0 or (index == 2 and name == "down"))
    found = formats_of(weights_of(mixed))
    assert found.usual == (INT4, INT4, INT4, DENSE)
    assert found.other == (DENSE, DENSE, DENSE, INT4)
    assert found.others == (0b0111, 0b1000, 0b0000)
    code, dense = str(INT4.code), str(16 + 2048)
    assert found.defines() == {
        "FORMATS": ",".join([code] * 3 + [dense]),
        "OTHER_FORMATS": ",".join([dense] * 3 + [code]),
    }


def test_attention_and_mlp_may_have_formats_of_their_own() -> None:
    mixed = mixed_decoder(decoder("int4"), decoder("fp8"), lambda _, name: name in ("qkv", "out"))
    found = formats_of(weights_of(mixed))
    assert found.usual == found.other == (Format(8), Format(8), INT4, INT4)
    assert not found.others
    assert "OTHER_FORMATS" not in found.defines()


def test_a_projection_has_two_formats_at_most() -> None:
    mixed = mixed_decoder(decoder("int4"), decoder(), lambda index, _: index == 0)
    mixed = mixed_decoder(mixed, decoder("fp8"), lambda index, name: index == 1 and name == "gate_up")
    with pytest.raises(Unfit, match="its gate_up projections have 3 formats"):
        formats_of(weights_of(mixed))


def test_a_layers_description_names_its_formats() -> None:
    model = mixed_decoder(decoder("int4"), decoder(), lambda index, _: index == 0)
    pages, weights = make_context(model, [1]).pages, weights_of(model)
    others = formats_of(weights).others
    rows = [
        struct.unpack("<21Q", _packed_layer(layer, tuple(parts), kept, others[i : i + 1]))
        for i, (layer, parts, kept) in enumerate(zip(model.layers, weights, pages, strict=True))
    ]
    assert [row[-1] for row in rows] == [15, 0, 0]
    assert rows[0][4] == model.layers[0].qkv.weight.values.data_ptr()
    assert rows[1][13] == weights[1][3].data.data_ptr()
    assert len(_packed_layer(model.layers[0], tuple(weights[0]), pages[0], ())) == 20 * 8


def test_stages_hold_tiles_of_all_formats() -> None:
    """The largest tile decides, and how many inputs a projection has counts for its own formats alone."""
    model = dataclasses.replace(decoder(), hidden=4096, heads=32, head_dim=128, kv_heads=8, intermediate=14336)
    both = Formats((INT4,) * 4, (DENSE,) * 4, (15, 0, 0))
    mix = shape_of(model, both, DENSE, Tuning(), **H200)
    apart = [shape_of(model, Formats.alike(form), DENSE, Tuning(), **H200).defines["STAGE"] for form in (INT4, DENSE)]
    assert mix.defines["STAGE"] == max(apart)
    narrow = dataclasses.replace(model, intermediate=11008)
    with pytest.raises(Unfit, match="intermediate size 11008 is no multiple of 1024"):
        shape_of(narrow, both, DENSE, Tuning(), **H200)
    shape_of(narrow, Formats((INT4, INT4, INT4, DENSE), (DENSE,) * 4, (7, 0, 0)), DENSE, Tuning(), **H200)
    with pytest.raises(Unfit, match="above 4096, and its weights are not int4"):
        shape_of(dataclasses.replace(model, hidden=5120), both, DENSE, Tuning(), **H200)


def test_mxfp4_is_cut_where_its_scales_can_be_copied() -> None:
    form = Format(4, 32, torch.uint8)
    assert form.is_mxfp4
    assert form.code == 4 + 1024 + 4096
    assert form.scale_bytes == 1
    for inputs in (512, 4096, 14336):
        assert tiles("hidden", inputs, form, 2048).scales % 16 == 0
    with pytest.raises(Unfit, match="is no multiple of 512"):
        tiles("hidden", 1280, form, 2048)


def test_formats_have_numbers_of_their_own() -> None:
    found = [Format(16), Format(8), Format(8, integers=True), Format(8, grouped=True)]
    found += [Format(8, integers=True, grouped=True), INT4, Format(4, zeros=True), Format(4, 64)]
    found += [Format(4, 32, torch.float16), Format(4, 32, torch.float32), Format(4, 32, torch.uint8)]
    assert [form.code for form in found[:3]] == [16, 8, 40]
    assert len({form.code for form in found}) == len(found)
    assert [form.code & 31 for form in found] == [form.bits for form in found]
    assert [form.code >> 12 for form in found] == [form.group // 32 if form.has_groups else 0 for form in found]


def place(bits: int, pair: int) -> int:
    """`Pairs::place` of `pairs.cuh`."""
    if bits == 16:
        return (pair & 3) << 2 | pair >> 2
    return ((pair >> 1) & 3) << 2 | (pair >> 3) << 1 | pair & 1 if bits == 8 else pair


def halves(words: np.ndarray, low: int, high: int) -> np.ndarray:
    """`__byte_perm`: two bytes of a word, each as the upper half of an fp16 number."""
    parts = [((words >> (8 * byte) & 255) << 8).astype(np.uint16) for byte in (low, high)]
    return np.stack(parts, -1).view(np.float16).astype(np.float64)


def values_of(found: Stored, q: np.ndarray) -> np.ndarray:
    """The codes of words [..., halves of 32 bytes, lanes] as products take them: [..., lanes, words, 2]."""
    form = found.format
    if form.bits == 16:
        bits = torch.from_numpy(q.view(np.int16).reshape(*q.shape, 2))
        pairs = [bits.view(found.data.dtype).double().numpy()]
    elif form.bits == 8:
        codes = torch.from_numpy(q.view(np.uint8).reshape(*q.shape, 4))
        codes = codes.view(torch.int8 if form.integers else torch.float8_e4m3fn).double().numpy()
        pairs = [codes[..., :2], codes[..., 2:]]
    elif form.is_mxfp4:
        even = (q << 4) & 0x80808080 | (q << 1) & 0x0E0E0E0E  # `e2m1_even`
        odd = q & 0x80808080 | (q >> 3) & 0x0E0E0E0E
        pairs = [halves(each, *two) * 2.0**14 for each in (even, odd) for two in ((0, 1), (2, 3))]
    else:
        at = [(4 * i, 4 * i + 16) for i in range(4)]
        pairs = [np.stack([(q >> shift & 15).astype(np.float64) - 8 for shift in two], -1) for two in at]
    found_values = np.stack(pairs, -2)  # [..., halves, lanes, words of a half, 2]
    return np.moveaxis(found_values, -4, -3).reshape(*q.shape[:-2], 4, -1, 2)


def as_the_kernel(found: Stored, x: np.ndarray, piece: int) -> np.ndarray:
    """A projection of activations [inputs]: `multiply_stage` of `products.cuh` over all stages, warps and lanes."""
    form, outputs = found.format, found.data.shape[0]
    data = found.data.contiguous().view(torch.uint8).reshape(outputs, -1).numpy()
    cut = tiles("any", len(x), form, piece)
    words = np.zeros((len(x) // 32, 16, 2))
    for pair in range(16):
        words[:, place(form.bits, pair)] = x.reshape(-1, 32)[:, 2 * pair : 2 * pair + 2]
    words = words.reshape(-1, 4, 4, 2)  # blocks of 32 inputs, lanes
    if form.is_mxfp4:  # `Activations::decode`
        first, second = words[..., 0], words[..., 1]
        words = np.stack(
            [first[..., :2], first[..., 2:], second[..., :2], second[..., 2:]], -2
        )  # fmt: skip
    stages = data.shape[1] // cut.data
    q = data.reshape(outputs, stages, 8, -1, 2, 4, 4).view(np.uint32)[
        ..., 0
    ]  # stages, warps, 32 bytes, 16 bytes, lanes
    values = values_of(found, q)  # [outputs, stages, warps, reads, lanes, words, 2]
    theirs = words.reshape(stages, 8, -1, 4, 4, 2)  # blocks of a warp in a stage, by lane
    theirs = np.moveaxis(theirs, 3, 2).reshape(stages, 8, 4, -1, 2)  # by lane all words of a stage
    ours = np.moveaxis(values, 4, 3).reshape(outputs, stages, 8, 4, -1, 2)
    products = (ours * theirs).sum(-1)
    if not form.has_groups:
        scales = 1.0 if found.scales is None else found.scales.double().numpy()
        return products.reshape(outputs, -1).sum(-1) * scales
    groups = products.reshape(outputs, stages, 8, 4, -1, form.group // 8).sum((3, -1)).reshape(outputs, -1)
    assert found.scales is not None
    scales = found.scales
    if form.is_mxfp4:
        by = (scales.numpy().astype(np.uint32) << 23).view(np.float32).astype(np.float64)
    elif form.zeros:
        sums = (theirs.sum(-1)).reshape(stages, 8, 4, -1, form.group // 8).sum((2, -1)).reshape(-1)
        by, above = scales[..., 0].double().numpy(), scales[..., 1].double().numpy()
        groups = groups + above * sums
    else:
        by = scales.double().numpy()
    return (by * groups).sum(-1)


KINDS: list[dict[str, Any]] = [
    {},
    {"kind": "fp8"},
    {"kind": "int8"},
    {"kind": "int8", "group": 64},
    {"kind": "int4"},
    {"kind": "int4", "zeros": True},
    {"kind": "int4", "group": 32},
    {"kind": "mxfp4"},
]


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_codes_meet_the_activations_of_their_inputs(how: dict[str, Any]) -> None:
    """As the kernel takes them out of a stage, the bytes of a weight are the numbers that it stands for."""
    layer = decoder(shape=READS, **how).layers[0]
    for linear in (layer.qkv, layer.gate_up):
        outputs, inputs = linear.weight.shape
        x = np.random.default_rng(0).standard_normal(inputs)
        expected = linear.weight.matmul(torch.eye(inputs)).T.double().numpy() @ x
        for piece in (512, 1024, 2048):
            found = as_the_kernel(stored(linear), x, piece)
            assert found.shape == (outputs,)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_every_code_of_e2m1_is_exact() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    q = codes.numpy().view(np.uint32).reshape(1, 1, 1, 8, 2, 4)
    weight = Stored(Format(4, 32, torch.uint8), codes, None)
    found = values_of(weight, q)[0, 0, 0].reshape(8, 4, 2, 4, 2)  # reads, lanes, halves, words
    pairs = [(0, 2), (4, 6), (1, 3), (5, 7)]
    for word, inputs in enumerate(pairs):
        for half, at in enumerate(inputs):
            theirs = unpack_e2m1(codes[None], 512).reshape(8, 2, 4, 8)[..., at].transpose(1, 2).numpy()
            assert np.array_equal(found[..., word, half], theirs)
