"""Triton functions of the sampling kernels: orders of floats, probability masses, noise.

Each has a torch counterpart that the tests compare it with: `hybridgen.sampling.random` for the noise,
`hybridgen.sampling.processors` for distance (`temper`) and mass (`softmax`). Kernels that call these are compiled
without contraction of products and sums, so that a value has the same bits in every kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**63))
"""A packed candidate that loses to every token; its value is NaN."""
MASS_BITS = tl.constexpr(44)
"""A row's most likely token has the mass 2^44; below 2^19 tokens, a sum fits int64."""
RADIX = tl.constexpr(16)
ROUGH = tl.constexpr(2.0**-9)
"""How far a candidate of `rough_gumbel` and `reciprocal` may be from `gumbel - distance`, where that is above -5."""


@triton.jit
def ordered(x):  # type: ignore[no-untyped-def]
    """int32 in the order of float32: NaN above all, both zeros equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFF, bits)


@triton.jit
def unordered(order):  # type: ignore[no-untyped-def]
    """The float32 that `ordered` came from."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(x, ids):  # type: ignore[no-untyped-def]
    """int64 whose maximum is the largest value's, and of equal ones the lowest id's."""
    return (ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def packed_value(packed):  # type: ignore[no-untyped-def]
    """The float32 of `pack`."""
    return unordered((packed >> 32).to(tl.int32))


@triton.jit
def packed_id(packed):  # type: ignore[no-untyped-def]
    """The id of `pack`; int64."""
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF)


@triton.jit
def rank_key(x, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """int64 with 32 - SHIFT bits, the larger the less likely; SHIFT: bits of float32 that the logits' dtype lacks."""
    return ((ordered(x) ^ 0x7FFFFFFF).to(tl.int64) & 0xFFFFFFFF) >> SHIFT


@triton.jit
def key_value(key, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The logit of a key that some logit has. The bits shifted out of a number above -0 were ones."""
    key = key << SHIFT
    key = tl.where(key < 0x80000000, key | ((1 << SHIFT) - 1), key)
    return unordered(key.to(tl.int32) ^ 0x7FFFFFFF)


@triton.jit
def distance(x, peak, temperature):  # type: ignore[no-untyped-def]
    """`(peak - x) / temperature`, rounded as torch rounds it: minus the tempered logit."""
    return tl.div_rn(peak - x, temperature)


@triton.jit
def reciprocal(temperature):  # type: ignore[no-untyped-def]
    """`1 / temperature`; 0 where that may be infinite or have fewer bits.

    `(peak - x) * reciprocal(temperature)` is `distance` within 2^-20 of itself, or within 1e-30, with one division for
    all tokens.
    """
    return tl.where((temperature > 1e-30) & (temperature < 1e30), 1.0 / temperature, 0.0)


@triton.jit
def mass_of(far):  # type: ignore[no-untyped-def]
    """`exp(-distance)` in units of 2^-44; int64."""
    return (tl.exp2(far * -1.4426950408889634) * 17592186044416.0).to(tl.int64)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """`random.mix64`; uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def stream_key(seed, position):  # type: ignore[no-untyped-def]
    """The stream of a row (`random.random_bits`); int64 scalars to uint64."""
    return _mix(seed.to(tl.uint64) ^ _mix(position.to(tl.uint64)))


@triton.jit
def _log(x):  # type: ignore[no-untyped-def]
    """The logarithm of a normal number above 0 (fdlibm's e_logf.c), since the device's own is coarse near 1."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    power = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    series = z * (0.66666662693 + z * (0.40000972152 + z * (0.28498786688 + z * 0.24279078841)))
    half = 0.5 * f * f
    return power * 6.9313812256e-01 - ((half - (s * (half + series) + power * 9.0580006145e-06)) - f)


@triton.jit
def _uniform(key, ids):  # type: ignore[no-untyped-def]
    """`random.bits_to_uniform` of token ids, bit for bit: from 2^-41 to 1 - 2^-24."""
    bits = _mix(key + (ids + 1).to(tl.uint32).to(tl.uint64) * 0x9E3779B97F4A7C15)
    uniform = ((bits >> 24).to(tl.int64).to(tl.float32) + 0.5) * 9.094947017729282e-13  # 2^-40
    return tl.minimum(uniform, 0.99999994)  # 1 - 2^-24


@triton.jit
def gumbel(key, ids):  # type: ignore[no-untyped-def]
    """`random.gumbel_noise` of token ids: the same uniform bits, logarithms within the last bits. Above -2.9."""
    uniform = _uniform(key, ids)
    rest = 1.0 - uniform
    lost = (1.0 - rest) - uniform  # what the rounding of the line before took away
    return -_log(-(_log(rest) + lost / rest))


@triton.jit
def _log2(x):  # type: ignore[no-untyped-def]
    """The device's instruction, which `tl.log2` is not: off by 2^-22, between 0.5 and 2, or by that share of itself."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def rough_gumbel(key, ids):  # type: ignore[no-untyped-def]
    """`gumbel` within a third of ROUGH; the rest is for devices whose logarithm is worse.

    With u the uniform number, -log(1 - u) is u + u^2 / 2 + ...: below 2^-10, u lacks less than 0.0005 of it. Above,
    the rounding of 1 - u changes it by up to 2^-24, and the device's logarithm by 2^-22 * log(2), or by 2^-22 of
    itself: together less than 0.00025 of a result above 2^-10. So what the outer logarithm gets is right to 0.0005 of
    itself, and what it gives to 0.0005. The device's own error there is 2^-22 of up to 41, and that of `gumbel` a few
    last bits of up to 29: both are below 0.00002, as is that of a distance by `reciprocal`, 2^-20 of up to 34.
    """
    uniform = _uniform(key, ids)
    wait = tl.where(uniform < 0.0009765625, uniform, _log2(1.0 - uniform) * -0.6931471805599453)
    return _log2(wait) * -0.6931471805599453
