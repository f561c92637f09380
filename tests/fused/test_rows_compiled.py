"""That the kernel for several columns compiles for each format and mix of them, and keeps nothing in local memory."""

from __future__ import annotations

import dataclasses
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders import Shape, mixed_decoder, quantised_decoder, random_decoder
from nvrtc import needs_nvrtc

from hybridgen.device import program
from hybridgen.fused.persistent.step import ONE_ROW
from hybridgen.fused.rows.formats import PROJECTIONS, Format, Formats, formats_of, stored
from hybridgen.fused.rows.shape import default_tuning, shape_of
from hybridgen.fused.rows.step import ROWS
from hybridgen.models.decoder import Decoder

SHAPE = Shape(hidden=1024, heads=16, kv_heads=4, head_dim=64, intermediate=1024, vocab=256, layers=2, max_context=8)
H200: dict[str, Any] = {"page_size": 64, "blocks": 132, "shared_memory": 227 * 1024}


pytestmark = needs_nvrtc


def decoder(kind: str, dtype: torch.dtype, **changes: Any) -> Decoder:
    """Of one format, or of two, as in `int4+fp8`: the first layer has the second one."""
    first, _, second = kind.partition("+")
    if second:
        return mixed_decoder(
            decoder(first, dtype, **changes), decoder(second, dtype, **changes), lambda index, _: index == 0
        )
    model = dataclasses.replace(random_decoder(dataclasses.replace(SHAPE, **changes), torch.bfloat16), dtype=dtype)
    if kind.startswith("dense"):
        return model
    name, _, how = kind.partition("-")
    group, of_a_block = (128 if how in ("blocks", "groups") else 0), (128 if how == "blocks" else 1)
    return quantised_decoder(model, name, group, zeros=how == "zeros", outputs_of_a_block=of_a_block)


def local_bytes(cubin: bytes) -> int:
    """Of a thread: `EIATTR_FRAME_SIZE` in the section `.nv.info` of an ELF file."""
    (sections,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, sections + i * size) for i in range(count)]
    for name, _, _, _, start, length, *_ in headers:
        if not cubin[headers[names][4] + name :].startswith(b".nv.info\0"):
            continue
        at = start
        while at < start + length:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            if (form, attribute) == (4, 0x11):
                return int(struct.unpack_from("<I", cubin, at + 8)[0])
            at += 4 + value * (form == 4)
    raise AssertionError("it does not say")


SMALL = {"hidden": 512, "heads": 8, "intermediate": 512}
LARGE = {"head_dim": 128, "heads": 8, "kv_heads": 2, "intermediate": 5120}
PARTS = {"biases": PROJECTIONS, "activation": "gelu_tanh"}
CASES: list[tuple[dict[str, Any], torch.dtype, str]] = [
    (SMALL, torch.bfloat16, "mxfp4+dense"),
    ({}, torch.bfloat16, "int4+dense"),
    ({}, torch.bfloat16, "dense"),
    (PARTS, torch.float16, "fp8"),
    ({**LARGE, "head_norm": "head"}, torch.bfloat16, "int4"),
    (LARGE, torch.float16, "int4-zeros"),
    ({"intermediate": 5120}, torch.bfloat16, "fp8-blocks"),
    ({}, torch.float16, "int8"),
    ({"intermediate": 5120}, torch.bfloat16, "int8-groups"),
    ({"head_dim": 128, "heads": 8, "kv_heads": 2}, torch.bfloat16, "dense-kv8"),
    ({}, torch.float16, "dense-kv8"),
    ({"hidden": 8192, "heads": 64, "kv_heads": 8, "head_dim": 128, "intermediate": 9216}, torch.bfloat16, "int4-zeros"),
    (LARGE, torch.bfloat16, "mxfp4"),
    (LARGE, torch.bfloat16, "mxfp4+dense"),
    (LARGE, torch.bfloat16, "fp8+dense"),
    (LARGE, torch.float16, "int4-zeros+fp8"),
    (PARTS, torch.float16, "int8+dense"),
]


@pytest.mark.parametrize(
    ("changes", "dtype", "kind"),
    [pytest.param(*case, marks=pytest.mark.slow if i else ()) for i, case in enumerate(CASES)],
)
def test_it_compiles_without_a_gpu(changes: dict[str, Any], dtype: torch.dtype, kind: str) -> None:
    model = decoder(kind, dtype, **changes)
    found = formats_of([[stored(getattr(layer, name)) for name in PROJECTIONS] for layer in model.layers])
    assert bool(found.others) == ("+" in kind)
    shape = shape_of(
        model, found, stored(model.head).format, default_tuning(model), **H200, kv_bytes=2 - ("kv8" in kind)
    )
    assert shape.shared_bytes <= H200["shared_memory"]
    cubin = program.machine_code(shape.defines, (9, 0), ROWS)
    assert cubin.startswith(b"\x7fELF")
    if model.hidden <= 4096 and "groups" not in kind and "blocks" not in kind:
        assert local_bytes(cubin) == 0


@pytest.mark.slow
def test_a_ranks_share_compiles() -> None:
    model = dataclasses.replace(decoder("dense", torch.bfloat16, **SMALL), share=SimpleNamespace(rank=1, size=2))
    dense = Format(16)
    shape = shape_of(model, Formats.alike(dense), dense, default_tuning(model), **H200)
    assert shape.defines["RANKS"] == 2
    assert program.machine_code(shape.defines, (9, 0), ROWS).startswith(b"\x7fELF")


def test_kernels_have_keys_of_their_own() -> None:
    assert program.key({"A": 1}, "sm_90a", ROWS) != program.key({"A": 1}, "sm_90a", ONE_ROW)
