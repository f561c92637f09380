"""Triton: codes of quantised weights become numbers, and numbers values, in registers.

Called by the kernels of `quantised_kernels` and `experts_kernels`. Imports Triton; only the CUDA implementations import
this module.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROW, BLOCK, VALUE = 0, 1, 2
"""Where scales are applied: to a row's sum, to the sum of a step, to each value."""


@triton.jit
def code_numbers(  # type: ignore[no-untyped-def]
    data, offsets, mask, at, inputs, KIND: tl.constexpr, EVEN: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
):  # fmt: skip
    """Codes of a tile as float32 numbers [OUTPUTS, INPUTS]; 0 for `int4` codes of 0.

    offsets: [OUTPUTS] int64, where rows of the data begin; at: first input.
    """
    if KIND == "int4":
        item = at // 8 + tl.arange(0, INPUTS // 8)
        mask = mask[:, None] if EVEN else mask[:, None] & (item * 8 < inputs)[None, :]
        words = tl.load(data + offsets[:, None] + item[None, :], mask=mask, other=0)
        # Each join is within a thread, so that it ends up with the eight codes of its words side by side.
        halves = tl.join(words, words >> 8)
        quarters = tl.join(halves, halves >> 4)
        codes = tl.join(quarters, quarters >> 16) & 15
        return tl.reshape(codes, [OUTPUTS, INPUTS]).to(tl.float32)
    elif KIND == "mxfp4":
        item = at // 2 + tl.arange(0, INPUTS // 2)
        mask = mask[:, None] if EVEN else mask[:, None] & (item * 2 < inputs)[None, :]
        pairs = tl.load(data + offsets[:, None] + item[None, :], mask=mask, other=0)
        code = tl.reshape(tl.join(pairs & 15, pairs >> 4), [OUTPUTS, INPUTS]).to(tl.int32)
        # The bits of e2m1 are those of a float32 with another bias, subnormal numbers too: 2 ** 126 is between them.
        return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        item = at + tl.arange(0, INPUTS)
        mask = mask[:, None] if EVEN else mask[:, None] & (item < inputs)[None, :]
        return tl.load(data + offsets[:, None] + item[None, :], mask=mask, other=0.0).to(tl.float32)


_PAIR = (
    "lop3.b32 pair, word, 0x000f000f, {magic}, 0xEA; fma.rn.{kind}x2 pair, pair, one, $9; "
    "mov.b32 {{${low}, ${high}}}, pair;"
)
"""Two codes of a word in the halves of a register, as numbers: `(word & mask) | magic`, less the zero."""


def _unpack(kind: str, magic: str, one: str) -> tl.constexpr:
    """PTX that makes eight 16-bit numbers of a word ($8), and adds the two in a register ($9) to each pair."""
    lines = [f"{{ .reg .b32 word, pair, one; mov.b32 word, $8; mov.b32 one, {one};"]
    for pair in range(4):
        lines += ["shr.u32 word, word, 4;"] * (pair > 0)
        lines.append(_PAIR.format(kind=kind, magic=magic, low=2 * pair, high=2 * pair + 1))
    return tl.constexpr("\n".join([*lines, "}"]))


_UNPACK_BF16 = _unpack("bf16", "0x43004300", "0x3f803f80")
_UNPACK_F16 = _unpack("f16", "0x64006400", "0x3c003c00")


@triton.jit
def int4_values(  # type: ignore[no-untyped-def]
    data, zeros, n, at, outputs, inputs, width, first, columns,
    ZEROS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    FLOAT16: tl.constexpr,
):  # fmt: skip
    """Codes less their zeros, exact in bfloat16 or float16 [OUTPUTS, INPUTS]: two at once in a register.

    The bits of a code below those of 128 are the bfloat16 number 128 + code, below those of 1024 the float16 number
    1024 + code; so are those of a zero, which is subtracted (FasterTransformer's conversion of 4-bit weights).
    """
    WORDS: tl.constexpr = INPUTS // 8
    inside = n < outputs
    item = at // 8 + tl.arange(0, WORDS)
    mask = inside[:, None] if EVEN else inside[:, None] & (item * 8 < inputs)[None, :]
    words = tl.load(data + (n.to(tl.int64) * width)[:, None] + item[None, :], mask=mask, other=0)
    # What is added: the numbers of the zero, with their signs.
    base: tl.constexpr = -0x1BFF1C00 if FLOAT16 else -0x3CFF3D00
    if ZEROS:
        # A group is a step or several: the zero of an output is that of all its words here.
        zero = tl.load(zeros + first + at // GROUP, mask=inside, other=0).to(tl.int32)
        shift = (base | zero | (zero << 16))[:, None] + tl.zeros_like(words)
    else:
        shift = tl.zeros_like(words) + (base | 0x00080008)
    o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
        _UNPACK_F16 if FLOAT16 else _UNPACK_BF16,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [words, shift],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=1,
    )
    low = tl.join(tl.join(o0, o4), tl.join(o2, o6))
    high = tl.join(tl.join(o1, o5), tl.join(o3, o7))
    values = tl.reshape(tl.join(low, high), [OUTPUTS, INPUTS])
    return values.to(tl.float16, bitcast=True) if FLOAT16 else values.to(tl.bfloat16, bitcast=True)


