"""Triton kernels of `kernels.sampling` that find the best of all tokens with noise, and what is above it.

Where no row has top-k, top-p or min-p, that is the row's token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybridgen.kernels.sampling.arithmetic import (
    NOTHING,
    ROUGH,
    distance,
    gumbel,
    mass_of,
    ordered,
    pack,
    packed_id,
    packed_value,
    reciprocal,
    rough_gumbel,
    stream_key,
)
from hybridgen.kernels.sampling.kernels import RECORD, _best_of, _filters, _load_block, _recorded, _store_token, _wait

_INF = tl.constexpr(float("inf"))
_MOST_IDS = tl.constexpr(1 << 19)
"""All ids are below it, see `ops`."""
_CONTESTED = tl.constexpr(1 << 32)
"""Added to the id of a block in which other tokens may be better."""


@triton.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(
    do_not_specialize=["blocks", "real_width", "integer_width"],
    do_not_specialize_on_alignment=["peaks", "draws", "reals", "integers", "slots", "positions"],
)
def draw_first_kernel(  # type: ignore[no-untyped-def]
    logits, peaks, draws, reals, integers, slots, positions,
    vocab, stride, blocks, real_width, integer_width,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: a block's largest logit and, where the row draws, the token that is best with noise.

    The row's largest logit is not known yet, and distances from another one have other last bits. So the block's best
    token is found by rough noise and rough distances from the block's own largest logit. They give each candidate
    within ROUGH, but for what all tokens of the block have in common, where it is above -5; what is below -4 cannot be
    the row's, whose most likely token has a candidate above -2.9. So the best by exact values is at most 2 * ROUGH
    below the best by rough ones. Where another token is as near as that, the block is marked, and `pick_first_kernel`
    looks.

    `draws` int64 [B, blocks]: the id, with _CONTESTED where marked; -1: there is none.
    """
    _wait(OVERLAP)
    block, row = tl.program_id(0), tl.program_id(1)
    x, ids, inside = _load_block(logits, row, block, vocab, stride, BLOCK)
    slot = tl.load(slots + row)
    temperature = tl.load(reals + slot * real_width)
    place = row * blocks + block
    if temperature > 0:
        top = tl.reduce(x, 0, _larger)
        tl.store(peaks + place, ordered(top).to(tl.int64) << 32)  # nobody asks for the id where a row draws
        key = stream_key(tl.load(integers + slot * integer_width), tl.load(positions + row))
        inverse = reciprocal(temperature)
        rough = tl.where(x > -_INF, rough_gumbel(key, ids) - (top - x) * inverse, -_INF)
        near = (rough >= tl.max(rough, 0) - 2 * ROUGH) & (rough > -_INF)
        # One sum tells whether it is one token, and which: there are at most 4096.
        found = tl.sum(tl.where(near, ids + _MOST_IDS, 0), 0)
        best = (found - _MOST_IDS).to(tl.int64)
        if (found < _MOST_IDS) | (found >= 2 * _MOST_IDS) | (inverse == 0.0):
            best = tl.max(tl.where(near, ids, -1), 0).to(tl.int64)
            best = tl.where(best >= 0, best + _CONTESTED, best)
        tl.store(draws + place, best)
    else:
        tl.store(peaks + place, tl.max(tl.where(inside, pack(x, ids), NOTHING), 0))


