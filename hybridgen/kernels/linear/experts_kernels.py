"""Triton: chosen experts of a mixture, each expert's weights read once for all tokens that chose it.

What they compute: `hybridgen.kernels.linear.experts`. A *pair* is a token with one of its experts. A program multiplies
a tile of one expert's outputs with the rows of up to ROWS pairs that chose that expert, `weight[N, K] @ x.T[K, rows]`,
so that the tensor cores' long side holds outputs, of which there are many (as in `quantised_kernels`).

- Of few tokens no list is made. There are as many programs for a tile as pairs; one reads the ids of all pairs, and
  goes on if its pair is the first of its expert, or the 17th, and so on: then it takes the next 16 as well. The others
  end. So the grid follows from shapes alone, and a step can be recorded.
- Of many tokens pairs are sorted by expert first (`plan`), and a program finds its expert and its pairs in a list.

A column of such a product depends on no other column, and how sums are cut follows from the weights' shapes alone, so
that of up to `FEW_ROWS` tokens each gets the same bits in any company.

Three kernels: gate and up with the activation, [pairs, I]; down, whose inputs may be cut (SPLITS), [splits, pairs, H];
and the weighted sum over each token's experts, in their order.

Imports Triton; only `experts_launch` imports this module.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.linear.codes_kernels import int4_values, scale_at, tile_values


@triton.jit
def _pairs(ids, order, blocks, number, pairs, PLANNED: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The expert of a program, or -1 for none; its pairs [ROWS], -1 where there are fewer.

    Not by way of a multiprocessor's own cache: this may run before a kernel has waited for the one before it.
    """
    place = tl.arange(0, ROWS)
    if PLANNED:
        expert = tl.load(blocks + number * 3, cache_modifier=".cg")
        first = tl.load(blocks + number * 3 + 1, cache_modifier=".cg")
        stop = tl.load(blocks + number * 3 + 2, cache_modifier=".cg")
        mask = (first + place < stop) & (expert >= 0)
        mine = tl.load(order + first + place, mask=mask, other=-1, cache_modifier=".cg")
    else:
        other = tl.arange(0, PAIRS)
        chosen = tl.load(ids + other, mask=other < pairs, other=-1, cache_modifier=".cg").to(tl.int32)
        expert = tl.load(ids + number, cache_modifier=".cg").to(tl.int32)
        same = (chosen == expert).to(tl.int32)
        before = tl.sum(tl.where(other < number, same, 0), 0)
        rank = tl.cumsum(same, 0) - 1 - before
        hit = (rank[None, :] == place[:, None]) & (same[None, :] > 0)
        mine = tl.sum(tl.where(hit, other[None, :] + 1, 0), 1) - 1
        expert = tl.where(before % ROWS == 0, expert, -1)
    return expert, mine


_UNPACK_MXFP4 = tl.constexpr(
    """{ .reg .b32 sizes, signs, low0, low1, high0, high1, sign0, sign1, upper, nought;
    mov.b32 nought, 0x80008000;
    and.b32 sizes, $8, 0x77777777;
    shr.u32 signs, $8, 3;
    and.b32 signs, signs, 0x11111111;
    prmt.b32 low0, 0xC0800000, 0xC0804000, sizes;
    prmt.b32 high0, 0x3F3F3F00, 0x40404040, sizes;
    prmt.b32 sign0, 0x00008000, 0, signs;
    shr.u32 upper, sizes, 16;
    prmt.b32 low1, 0xC0800000, 0xC0804000, upper;
    prmt.b32 high1, 0x3F3F3F00, 0x40404040, upper;
    shr.u32 upper, signs, 16;
    prmt.b32 sign1, 0x00008000, 0, upper;
    or.b32 high0, high0, sign0;
    or.b32 high1, high1, sign1;
    prmt.b32 sizes, low0, high0, 0x5140;
    prmt.b32 signs, low0, high0, 0x7362;
    fma.rn.bf16x2 sizes, sizes, $9, nought;
    fma.rn.bf16x2 signs, signs, $9, nought;
    mov.b32 {$0, $1}, sizes;
    mov.b32 {$2, $3}, signs;
    prmt.b32 sizes, low1, high1, 0x5140;
    prmt.b32 signs, low1, high1, 0x7362;
    fma.rn.bf16x2 sizes, sizes, $9, nought;
    fma.rn.bf16x2 signs, signs, $9, nought;
    mov.b32 {$4, $5}, sizes;
    mov.b32 {$6, $7}, signs; }"""
)
"""Eight codes e2m1 of a word ($8) as bfloat16 numbers, times a number that a register has twice ($9).

Both bytes of a number are looked up by the code's three low bits (`prmt` chooses four of eight bytes), the sign is put
on the upper one, and the bytes are joined. The products are exact, or what one rounding makes of them."""