_PAIR_BF16 = tl.constexpr(
    "{ .reg .b32 pair; lop3.b32 pair, $1, 0x000f000f, 0x43004300, 0xEA; add.rn.bf16x2 $0, pair, $2; }"
)
_PAIR_F16 = tl.constexpr(
    "{ .reg .b32 pair; lop3.b32 pair, $1, 0x000f000f, 0x64006400, 0xEA; add.rn.f16x2 $0, pair, $2; }"
)
_HALVES = tl.constexpr("mov.b32 {$0, $1}, $2;")


@triton.jit
def int4_shift(zeros, places, mask, ZEROS: tl.constexpr, FLOAT16: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is added to a pair of codes that are numbers already: the numbers of their zero, with their signs."""
    base: tl.constexpr = -0x1BFF1C00 if FLOAT16 else -0x3CFF3D00
    if ZEROS:
        zero = tl.load(zeros + places, mask=mask, other=0).to(tl.int32)
        return base | zero | (zero << 16)
    else:
        return tl.zeros_like(places) + (base | 0x00080008)


@triton.jit
def int4_pairs(words, shift, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, FLOAT16: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `int4_values`, from words [OUTPUTS, INPUTS / 8] and shifts [OUTPUTS], with inputs in their own order.

    Each pair is taken from a word of its own. In the tensor cores' operand four threads share a word's eight inputs, a
    pair each; so each of them reads the whole word from shared memory, shifts it once, and has the operand in its
    registers, where unpacking whole words leads through shared memory again.
    """
    WORDS: tl.constexpr = INPUTS // 8
    place = tl.arange(0, 4) * 4
    spread = words[:, :, None] >> place[None, None, :]
    shift = tl.broadcast_to(shift[:, None, None], [OUTPUTS, WORDS, 4])
    text: tl.constexpr = _PAIR_F16 if FLOAT16 else _PAIR_BF16
    pair = tl.inline_asm_elementwise(text, "=r,r,r", [spread, shift], dtype=tl.int32, is_pure=True, pack=1)
    low, high = tl.inline_asm_elementwise(_HALVES, "=h,=h,r", [pair], dtype=(tl.int16, tl.int16), is_pure=True, pack=1)
    values = tl.reshape(tl.join(low, high), [OUTPUTS, INPUTS])
    return values.to(tl.float16, bitcast=True) if FLOAT16 else values.to(tl.bfloat16, bitcast=True)


@triton.jit
def scale_at(scales, places, mask, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    return as_scale(tl.load(scales + places, mask=mask, other=0), KIND)


@triton.jit
def as_scale(raw, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == "mxfp4":
        # 2 ** (raw - 127), of which the bits are the exponent's alone; 2 ** -127 is a subnormal number.
        return tl.where(raw == 0, 0x00400000, raw.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


@triton.jit
def zero_at(zeros, places, mask, KIND: tl.constexpr, ZEROS: tl.constexpr):  # type: ignore[no-untyped-def]
    if ZEROS:
        return tl.load(zeros + places, mask=mask, other=0).to(tl.float32)
    elif KIND == "int4":
        return tl.zeros_like(places).to(tl.float32) + 8.0
    else:
        return tl.zeros_like(places).to(tl.float32)


@triton.jit
def tile_values(  # type: ignore[no-untyped-def]
    data, scales, zeros, n, at, outputs, inputs, width, columns,
    KIND: tl.constexpr, ZEROS: tl.constexpr, WHERE: tl.constexpr, BLOCK_OUT: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Values of a tile, float32 [OUTPUTS, INPUTS]; only with `WHERE` VALUE multiplied by their scales."""
    inside = n < outputs
    numbers = code_numbers(data, n.to(tl.int64) * width, inside, at, inputs, KIND, EVEN, OUTPUTS, INPUTS)
    first = (n // BLOCK_OUT) * columns
    if WHERE == 2:
        COUNT: tl.constexpr = INPUTS // GROUP
        group = at // GROUP + tl.arange(0, COUNT)
        places = first[:, None] + group[None, :]
        mask = inside[:, None] & (group < columns)[None, :]
        scale, zero = scale_at(scales, places, mask, KIND), zero_at(zeros, places, mask, KIND, ZEROS)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [OUTPUTS, COUNT, GROUP]), [OUTPUTS, INPUTS])
        zero = tl.reshape(tl.broadcast_to(zero[:, :, None], [OUTPUTS, COUNT, GROUP]), [OUTPUTS, INPUTS])
        return (numbers - zero) * scale
    else:
        if ZEROS or KIND == "int4":
            places = first if WHERE == 0 else first + at // GROUP
            numbers = numbers - zero_at(zeros, places, inside, KIND, ZEROS)[:, None]
        return numbers