@triton.jit(
    do_not_specialize=["blocks", "sums_size", "real_width", "integer_width"],
    do_not_specialize_on_alignment=[
        "peaks", "draws", "sums", "records", "reals", "integers", "slots", "positions", "tokens",
    ],
)  # fmt: skip
def pick_first_kernel(  # type: ignore[no-untyped-def]
    logits, peaks, draws, sums, records, reals, integers, slots, positions, tokens,
    vocab, stride, blocks, sums_size, real_width, integer_width,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SUMS: tl.constexpr, FILTERED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: the best token of a row, greedy or drawn, by exact values.

    The id that a marked block has is by up to 4 * ROUGH worse than the block's best token: where that would make it the
    row's best, and where rough distances are worth nothing, all tokens of the block are looked at.

    Where FILTERED, other kernels follow: the row gets a record (see `_settled`), and its SUMS sums are set to zero.
    """
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    temperature = tl.load(reals + slot * real_width)
    key = stream_key(tl.load(integers + slot * integer_width), tl.load(positions + row))
    _wait(OVERLAP)
    best = _best_of(peaks + row * blocks, blocks, BLOCKS)
    peak = packed_value(best)
    far = temperature * 0 - 1.0
    if temperature > 0:
        best = best * 0 + NOTHING
        if tl.abs(peak) < _INF:
            own_logits = logits + row.to(tl.int64) * stride
            i = tl.arange(0, BLOCKS)
            drawn = tl.load(draws + row * blocks + i, mask=i < blocks, other=-1)
            exists, winners = drawn >= 0, (drawn & 0xFFFFFFFF).to(tl.int32)
            logit = tl.load(own_logits + winners, mask=exists, other=-_INF).to(tl.float32)
            score = tl.where(exists, gumbel(key, winners) - distance(logit, peak, temperature), -_INF)
            best = tl.max(tl.where(exists, pack(score, winners), NOTHING), 0)
            slack = tl.where(reciprocal(temperature) > 0.0, 4 * ROUGH, _INF)
            open_blocks = (drawn >= _CONTESTED) & (score + slack >= packed_value(best))
            left = tl.sum(open_blocks.to(tl.int32), 0)
            while left > 0:
                block = tl.min(tl.where(open_blocks, i, BLOCKS), 0)
                x, ids, inside = _load_block(logits, row, block, vocab, stride, BLOCK)
                candidate = pack(gumbel(key, ids) - distance(x, peak, temperature), ids)
                best = tl.maximum(best, tl.max(tl.where(inside, candidate, NOTHING), 0))
                open_blocks = open_blocks & (i != block)
                left -= 1
            if FILTERED:
                far = distance(tl.load(own_logits + packed_id(best)).to(tl.float32), peak, temperature)
    token = _store_token(tokens, row, best)
    if FILTERED:
        i = tl.arange(0, RECORD)
        fields = tl.where(i == 0, peak.to(tl.int32, bitcast=True), far.to(tl.int32, bitcast=True))
        tl.store(records + row * RECORD + i, tl.where(i < 2, fields.to(tl.int64), tl.where(i == 2, token, 0)))
    if SUMS > 0:
        i = tl.arange(0, SUMS)
        tl.store(sums + row * sums_size + i, tl.zeros([SUMS], tl.int64), mask=i < sums_size)


@triton.jit(
    do_not_specialize=["blocks", "real_width", "integer_width"],
    do_not_specialize_on_alignment=["records", "reals", "integers", "slots"],
)
def weigh_kernel(  # type: ignore[no-untyped-def]
    logits, records, reals, integers, slots,
    vocab, stride, blocks, real_width, integer_width,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, NUCLEUS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program adds to a row's record what a block has that comes before the row's best token."""
    block, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    temperature = tl.load(reals + slot * real_width)
    top_k, top_p, _ = _filters(reals, integers, slot, real_width, integer_width, TOP_K, NUCLEUS)
    _wait(OVERLAP)
    record = records + row * RECORD
    peak, first = _recorded(record), _recorded(record + 1)
    if (first >= 0) & ((top_k > 0) | (top_p < 1)):
        x, ids, inside = _load_block(logits, row, block, vocab, stride, BLOCK)
        far = distance(x, peak, temperature)
        above = inside & (far < first)
        tl.atomic_add(record + 3, tl.sum(above.to(tl.int32), 0).to(tl.int64), sem="relaxed")
        if NUCLEUS:
            ties = inside & (far == first) & (ids < tl.load(record + 2))
            mass = tl.where(inside, mass_of(far), 0)
            tl.atomic_add(record + 4, tl.sum(ties.to(tl.int32), 0).to(tl.int64), sem="relaxed")
            tl.atomic_add(record + 5, tl.sum(tl.where(above, mass, 0), 0), sem="relaxed")
            tl.atomic_add(record + 6, tl.sum(mass, 0), sem="relaxed")
