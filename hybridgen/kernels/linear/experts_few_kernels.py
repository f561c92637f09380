"""Triton: chosen experts in MXFP4 for few tokens, where instructions for a code are what time is spent on.

What they compute: `hybridgen.kernels.linear.experts`. They are written thread by thread: tensors have one element for
each thread of a program, and `mma.sync`, loads of 16 bytes and the unpacking are PTX, so that nothing goes through
shared memory but the sums at the end, and warps wait for nobody.

- *A program* multiplies tiles of 16 outputs of an expert, one after the other, with up to eight of the tokens that
  chose it; the next tile's codes are on their way meanwhile. Its warps share the inputs. Thread (g, c) of a warp,
  g = lane / 4, c = lane % 4, reads 16 bytes of two outputs in a step of 128 inputs: 32 codes that share a scale. The
  order of inputs within a product is free, as long as both sides have the same: so these codes are the operand `A` of
  `mma.m16n8k16` for eight products, and the thread's part of `B` is 64 bytes of one token.
- *Unpacking* takes 13 integer instructions for eight codes, scale included: the upper byte of the float16 number
  e2m1 * 2 ** d is looked up by `prmt` in a table of eight bytes that two registers hold, and a table for another d is
  the first plus a number. d is a scale's exponent less the largest one of the output in a warp's inputs, which the
  warp's sum is multiplied with; it is cut at 26 below, so that a code may be wrong by what float32 sums lose anyway.
- *Inputs* are made float16 first, a 16th of them and in the order of `B` (`arrange_kernel`), and gate and up leave them
  like that for down. Numbers up to a million fit; larger ones are infinite, and make their token NaN.
- *What is early*: a program asks for its codes before it waits for the kernel before it, where only its inputs come
  from that one: ids are there since the kernel before that one ended.

Imports Triton; only `experts_few` imports this module.
"""

# ruff: noqa: RUF005 - Triton adds tuples, and does not unpack them
# mypy: disable-error-code="misc,assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.linear.experts_kernels import _activated, _pairs

STEP = tl.constexpr(128)
"""Inputs of a warp's step."""
FACTOR = tl.constexpr(0.0625)
"""Of inputs in float16."""

