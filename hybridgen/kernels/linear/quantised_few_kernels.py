"""Triton: int4 weights times up to eight rows, where reading the codes once is what time should be spent on.

What they compute: `hybridgen.kernels.linear.quantised`. Written thread by thread, as the kernels of MXFP4 experts
(`experts_few_kernels`): a tensor has one element for each thread of a program; `mma.sync`, loads of 16 bytes and the
unpacking are PTX, and nothing goes through shared memory but the sums at the end of a tile.

- *A tile* is 16 outputs by eight rows. A program's warps share its inputs. Thread (g, c) of a warp, g = lane / 4,
  c = lane % 4, reads 16 bytes of two outputs in a step of 128 inputs: 32 codes. The order of inputs within a product is
  free as long as both sides have the same: these codes are the operand `A` of eight products, and the thread's part of
  `B` are the same 32 inputs of row g, 64 bytes as they lie in memory, since a code word's pairs are neighbours.
- *Scales* are applied to the sums of a step, in float32: a step lies in one group.
- *A program* takes several tiles, one after the other, in one loop over all their chunks of some steps. The next
  chunk's codes and scales are asked for before a chunk is multiplied, also from one tile to the next, and those of the
  first one before the program waits for the kernel that makes the rows. The loop's code is short, so that it stays in
  the instruction cache, however long the inputs are.

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
"""At most."""
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


def _load(how: str) -> tl.constexpr:
    """PTX that loads 16 bytes from an address ($4) where a number ($5) is not 0; else noughts."""
    noughts = " ".join(f"mov.b32 ${number}, 0;" for number in range(4))
    ask = f"setp.ne.s32 asked, $5, 0; {noughts}"
    return tl.constexpr(f"{{ .reg .pred asked; {ask} @asked ld.global{how}.v4.b32 {{$0, $1, $2, $3}}, [$4]; }}")


LOAD_CODES = _load(".L1::no_allocate")
"""Not by `.nc`, which the assembler moves behind the wait, to where the codes are used."""
LOAD_INPUTS = _load("")


class FewTile(NamedTuple):
    """How a product is cut."""

    warps: int
    """They share the inputs."""
    chunk: int
    """Steps of a warp whose codes are asked for together."""
    programs: int = 3
    """For a multiprocessor, at most."""
    registers: int = 0
    """Of a thread at most; 0: as the compiler likes."""


@triton.jit
def _four_words(TEXT: tl.constexpr, pointers, asked):  # type: ignore[no-untyped-def]
    """16 bytes from where each element points to, or noughts."""
    return tl.inline_asm_elementwise(
        TEXT,
        "=&r,=&r,=&r,=&r,l,r",
        [pointers.to(tl.int64), asked.to(tl.int32)],
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
    data, scales, zeros, item, count, thread,
    ALL: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    ROWWISE: tl.constexpr, WARPS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, FLOAT16: tl.constexpr,
):  # fmt: skip
    """Codes, shifts and scales of a program's item, a tile's chunk: tuples with two entries for each step."""
    base: tl.constexpr = -0x1BFF1C00 if FLOAT16 else -0x3CFF3D00
    tile = tl.program_id(0) + item // CHUNKS * tl.num_programs(0)
    step = (item % CHUNKS * WARPS + thread // 32) * CHUNK
    real = item < count
    words = ()
    shifts = ()
    factors = ()
    n = tl.minimum(tile * 16 + thread // 4 % 8, ALL - 1)
    other = tl.minimum(tile * 16 + 8 + thread // 4 % 8, ALL - 1)
    pieces = step * 4 + thread % 4
    codes = data + (n.to(tl.int64) * PIECES + pieces) * 4
    other_codes = data + (other.to(tl.int64) * PIECES + pieces) * 4
    for number in tl.static_range(CHUNK):
        inside = (pieces + number * 4 < PIECES) & real
        words = words + (_four_words(LOAD_CODES, codes + number * 16, inside),)
        words = words + (_four_words(LOAD_CODES, other_codes + number * 16, inside),)
        if ROWWISE:
            place = n
            other_place = other
        else:
            column = tl.minimum((step + number) * STEP // GROUP, COLUMNS - 1)
            place = n * COLUMNS + column
            other_place = other * COLUMNS + column
            factors = factors + (tl.load(scales + place, mask=inside, other=0.0),)
            factors = factors + (tl.load(scales + other_place, mask=inside, other=0.0),)
        if ZEROS:
            zero = tl.load(zeros + place, mask=inside, other=0).to(tl.int32)
            other_zero = tl.load(zeros + other_place, mask=inside, other=0).to(tl.int32)
            shifts = shifts + (zero * 0x00010001 | base, other_zero * 0x00010001 | base)
        else:
            eight = tl.full(n.shape, base | 0x00080008, tl.int32)
            shifts = shifts + (eight, eight)
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
    ROWWISE: tl.constexpr, BIAS: tl.constexpr, WARPS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    FLOAT16: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x: [rows, 32 * PIECES], rows up to eight; out: [rows, ALL]."""
    thread = tl.arange(0, WARPS * 32)
    tiles = (ALL + 15) // 16
    count = tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) * CHUNKS
    row = tl.minimum(thread // 4 % 8, rows - 1)
    first = thread // 32 * CHUNK * 4 + thread % 4
    own = x + (row.to(tl.int64) * (PIECES * 32) + first * 32)
    if OVERLAP:
        gdc_launch_dependents()
    words, shifts, factors = _asked(
        data, scales, zeros, 0, count, thread,
        ALL, PIECES, COLUMNS, GROUP, ZEROS, ROWWISE, WARPS, CHUNK, CHUNKS, FLOAT16,
    )  # fmt: skip
    if OVERLAP:
        gdc_wait()
    nought = tl.zeros((WARPS * 32,), dtype=tl.float32)
    empty = (nought, nought, nought, nought)
    sums = empty
    for item in range(count):
        next_words, next_shifts, next_factors = _asked(
            data, scales, zeros, item + 1, count, thread,
            ALL, PIECES, COLUMNS, GROUP, ZEROS, ROWWISE, WARPS, CHUNK, CHUNKS, FLOAT16,
        )  # fmt: skip
        chunk = item % CHUNKS
        for number in tl.static_range(CHUNK):
            piece = chunk * (WARPS * CHUNK * 4) + number * 4
            inside = first + piece < PIECES
            inputs = ()
            for word in tl.static_range(4):
                inputs = inputs + (_four_words(LOAD_INPUTS, own + (piece * 32 + word * 8), inside),)
            if ROWWISE:
                sums = _step_sums(words, shifts, inputs, number * 2, sums, FLOAT16)
            else:
                found = _step_sums(words, shifts, inputs, number * 2, empty, FLOAT16)
                upper = factors[number * 2].to(tl.float32)
                lower = factors[number * 2 + 1].to(tl.float32)
                sums = (
                    sums[0] + found[0] * upper,
                    sums[1] + found[1] * upper,
                    sums[2] + found[2] * lower,
                    sums[3] + found[3] * lower,
                )
        if chunk == CHUNKS - 1:
            both = tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3]))
            # Of thread (g, c): outputs g and g + 8 of a tile, rows 2 c and 2 c + 1.
            total = tl.reshape(tl.sum(tl.reshape(both, [WARPS, 128]), 0), [8, 8, 2])
            total = tl.reshape(tl.permute(total, [2, 0, 1]), [16, 8])
            n = (tl.program_id(0) + item // CHUNKS * tl.num_programs(0)) * 16 + tl.arange(0, 16)
            m = tl.arange(0, 8)
            if ROWWISE:
                total *= tl.load(scales + n, mask=n < ALL, other=0.0).to(tl.float32)[:, None]
            if BIAS:
                total += tl.load(bias + n, mask=n < ALL, other=0.0).to(tl.float32)[:, None]
            mask = (n < ALL)[:, None] & (m < rows)[None, :]
            tl.store(out + m[None, :] * ALL + n[:, None], total.to(out.dtype.element_ty), mask=mask)
            sums = empty
        words, shifts, factors = next_words, next_shifts, next_factors


def takes(x: Tensor, data: Tensor, columns: int, group: int) -> bool:
    """Whether the kernel is for rows of x and an int4 weight whose scales are each output's own.

    Args:
        columns: scales of an output.
        group: inputs of a scale.
    """
    rows, inputs = x.shape
    usual = inputs % 32 == 0 and (columns == 1 or group % _STEP == 0) and data.shape[1] * 8 == inputs
    aligned = data.is_contiguous() and not data.data_ptr() % 16 and not x.data_ptr() % 16
    return usual and aligned and 0 < rows <= ROWS and x.dtype in (torch.bfloat16, torch.float16)


DEFAULT = FewTile(4, 4)
"""The same for all sizes."""


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
        "CHUNK": tile.chunk,
        "CHUNKS": -(-steps // (tile.warps * tile.chunk)),
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
    tile: FewTile = DEFAULT,
) -> Tensor:
    """`x @ weight.T + bias` of x [M, K], contiguous, for what `takes` says yes to; [M, N] in x's dtype.

    Args:
        group: inputs of a scale.
        tile: how it is cut.
    """
    (rows, inputs), (outputs, columns) = x.shape, scales.shape
    device = device_of(x)
    tiles = -(-outputs // 16)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    dtypes = x.dtype, scales.dtype
    launch = _launcher(outputs, inputs, columns, group, zeros is not None, bias is not None, tile, dtypes, device)
    tensors = x, data, scales, scales if zeros is None else zeros, x if bias is None else bias, out
    launch((min(tiles, tile.programs * device.processors), 1, 1), (*tensors, rows))
    return out