@triton.jit
def _mxfp4_values(  # type: ignore[no-untyped-def]
    data, offsets, mask, at, scale, INPUTS: tl.constexpr, EVEN: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Values of a tile, bfloat16 [OUTPUTS, STEP].

    data: words of eight codes; scale: [OUTPUTS], a word with the exponents of the step's four times 32 inputs.
    """
    WORDS: tl.constexpr = STEP // 8
    item = at // 8 + tl.arange(0, WORDS)
    inside = mask[:, None] if EVEN else mask[:, None] & (item < INPUTS // 8)[None, :]
    words = tl.load(data + offsets[:, None] + item[None, :], mask=inside, other=0)
    power = (scale[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 255
    power = tl.where(power == 0, 0x00400040, power * 0x00800080)
    power = tl.reshape(tl.broadcast_to(power[:, :, None], [OUTPUTS, 4, 4]), [OUTPUTS, WORDS])
    o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
        _UNPACK_MXFP4,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [words, power],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=1,
    )
    even = tl.join(tl.join(o0, o4), tl.join(o2, o6))
    odd = tl.join(tl.join(o1, o5), tl.join(o3, o7))
    return tl.reshape(tl.join(even, odd), [OUTPUTS, STEP]).to(tl.bfloat16, bitcast=True)


@triton.jit
def _arranged(values, OUTPUTS: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile in the order of `_loaded` and of inputs in their own, as the tensor cores' operand is spread over threads.

    A thread has a quarter of a row's inputs of a step, which lie side by side, and the operand wants two of each eight
    in it. Sums do not depend on the order of the inputs, if the rows of x are read in the same one.
    """
    WARPS: tl.constexpr = OUTPUTS // 16
    parts = tl.reshape(values, [2, WARPS, 8, 4, STEP // 8, 2])
    return tl.reshape(tl.permute(parts, [1, 0, 2, 4, 3, 5]), [OUTPUTS, STEP])


@triton.jit
def _loaded(OUTPUTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which output of a tile each row of what is loaded has."""
    i = tl.arange(0, OUTPUTS)
    return (i // 8 % (OUTPUTS // 16)) * 16 + (i // (OUTPUTS // 2)) * 8 + i % 8


@triton.jit
def _of_tile(i, tile, ALL: tl.constexpr, OUTPUTS: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The outputs of places in a tile; ALL and above where there is none. HALVES: gates, and behind them the others.

    Without a choice where there need be none: the compiler sees then which outputs lie side by side.
    """
    if HALVES:
        HALF: tl.constexpr = OUTPUTS // 2
        TRUE: tl.constexpr = ALL // 2
        place = tile * HALF + i % HALF
        n = (i // HALF) * TRUE + place
        if TRUE % HALF == 0:
            return n
        else:
            return tl.where(place < TRUE, n, ALL)
    else:
        return tile * OUTPUTS + i


@triton.jit
def _step_scales(  # type: ignore[no-untyped-def]
    scales,
    n,
    step,
    ALL: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """The scales, float32 [OUTPUTS], of a step within a block; those behind the last step are anything."""
    column = tl.minimum(step * STEP // GROUP, COLUMNS - 1)
    return scale_at(scales, (n // BLOCK_OUT) * COLUMNS + column, n < ALL, KIND)


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, row, real, data, scales, zeros, expert, tile, begin, end,
    KIND: tl.constexpr, TRANSPOSED: tl.constexpr, ZEROS: tl.constexpr, WHERE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr, ALL: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, HALVES: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, UNPACKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums [OUTPUTS, ROWS] of some steps of the inputs of a tile.

    row: [ROWS] rows of x, those that are `real`. UNPACKS: by words, in the order of the tensor cores' operand.
    """
    mine = data + expert.to(tl.int64) * (ALL * WIDTH)
    scales += expert.to(tl.int64) * (LINES * COLUMNS)
    zeros += expert.to(tl.int64) * (LINES * COLUMNS)
    rows = x + row.to(tl.int64)[None, :] * INPUTS
    n = _of_tile(tl.arange(0, OUTPUTS), tile, ALL, OUTPUTS, HALVES)
    order = tl.arange(0, STEP)
    half = order // 2
    if UNPACKS:
        rows_of_data = _of_tile(_loaded(OUTPUTS), tile, ALL, OUTPUTS, HALVES)
        half = (half % 4) * (STEP // 8) + order // 8
        order = half * 2 + order % 2
    else:
        rows_of_data = n
    inside = rows_of_data < ALL
    if WHERE == 1:
        next_scale = _step_scales(scales, n, begin, ALL, BLOCK_OUT, GROUP, COLUMNS, STEP, KIND)
    sums = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for step in range(begin, end):
        at = step * STEP
        k = at + order
        if WHERE == 1:  # asked for a step before it is needed; the compiler does so only for what it multiplies
            block_scale = next_scale
            next_scale = _step_scales(scales, n, step + 1, ALL, BLOCK_OUT, GROUP, COLUMNS, STEP, KIND)
        if EVEN:
            mask = real[None, :]
        elif UNPACKS and INPUTS % 2 == 0:  # by pairs, as far as the compiler sees inputs side by side
            mask = real[None, :] & (at // 2 + half < INPUTS // 2)[:, None]
        else:
            mask = real[None, :] & (k < INPUTS)[:, None]
        xt = tl.load(rows + k[:, None], mask=mask, other=0.0)
        if KIND == "dense":
            mask = inside[:, None] if EVEN else inside[:, None] & (k < INPUTS)[None, :]
            places = k[None, :] * ALL + n[:, None] if TRANSPOSED else n[:, None] * INPUTS + k[None, :]
            values = tl.load(mine + places, mask=mask, other=0.0)
        elif UNPACKS and KIND == "mxfp4":
            exponents = tl.load(scales + rows_of_data * COLUMNS + step, mask=inside, other=0)
            values = _mxfp4_values(mine, rows_of_data * WIDTH, inside, at, exponents, INPUTS, EVEN, OUTPUTS, STEP)
        elif UNPACKS and KIND == "int4":
            values = int4_values(
                mine, zeros, rows_of_data, at, ALL, INPUTS, WIDTH, (rows_of_data // BLOCK_OUT) * COLUMNS, COLUMNS,
                ZEROS, GROUP, EVEN, OUTPUTS, STEP, x.dtype.element_ty == tl.float16,
            )  # fmt: skip
        elif UNPACKS:
            item = at + tl.arange(0, STEP)
            mask = inside[:, None] if EVEN else inside[:, None] & (item < INPUTS)[None, :]
            values = tl.load(mine + (rows_of_data * WIDTH)[:, None] + item[None, :], mask=mask, other=0.0).to(xt.dtype)
        else:
            values = tile_values(
                mine, scales, zeros, n, at, ALL, INPUTS, WIDTH, COLUMNS,
                KIND, ZEROS, WHERE, BLOCK_OUT, GROUP, EVEN, OUTPUTS, STEP,
            ).to(xt.dtype)  # fmt: skip
        if UNPACKS:
            values = _arranged(values, OUTPUTS, STEP)
        if WHERE == 1:
            sums += tl.dot(values, xt, input_precision=PRECISION) * block_scale[:, None]
        else:
            sums = tl.dot(values, xt, sums, input_precision=PRECISION)
    if WHERE == 0 and KIND != "dense":
        sums *= scale_at(scales, (n // BLOCK_OUT) * COLUMNS, n < ALL, KIND)[:, None]
    return sums


@triton.jit
def _activated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "clamped":
        # Written so that what is no number stays that: a minimum would pass over it.
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        return (up + 1.0) * (gate / (1.0 + tl.exp(-ALPHA * gate)))
    elif ACTIVATION == "gelu":
        return up * (gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return up * (gate / (1.0 + tl.exp(-2.0 * inner)))
    elif ACTIVATION == "relu":
        return up * tl.where(gate < 0.0, 0.0, gate)
    else:
        return up * (gate / (1.0 + tl.exp(-gate)))


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["scales", "zeros", "bias"])
def gate_up_kernel(  # type: ignore[no-untyped-def]
    x, ids, order, blocks, data, scales, zeros, bias, out, pairs,
    CHOSEN: tl.constexpr, PLANNED: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
    KIND: tl.constexpr, TRANSPOSED: tl.constexpr, ZEROS: tl.constexpr, WHERE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr, ALL: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    UNPACKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    expert, mine = _pairs(ids, order, blocks, tl.program_id(1), pairs, PLANNED, PAIRS, ROWS)
    if expert >= 0:
        HALF: tl.constexpr = OUTPUTS // 2
        TRUE: tl.constexpr = ALL // 2
        tile = tl.program_id(0)
        n = _of_tile(tl.arange(0, OUTPUTS), tile, ALL, OUTPUTS, not INTERLEAVED)
        real = mine >= 0
        sums = _product(
            x, tl.maximum(mine, 0) // CHOSEN, real, data, scales, zeros, expert, tile, 0, (INPUTS + STEP - 1) // STEP,
            KIND, TRANSPOSED, ZEROS, WHERE, BLOCK_OUT, GROUP, ALL, INPUTS, WIDTH, LINES, COLUMNS, EVEN, not INTERLEAVED,
            OUTPUTS, ROWS, STEP, UNPACKS, PRECISION,
        )  # fmt: skip
        if BIAS:
            sums += tl.load(bias + expert.to(tl.int64) * ALL + n, mask=n < ALL, other=0.0).to(tl.float32)[:, None]
        if INTERLEAVED:
            halves = tl.permute(tl.reshape(sums, [HALF, 2, ROWS]), [0, 2, 1])
        else:
            halves = tl.permute(tl.reshape(sums, [2, HALF, ROWS]), [1, 2, 0])
        gate, up = tl.split(halves)
        result = _activated(gate, up, ACTIVATION, ALPHA, LIMIT)
        j = tile * HALF + tl.arange(0, HALF)
        places = out + tl.maximum(mine, 0).to(tl.int64)[None, :] * TRUE + j[:, None]
        tl.store(places, result.to(out.dtype.element_ty), mask=real[None, :] & (j < TRUE)[:, None])


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["scales", "zeros"])
def down_kernel(  # type: ignore[no-untyped-def]
    x, ids, order, blocks, data, scales, zeros, out, pairs,
    PLANNED: tl.constexpr, PAIRS: tl.constexpr, OVERLAP: tl.constexpr,
    KIND: tl.constexpr, TRANSPOSED: tl.constexpr, ZEROS: tl.constexpr, WHERE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr, ALL: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    UNPACKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    expert, mine = _pairs(ids, order, blocks, tl.program_id(1), pairs, PLANNED, PAIRS, ROWS)
    if expert >= 0:
        tile = tl.program_id(0)
        n = _of_tile(tl.arange(0, OUTPUTS), tile, ALL, OUTPUTS, False)
        real = mine >= 0
        split = tl.program_id(2)
        steps = (INPUTS + STEP - 1) // STEP
        per = tl.cdiv(steps, tl.num_programs(2))
        row = tl.maximum(mine, 0)
        sums = _product(
            x, row, real, data, scales, zeros, expert, tile, split * per, tl.minimum((split + 1) * per, steps),
            KIND, TRANSPOSED, ZEROS, WHERE, BLOCK_OUT, GROUP, ALL, INPUTS, WIDTH, LINES, COLUMNS, EVEN, False, OUTPUTS,
            ROWS, STEP, UNPACKS, PRECISION,
        )  # fmt: skip
        places = out + (split.to(tl.int64) * pairs + row.to(tl.int64))[None, :] * ALL + n[:, None]
        tl.store(places, sums.to(out.dtype.element_ty), mask=real[None, :] & (n < ALL)[:, None])


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["bias", "weights"])
def combine_kernel(  # type: ignore[no-untyped-def]
    parts, ids, weights, bias, out, pairs,
    CHOSEN: tl.constexpr, SPLITS: tl.constexpr, ALL: tl.constexpr, BIAS: tl.constexpr, OUTPUTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(1)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = n < ALL
    total = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for choice in tl.static_range(CHOSEN):
        pair = (token * CHOSEN + choice).to(tl.int64)
        value = tl.zeros((OUTPUTS,), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            value += tl.load(parts + (pair + tl.cast(split, tl.int64) * pairs) * ALL + n, mask=inside, other=0.0).to(
                tl.float32
            )
        if BIAS:
            value += tl.load(bias + tl.load(ids + pair) * ALL + n, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token.to(tl.int64) * ALL + n, total.to(out.dtype.element_ty), mask=inside)