LOAD_CODES = tl.constexpr("ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
"""Not by `.nc`, which the assembler moves behind the wait, to where the codes are used."""
LOAD_INPUTS = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
LARGEST = tl.constexpr("""{ .reg .b32 other;
    shfl.sync.bfly.b32 other, $1, 1, 31, -1;
    max.s32 $0, $1, other;
    shfl.sync.bfly.b32 other, $0, 2, 31, -1;
    max.s32 $0, $0, other; }""")
"""The largest number of the four threads of an output."""
UNPACK = tl.constexpr("""{ .reg .b32 even, odd, part;
    shl.b32 part, $4, 4;
    shl.b32 even, $4, 1;
    and.b32 even, even, 0x0E0E0E0E;
    lop3.b32 even, part, 0x80808080, even, 0xEA;
    shr.u32 odd, $4, 3;
    and.b32 odd, odd, 0x0E0E0E0E;
    lop3.b32 odd, $4, 0x80808080, odd, 0xEA;
    prmt.b32 part, even, 0, 0x2404;
    mul.rn.f16x2 $0, part, $5;
    and.b32 part, even, 0xFF00FF00;
    mul.rn.f16x2 $1, part, $5;
    prmt.b32 part, odd, 0, 0x2404;
    mul.rn.f16x2 $2, part, $5;
    and.b32 part, odd, 0xFF00FF00;
    mul.rn.f16x2 $3, part, $5; }""")
"""Eight codes of a word ($4) as float16 numbers times 2 ** -14 times a number that a register has twice ($5), two in a
register: codes 0 and 4, 2 and 6, 1 and 5, 3 and 7."""
MULTIPLY = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


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
def _largest(numbers):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(LARGEST, "=&r,r", [numbers], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _unpacked(word, factor):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(
        UNPACK,
        "=&r,=&r,=&r,=&r,r,r",
        [word, factor],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _multiplied(a0, a1, a2, a3, b0, b1, sums):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(
        MULTIPLY,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _word(first, second, first_factor, second_factor, b0, b1, b2, b3, even, odd):  # type: ignore[no-untyped-def]
    """Two products: a word of both outputs of a thread, with its eight inputs."""
    a0, a2, a4, a6 = _unpacked(first, first_factor)
    a1, a3, a5, a7 = _unpacked(second, second_factor)
    even = _multiplied(a0, a1, a2, a3, b0, b1, even)
    odd = _multiplied(a4, a5, a6, a7, b2, b3, odd)
    return even, odd


@triton.jit
def _code_factor(exponent, largest):  # type: ignore[no-untyped-def]
    """2 ** (15 + exponent - largest) in float16, twice in a register."""
    return (tl.maximum(exponent.to(tl.int32) - largest, -29) + 30) * 0x04000400


@triton.jit
def _sum_factor(largest):  # type: ignore[no-untyped-def]
    """What sums of such numbers and of inputs are multiplied with: 2 ** (largest - 127 - 1) over FACTOR."""
    return (tl.minimum(largest + 3, 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _asked(  # type: ignore[no-untyped-def]
    codes, scales, outputs, GROUPS: tl.constexpr, PADDED: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Codes and exponents of some tiles: tuples with 2 * TILES entries for each step.

    outputs: two numbers of each thread for a tile. codes, as int32, and scales are the expert's.
    """
    thread = tl.arange(0, WARPS * 32)
    # Of the group of 32 inputs in the first step; a step takes four for each warp.
    begin = (thread // 32) * 4 + thread % 4
    words = ()
    exponents = ()
    for step in tl.static_range(STEPS):
        group = step * WARPS * 4
        beyond = tl.zeros_like(begin)
        if group + WARPS * 4 > GROUPS:
            # Behind the last inputs: the last ones again, times nought.
            beyond = tl.minimum(GROUPS - 1 - group - begin, 0)
        for each in tl.static_range(2 * TILES):
            code = codes + (outputs[each] * GROUPS + begin) * 4
            words = words + (_four_words(LOAD_CODES, code + beyond * 4 + group * 4),)
            exponents = exponents + (tl.load(scales + (outputs[each] * PADDED + begin) + beyond + group),)
    return words, exponents


@triton.jit
def _few_sums(  # type: ignore[no-untyped-def]
    x, row, words, exponents,
    LENGTH: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums [TILES, 2, 8, 8] of what was asked for: outputs g of the first eight and of the others, and tokens.

    row: of each thread, which inputs are its token's.
    """
    thread = tl.arange(0, WARPS * 32)
    begin = (thread // 32) * 4 + thread % 4
    largest = ()
    nought = tl.zeros((WARPS * 32,), dtype=tl.float32)
    sums = ()
    for each in tl.static_range(2 * TILES):
        most = exponents[each].to(tl.int32)
        for step in tl.static_range(1, STEPS):
            most = tl.maximum(most, exponents[2 * TILES * step + each].to(tl.int32))
        largest = largest + (_largest(most),)
        # Of a tile: sums of even products, and of odd ones.
        sums = sums + ((nought, nought, nought, nought),)
    inputs = x + (row * LENGTH + begin * 32)
    for step in tl.static_range(STEPS):
        for word in tl.static_range(4):
            place = inputs + (step * (WARPS * STEP) + word * 8)
            b0, b1, b2, b3 = _four_words(LOAD_INPUTS, place)
            added = ()
            for tile in tl.static_range(TILES):
                added = added + _word(
                    words[2 * (TILES * step + tile)][word],
                    words[2 * (TILES * step + tile) + 1][word],
                    _code_factor(exponents[2 * (TILES * step + tile)], largest[2 * tile]),
                    _code_factor(exponents[2 * (TILES * step + tile) + 1], largest[2 * tile + 1]),
                    b0,
                    b1,
                    b2,
                    b3,
                    sums[2 * tile],
                    sums[2 * tile + 1],
                )
            sums = added
    joined = ()
    for tile in tl.static_range(TILES):
        even = sums[2 * tile]
        odd = sums[2 * tile + 1]
        factor_1 = _sum_factor(largest[2 * tile])
        factor_2 = _sum_factor(largest[2 * tile + 1])
        upper = tl.join((even[0] + odd[0]) * factor_1, (even[1] + odd[1]) * factor_1)
        lower = tl.join((even[2] + odd[2]) * factor_2, (even[3] + odd[3]) * factor_2)
        joined = joined + (tl.join(upper, lower),)
    if TILES == 2:
        both = tl.join(joined[0], joined[1])
    else:
        both = joined[0]
    found = tl.reshape(tl.sum(tl.reshape(both, [WARPS, 128 * TILES]), 0), [8, 8, 2, TILES])
    return tl.permute(found, [3, 2, 0, 1])


@triton.jit
def _tokens(  # type: ignore[no-untyped-def]
    ids, order, blocks, number, pairs, PLANNED: tl.constexpr, PAIRS: tl.constexpr, ALONE: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """The expert of a program, or -1; its pairs [8], -1 where there are fewer; and each thread's pair, or any."""
    if ALONE:
        expert = tl.load(ids + number, cache_modifier=".cg").to(tl.int32)
        mine = tl.where(tl.arange(0, 8) == 0, number, -1)
        own = tl.zeros((WARPS * 32,), dtype=tl.int32) + number
    else:
        expert, mine = _pairs(ids, order, blocks, number, pairs, PLANNED, PAIRS, 8)
        own = tl.reshape(tl.broadcast_to(mine[None, :, None], [WARPS, 8, 4]), [WARPS * 32])
        own = tl.maximum(own, 0)
    return expert, mine, own


@triton.jit
def _gates(tile, TRUE: tl.constexpr, INTERLEAVED: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each thread's outputs in gate and up for some tiles."""
    outputs = ()
    for part in tl.static_range(TILES):
        gate = tl.minimum((tile * TILES + part) * 8 + tl.arange(0, WARPS * 32) // 4 % 8, TRUE - 1)
        if INTERLEAVED:
            outputs = outputs + (gate * 2, gate * 2 + 1)
        else:
            outputs = outputs + (gate, gate + TRUE)
    return outputs


@triton.jit
def _outputs(tile, ALL: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each thread's outputs for some tiles."""
    outputs = ()
    for part in tl.static_range(2 * TILES):
        n = (tile * TILES * 2 + part) * 8 + tl.arange(0, WARPS * 32) // 4 % 8
        outputs = outputs + (tl.minimum(n, ALL - 1),)
    return outputs


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["scales", "bias"])
def few_gate_up_kernel(  # type: ignore[no-untyped-def]
    x, ids, order, blocks, data, scales, bias, out, pairs,
    CHOSEN: tl.constexpr, PLANNED: tl.constexpr, PAIRS: tl.constexpr, ALONE: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
    ALL: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, LENGTH: tl.constexpr, OUT_LENGTH: tl.constexpr,
    WARPS: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr, TURNS: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Gate and up with the activation: eight of each for a turn. out: [pairs, OUT_LENGTH] as down reads it."""
    if OVERLAP and not LATE:
        gdc_launch_dependents()
    expert, mine, own = _tokens(ids, order, blocks, tl.program_id(1), pairs, PLANNED, PAIRS, ALONE, WARPS)
    if expert >= 0:
        TRUE: tl.constexpr = ALL // 2
        place = expert.to(tl.int64) * ALL
        codes = data + place * (GROUPS * 4)
        exponents = scales + place * PADDED
        tile = tl.program_id(0) * TURNS
        asked = _asked(
            codes, exponents, _gates(tile, TRUE, INTERLEAVED, WARPS, TILES), GROUPS, PADDED, WARPS, STEPS, TILES
        )
        for turn in tl.static_range(TURNS):
            now = asked
            if turn + 1 < TURNS:
                outputs = _gates(tile + turn + 1, TRUE, INTERLEAVED, WARPS, TILES)
                asked = _asked(codes, exponents, outputs, GROUPS, PADDED, WARPS, STEPS, TILES)
            if OVERLAP and turn == 0:
                gdc_wait()
            if OVERLAP and LATE and turn + 1 == TURNS:
                gdc_launch_dependents()
            sums = _few_sums(x, own // CHOSEN, now[0], now[1], LENGTH, WARPS, STEPS, TILES)
            gates, ups = tl.split(tl.permute(sums, [0, 2, 3, 1]))
            gates = tl.reshape(gates, [8 * TILES, 8])
            ups = tl.reshape(ups, [8 * TILES, 8])
            j = (tile + turn) * (8 * TILES) + tl.arange(0, 8 * TILES)
            if BIAS:
                where = bias + place + (j * 2 if INTERLEAVED else j)
                gates += tl.load(where, mask=j < TRUE, other=0.0).to(tl.float32)[:, None]
                up_bias = tl.load(where + (1 if INTERLEAVED else TRUE), mask=j < TRUE, other=0.0)
                ups += up_bias.to(tl.float32)[:, None]
            result = _activated(gates, ups, ACTIVATION, ALPHA, LIMIT) * FACTOR
            mask = (mine >= 0)[None, :] & (j < TRUE)[:, None]
            places = tl.maximum(mine, 0).to(tl.int64)[None, :] * OUT_LENGTH + _arranged_place(j)[:, None]
            tl.store(out + places, result.to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["scales"])
def few_down_kernel(  # type: ignore[no-untyped-def]
    x, ids, order, blocks, data, scales, out, pairs,
    PLANNED: tl.constexpr, PAIRS: tl.constexpr, ALONE: tl.constexpr, OVERLAP: tl.constexpr, ALL: tl.constexpr,
    GROUPS: tl.constexpr, PADDED: tl.constexpr, LENGTH: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr,
    TILES: tl.constexpr, TURNS: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Down: 16 outputs for a turn, float32 [pairs, ALL]."""
    if OVERLAP and not LATE:
        gdc_launch_dependents()
    expert, mine, own = _tokens(ids, order, blocks, tl.program_id(1), pairs, PLANNED, PAIRS, ALONE, WARPS)
    if expert >= 0:
        place = expert.to(tl.int64) * ALL
        codes = data + place * (GROUPS * 4)
        exponents = scales + place * PADDED
        tile = tl.program_id(0) * TURNS
        asked = _asked(codes, exponents, _outputs(tile, ALL, WARPS, TILES), GROUPS, PADDED, WARPS, STEPS, TILES)
        for turn in tl.static_range(TURNS):
            now = asked
            if turn + 1 < TURNS:
                outputs = _outputs(tile + turn + 1, ALL, WARPS, TILES)
                asked = _asked(codes, exponents, outputs, GROUPS, PADDED, WARPS, STEPS, TILES)
            if OVERLAP and turn == 0:
                gdc_wait()
            if OVERLAP and LATE and turn + 1 == TURNS:
                gdc_launch_dependents()
            sums = _few_sums(x, own, now[0], now[1], LENGTH, WARPS, STEPS, TILES)
            sums = tl.reshape(sums, [16 * TILES, 8])
            n = (tile + turn) * (16 * TILES) + tl.arange(0, 16 * TILES)
            mask = (mine >= 0)[None, :] & (n < ALL)[:, None]
            tl.store(out + tl.maximum(mine, 0).to(tl.int64)[None, :] * ALL + n[:, None], sums, mask=mask)


@triton.jit
def _arranged_place(k):  # type: ignore[no-untyped-def]
    """Where an input is among those of its word, which are in the order 0, 4, 2, 6, 1, 5, 3, 7: bits 0, 1, 2 of its
    number are bits 2, 1, 0 of its place."""
    return (k // 8) * 8 + (k & 1) * 4 + (k & 2) + (k & 4) // 4


@triton.jit(do_not_specialize=["chosen"])
def arrange_kernel(  # type: ignore[no-untyped-def]
    x, out, acts, chosen,
    INPUTS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, ACTS_LENGTH: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A token: its inputs as `_few_sums` reads them, and noughts behind those, and behind its pairs' activations.

    out: float16 [tokens, LENGTH]; acts: float16 [pairs, ACTS_LENGTH].
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = _arranged_place(place)
    values = tl.load(x + token.to(tl.int64) * INPUTS + k, mask=k < INPUTS, other=0.0).to(tl.float32) * FACTOR
    tl.store(out + token.to(tl.int64) * LENGTH + place, values.to(tl.float16), mask=place < LENGTH)
    nought = tl.zeros((BLOCK,), dtype=tl.float16)
    behind = (place >= WIDTH) & (place < ACTS_LENGTH)
    if tl.program_id(1) * BLOCK + BLOCK > WIDTH:
        for choice in range(chosen):
            tl.store(acts + (token * chosen + choice).to(tl.int64) * ACTS_LENGTH + place, nought, mask=behind)
