"""Triton: int4 weights times up to eight rows, where reading the codes once is what time should be spent on.

What they compute: `hybridgen.kernels.linear.quantised`. Written thread by thread, as the kernels of MXFP4 experts
(`experts_few_kernels`): a tensor has one element for each thread of a program; `mma.sync`, loads of 16 bytes and the
unpacking are PTX, and nothing goes through shared memory but the sums at the end.

- *A program* multiplies 16 outputs (or 32) with eight rows. Its warps share the inputs. Thread (g, c) of a warp,
  g = lane / 4, c = lane % 4, reads 16 bytes of two outputs in a step of 128 inputs: 32 codes. The order of inputs
  within a product is free as long as both sides have the same: these codes are the operand `A` of eight products, and
  the thread's part of `B` are the same 32 inputs of row g, 64 bytes as they lie in memory, since a code word's pairs
  are neighbours.
- *Scales* are applied to the sums of a step, in float32: a step lies in one group.
- *What is early*: codes and scales of the first two chunks are asked for before the program waits for the kernel that
  makes the rows. From then on two chunks are under way while one is multiplied.

Imports Triton; only the CUDA implementation imports this module.
"""

# ruff: noqa: RUF005 - Triton adds tuples, and does not unpack them
# mypy: disable-error-code="misc,assignment,var-annotated"
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.device.launcher import Device, Launcher, device_of

ROWS = 8
"""Of a program."""
STEP = tl.constexpr(128)
"""Inputs of a warp's step."""
_STEP = 128


def _unpack(magic: str, kind: str) -> tl.constexpr:
    """PTX that makes four pairs of 16-bit numbers of a word ($4), and adds the zero's number ($5) to each."""
    lines = ["{ .reg .b32 pair, word;"]
    for number in range(4):
        word = "$4" if number == 0 else "word"
        lines += [f"shr.u32 word, $4, {4 * number};"] * (number > 0)
        lines += [f"lop3.b32 pair, {word}, 0x000f000f, {magic}, 0xEA;", f"add.rn.{kind}x2 ${number}, pair, $5;"]
    return tl.constexpr("\n".join([*lines, "}"]))


UNPACK_BF16 = _unpack("0x43004300", "bf16")
UNPACK_F16 = _unpack("0x64006400", "f16")
MULTIPLY_BF16 = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
MULTIPLY_F16 = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


class FewTile(NamedTuple):
    """How a product is cut."""

    warps: int
    """They share the inputs."""
    chunk: int
    """Steps of a warp whose codes are asked for together."""
    tiles: int = 1
    """Of 16 outputs."""
    registers: int = 0
    """Of a thread at most; 0: as the compiler likes."""


LOAD_CODES = tl.constexpr("ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
"""Not by `.nc`, which the assembler moves behind the wait, to where the codes are used."""
LOAD_INPUTS = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")


@triton.jit
def _four_words(TEXT: tl.constexpr, pointers):  # type: ignore[no-untyped-def]
    """16 bytes from where each element points to."""
    return tl.inline_asm_elementwise(
        TEXT,
        "=r,=r,=r,=r,l",
        [pointers.to(tl.int64)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,  # stays where it is written, before or behind the wait
        pack=1,
    )


@triton.jit
def _unpacked(word, shift, FLOAT16: tl.constexpr):  # type: ignore[no-untyped-def]
    text: tl.constexpr = UNPACK_F16 if FLOAT16 else UNPACK_BF16
    return tl.inline_asm_elementwise(
        text,
        "=&r,=&r,=&r,=&r,r,r",
        [word, shift],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _multiplied(a0, a1, a2, a3, b0, b1, sums, FLOAT16: tl.constexpr):  # type: ignore[no-untyped-def]
    text: tl.constexpr = MULTIPLY_F16 if FLOAT16 else MULTIPLY_BF16
    return tl.inline_asm_elementwise(
        text,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _asked(  # type: ignore[no-untyped-def]
    data, scales, zeros, outputs, first, begin, chunk,
    PIECES: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, ROWWISE: tl.constexpr,
    RAGGED: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr, FLOAT16: tl.constexpr,
):  # fmt: skip
    """Codes, shifts and scales of a warp's steps from `chunk` on: tuples with 2 * TILES entries for each step."""
    words = ()
    shifts = ()
    factors = ()
    base: tl.constexpr = -0x1BFF1C00 if FLOAT16 else -0x3CFF3D00
    for number in tl.static_range(CHUNK):
        if chunk + number < STEPS:
            piece = begin + (chunk + number) * 4
            column = (first + chunk + number) * STEP // GROUP
            if RAGGED:
                piece = tl.minimum(piece, PIECES - 1)
                column = tl.minimum(column, COLUMNS - 1)
            for each in tl.static_range(2 * TILES):
                words = words + (_four_words(LOAD_CODES, data + (outputs[each] * PIECES + piece) * 4),)
                if ZEROS:
                    place = outputs[each] * COLUMNS if ROWWISE else outputs[each] * COLUMNS + column
                    zero = tl.load(zeros + place).to(tl.int32)
                    shifts = shifts + (zero * 0x00010001 | base,)
                else:
                    shifts = shifts + (tl.full(piece.shape, base | 0x00080008, tl.int32),)
                if not ROWWISE:
                    factors = factors + (tl.load(scales + (outputs[each] * COLUMNS + column)),)
    return words, shifts, factors


@triton.jit
def _step_sums(words, shifts, inputs, AT: tl.constexpr, sums, FLOAT16: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's sums of a step, added to `sums`. AT: where its words are among those of the chunk."""
    even = sums
    nought = tl.zeros_like(sums[0])
    odd = (nought, nought, nought, nought)
    for word in tl.static_range(4):
        a0, a2, a4, a6 = _unpacked(words[AT][word], shifts[AT], FLOAT16)
        a1, a3, a5, a7 = _unpacked(words[AT + 1][word], shifts[AT + 1], FLOAT16)
        even = _multiplied(a0, a1, a2, a3, inputs[word][0], inputs[word][1], even, FLOAT16)
        odd = _multiplied(a4, a5, a6, a7, inputs[word][2], inputs[word][3], odd, FLOAT16)
    return (even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3])


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["scales", "zeros", "bias"])
def few_int4_kernel(  # type: ignore[no-untyped-def]
    x, data, scales, zeros, bias, out, rows,
    ALL: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    ROWWISE: tl.constexpr, BIAS: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr,
    TILES: tl.constexpr, FLOAT16: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x: [rows, 32 * PIECES]; out: [rows, ALL]. A warp has STEPS steps, one after the other."""
    thread = tl.arange(0, WARPS * 32)
    first = thread // 32 * STEPS
    begin = first * 4 + thread % 4
    RAGGED: tl.constexpr = WARPS * STEPS * 4 != PIECES
    outputs = ()
    for part in tl.static_range(2 * TILES):
        n = (tl.program_id(0) * TILES * 2 + part) * 8 + thread // 4 % 8
        outputs = outputs + (tl.minimum(n, ALL - 1).to(tl.int64),)
    row = tl.minimum(tl.program_id(1) * 8 + thread // 4 % 8, rows - 1)
    own = x + (row.to(tl.int64) * (PIECES * 32) + begin * 32)
    asked = _asked(
        data, scales, zeros, outputs, first, begin, 0,
        PIECES, COLUMNS, GROUP, ZEROS, ROWWISE, RAGGED, TILES, CHUNK, STEPS, FLOAT16,
    )  # fmt: skip
    following = _asked(
        data, scales, zeros, outputs, first, begin, CHUNK,
        PIECES, COLUMNS, GROUP, ZEROS, ROWWISE, RAGGED, TILES, CHUNK, STEPS, FLOAT16,
    )  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    nought = tl.zeros((WARPS * 32,), dtype=tl.float32)
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + ((nought, nought, nought, nought),)
    for chunk in tl.static_range(0, STEPS, CHUNK):
        words, shifts, factors = asked
        for number in tl.static_range(CHUNK):
            if chunk + number < STEPS:
                inputs = ()
                for word in tl.static_range(4):
                    place = own + ((chunk + number) * STEP + word * 8)
                    if RAGGED:
                        inside = begin + (chunk + number) * 4 < PIECES
                        b0, b1, b2, b3 = _four_words(LOAD_INPUTS, tl.where(inside, place, x))
                        b0 = tl.where(inside, b0, 0)
                        b1 = tl.where(inside, b1, 0)
                        b2 = tl.where(inside, b2, 0)
                        b3 = tl.where(inside, b3, 0)
                        inputs = inputs + ((b0, b1, b2, b3),)
                    else:
                        inputs = inputs + (_four_words(LOAD_INPUTS, place),)
                added = ()
                for tile in tl.static_range(TILES):
                    if ROWWISE:
                        found = _step_sums(words, shifts, inputs, number * 2 * TILES + 2 * tile, sums[tile], FLOAT16)
                    else:
                        own_sums = _step_sums(
                            words,
                            shifts,
                            inputs,
                            number * 2 * TILES + 2 * tile,
                            (nought, nought, nought, nought),
                            FLOAT16,
                        )
                        upper = factors[number * 2 * TILES + 2 * tile].to(tl.float32)
                        lower = factors[number * 2 * TILES + 2 * tile + 1].to(tl.float32)
                        found = (
                            sums[tile][0] + own_sums[0] * upper,
                            sums[tile][1] + own_sums[1] * upper,
                            sums[tile][2] + own_sums[2] * lower,
                            sums[tile][3] + own_sums[3] * lower,
                        )
                    added = added + (found,)
                sums = added
        asked = following
        if chunk + 2 * CHUNK < STEPS:
            following = _asked(
                data, scales, zeros, outputs, first, begin, chunk + 2 * CHUNK,
                PIECES, COLUMNS, GROUP, ZEROS, ROWWISE, RAGGED, TILES, CHUNK, STEPS, FLOAT16,
            )  # fmt: skip
    joined = ()
    for tile in tl.static_range(TILES):
        upper = tl.join(sums[tile][0], sums[tile][1])
        lower = tl.join(sums[tile][2], sums[tile][3])
        joined = joined + (tl.join(upper, lower),)
    if TILES == 2:
        both = tl.join(joined[0], joined[1])
    else:
        both = joined[0]
    # Of thread (g, c): outputs g and g + 8 of a tile, rows 2 c and 2 c + 1.
    total = tl.reshape(tl.sum(tl.reshape(both, [WARPS, 128 * TILES]), 0), [8, 8, 2, TILES])
    total = tl.reshape(tl.permute(total, [3, 2, 0, 1]), [16 * TILES, 8])
    n = tl.program_id(0) * (16 * TILES) + tl.arange(0, 16 * TILES)
    m = tl.program_id(1) * 8 + tl.arange(0, 8)
    if ROWWISE:
        total *= tl.load(scales + n * COLUMNS, mask=n < ALL, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias + n, mask=n < ALL, other=0.0).to(tl.float32)[:, None]
    mask = (n < ALL)[:, None] & (m < rows)[None, :]
    tl.store(out + m.to(tl.int64)[None, :] * ALL + n[:, None], total.to(out.dtype.element_ty), mask=mask)


def takes(x: Tensor, data: Tensor, zeros: Tensor | None, columns: int, group: int) -> bool:
    """Whether the kernel is for rows of x and an int4 weight whose scales are each output's own.

    It does more than that: a scale for an output, no zero points, float16 and inputs that some warps lack were computed
    right in Triton's interpreter, and no GPU has run them yet.

    Args:
        columns: scales of an output.
        group: inputs of a scale.
    """
    rows, inputs = x.shape
    whole = inputs % (_STEP * default_tile(inputs).warps) == 0 and data.shape[1] * 8 == inputs
    usual = zeros is not None and columns > 1 and group % _STEP == 0 and x.dtype == torch.bfloat16
    aligned = data.is_contiguous() and not data.data_ptr() % 16 and not x.data_ptr() % 16
    return whole and usual and aligned and 0 < rows <= ROWS


def default_tile(inputs: int) -> FewTile:
    """How a product is cut, by its inputs alone: the fastest of those tried on an H200 with the sizes of an 8B."""
    return FewTile(4, 4, 1, 168) if inputs <= 32 * _STEP else FewTile(8, 2, 1, 128)


@functools.cache
def _launcher(
    outputs: int, inputs: int, columns: int, group: int, zeros: bool, bias: bool, tile: FewTile,
    dtypes: tuple[torch.dtype, ...], device: Device,
) -> Launcher:  # fmt: skip
    steps = -(-inputs // _STEP)
    constants = {
        "ALL": outputs,
        "PIECES": inputs // 32,
        "COLUMNS": columns,
        "GROUP": group,
        "ZEROS": zeros,
        "ROWWISE": columns == 1,
        "BIAS": bias,
        "WARPS": tile.warps,
        "STEPS": -(-steps // tile.warps),
        "CHUNK": tile.chunk,
        "TILES": tile.tiles,
        "FLOAT16": dtypes[0] == torch.float16,
        "OVERLAP": device.overlap,
        "num_warps": tile.warps,
        **({"launch_pdl": True} if device.overlap else {}),
        **({"maxnreg": tile.registers} if tile.registers else {}),
    }
    return Launcher(few_int4_kernel, constants)


def few_product(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
    tile: FewTile | None = None,
) -> Tensor:
    """`x @ weight.T + bias` of x [M, K], contiguous, for what `takes` says yes to; [M, N] in x's dtype.

    Args:
        group: inputs of a scale.
        tile: how it is cut; None for the default.
    """
    (rows, inputs), (outputs, columns) = x.shape, scales.shape
    device = device_of(x)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    tile = tile or default_tile(inputs)
    dtypes = x.dtype, scales.dtype
    launch = _launcher(outputs, inputs, columns, group, zeros is not None, bias is not None, tile, dtypes, device)
    tensors = x, data, scales, scales if zeros is None else zeros, x if bias is None else bias, out
    launch((-(-outputs // (16 * tile.tiles)), -(-rows // ROWS), 1), (*tensors, rows))
    return out
