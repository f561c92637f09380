"""Triton kernels of `kernels.sampling`, which says how they divide the work."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.sampling.arithmetic import (
    NOTHING,
    RADIX,
    ROUGH,
    distance,
    gumbel,
    key_value,
    mass_of,
    pack,
    packed_id,
    packed_value,
    rank_key,
    rough_gumbel,
    stream_key,
)

_INF = tl.constexpr(float("inf"))
RECORD = tl.constexpr(8)
"""Numbers of a row's record, see `_settled`."""


@triton.jit
def _wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until the kernel before has ended; then the next may start.

    The first kernel of a call waits before it reads anything. The kernels after it read the call's inputs without
    waiting: one starts when all programs of the kernel before it are past this, so all that came before that kernel has
    ended. Nobody writes before this, so that a kernel's end implies the end of all before it.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _load_block(logits, row, block, vocab, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits float32 [BLOCK], their ids, and which of them exist."""
    ids = block * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=inside, other=-float("inf"))
    return x.to(tl.float32), ids, inside


@triton.jit
def _best_of(parts, blocks, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of a row's packed candidates, one per block."""
    i = tl.arange(0, BLOCKS)
    return tl.max(tl.load(parts + i, mask=i < blocks, other=NOTHING), 0)


@triton.jit
def _filters(  # type: ignore[no-untyped-def]
    reals, integers, slot, real_width, integer_width, TOP_K: tl.constexpr, NUCLEUS: tl.constexpr
):  # fmt: skip
    """A row's top-k, top-p and logarithm of min-p; the former two are off where the batch has none."""
    top_k = tl.load(integers + slot * integer_width + 1)
    top_p = tl.load(reals + slot * real_width + 1)
    if not TOP_K:
        top_k *= 0
    if not NUCLEUS:
        top_p = top_p * 0 + 1
    return top_k, top_p, tl.load(reals + slot * real_width + 2)


@triton.jit
def _recorded(place):  # type: ignore[no-untyped-def]
    """A float32 of a record."""
    return tl.load(place).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _share(total, top_p):  # type: ignore[no-untyped-def]
    """The mass that top-p asks for: p of all, at least the smallest unit."""
    return tl.maximum((total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _settled(record, top_k, top_p, log_min_p):  # type: ignore[no-untyped-def]
    """Whether the row has its token: it is greedy, has nothing to choose, or its best token of all is one that is kept.

    A record is int64 [RECORD]:
    0, 1: the bits of the largest logit, and of the best token's distance from it (below 0 where the row does not draw);
    2: the best token;
    3, 4: how many tokens have a smaller distance; how many have the same distance and a smaller id;
    5, 6: the mass of those with a smaller distance; the mass of all tokens.

    Top-p asks for a share of the mass that top-k keeps, which is not known here. It is at least that of the best token
    and those before it, so that is taken in its place: with both, a row may stay open whose token is kept.
    """
    far = _recorded(record + 1)
    each = mass_of(far)
    before = tl.load(record + 5) + tl.load(record + 4) * each
    kept = (-far >= log_min_p) & ((top_k <= 0) | (tl.load(record + 3) < top_k))
    total = tl.where(top_k > 0, before + each, tl.load(record + 6))
    return (far < 0) | (kept & ((top_p >= 1) | (before < _share(total, top_p))))


@triton.jit
def _nucleus_target(sums, top_p):  # type: ignore[no-untyped-def]
    """`_share` of the last sum of the first digit."""
    return _share(tl.load(sums + RADIX - 1), top_p)


@triton.jit
def _prefix(sums, target, PLACES: tl.constexpr, DIGITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first PLACES digits of the edge's key, and what the tokens before these lack to the target; int64.

    A part of the sums, for top-k or for top-p, is int64 [DIGITS, RADIX], of each digit the weight of the tokens with at
    most that value there, and int64 [DIGITS, 2], what this returned after each digit.
    """
    prefix, lacking = target * 0, target
    if PLACES > 0:
        if PLACES > 1:
            prefix = tl.load(sums + DIGITS * RADIX + 2 * (PLACES - 2))
            lacking = tl.load(sums + DIGITS * RADIX + 2 * (PLACES - 2) + 1)
        upto = tl.load(sums + (PLACES - 1) * RADIX + tl.arange(0, RADIX))
        short = upto < lacking
        prefix = prefix * RADIX + tl.sum(short.to(tl.int32), 0)
        lacking -= tl.max(tl.where(short, upto, 0), 0)
    return prefix, lacking


@triton.jit
def _remember(sums, prefix, lacking, here, PLACES: tl.constexpr, DIGITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keep what `_prefix` returned, for the kernels that follow."""
    if PLACES > 0:
        place = sums + DIGITS * RADIX + 2 * (PLACES - 1)
        tl.store(place, prefix, mask=here)
        tl.store(place + 1, lacking, mask=here)


@triton.jit
def _edge(sums, peak, temperature, DIGITS: tl.constexpr, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Distance of the token at the edge, whose key is complete."""
    key = tl.load(sums + DIGITS * RADIX + 2 * (DIGITS - 1))
    return distance(key_value(key, SHIFT), peak, temperature)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["peaks"])
def scan_kernel(logits, peaks, vocab, stride, blocks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program: the best candidate of a block."""
    _wait(OVERLAP)
    block, row = tl.program_id(0), tl.program_id(1)
    x, ids, inside = _load_block(logits, row, block, vocab, stride, BLOCK)
    best = tl.max(tl.where(inside, pack(x, ids), NOTHING), 0)
    tl.store(peaks + row * blocks + block, best)


@triton.jit(
    do_not_specialize=["blocks", "sums_size", "real_width", "integer_width"],
    do_not_specialize_on_alignment=["sums", "records", "reals", "integers", "slots"],
)
def digit_kernel(  # type: ignore[no-untyped-def]
    logits, sums, records, reals, integers, slots, vocab, stride, blocks, sums_size, real_width, integer_width,
    BLOCK: tl.constexpr, DIGITS: tl.constexpr, PLACE: tl.constexpr, SHIFT: tl.constexpr,
    MASSES: tl.constexpr, TOP_K: tl.constexpr, NUCLEUS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program adds a block's tokens to the sums of digit PLACE: those whose digits before agree with the edge's.

    Counts for the k-th token's key, or with MASSES masses for the key of top-p's edge; with TOP_K, the row's first sums
    are those of top-k, which comes before.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    temperature = tl.load(reals + slot * real_width)
    top_k, top_p, log_min_p = _filters(reals, integers, slot, real_width, integer_width, TOP_K, NUCLEUS)
    if MASSES:
        wanted = top_p < 1
    else:
        wanted = top_k > 0
    _wait(OVERLAP)
    record = records + row * RECORD
    if wanted & (_settled(record, top_k, top_p, log_min_p) == 0):
        x, _ids, inside = _load_block(logits, row, block, vocab, stride, BLOCK)
        key, peak = rank_key(x, SHIFT), _recorded(record)
        own = sums + row * sums_size
        if MASSES:
            far = distance(x, peak, temperature)
            weight = mass_of(far)
            if TOP_K:
                if top_k > 0:
                    if PLACE == 0:
                        last, rest = _prefix(own, tl.minimum(top_k, vocab), DIGITS, DIGITS)
                        _remember(own, last, rest, block == 0, DIGITS, DIGITS)
                        kept = distance(key_value(last, SHIFT), peak, temperature)
                    else:
                        kept = _edge(own, peak, temperature, DIGITS, SHIFT)
                    weight = tl.where(far <= kept, weight, 0)
                own += DIGITS * (RADIX + 2)
            target = top_k * 0
            if PLACE == 1:
                target = _nucleus_target(own, top_p)
        else:
            weight = tl.full([BLOCK], 1, tl.int64)
            target = tl.minimum(top_k, vocab)
        prefix, lacking = _prefix(own, target, PLACE, DIGITS)
        _remember(own, prefix, lacking, block == 0, PLACE, DIGITS)
        high = key >> (4 * (DIGITS - 1 - PLACE))
        weight = tl.where(inside & ((high >> 4) == prefix), weight, 0)
        digit = (high & (RADIX - 1)).to(tl.int32)
        bins = tl.arange(0, RADIX)
        if MASSES:
            part = tl.sum(tl.where(digit[:, None] <= bins[None, :], weight[:, None], 0), 0)
        else:
            part = tl.cumsum(tl.histogram(digit, RADIX, mask=weight > 0), 0).to(tl.int64)
        # Integers: the order in which blocks add does not show.
        tl.atomic_add(own + PLACE * RADIX + bins, part, mask=part > 0, sem="relaxed")


@triton.jit
def _winner(kept, noise, far, ids, key):  # type: ignore[no-untyped-def]
    """Id of a block's best candidate among the kept tokens; -1 if none of them can be the row's.

    `noise` is rough. A candidate made of it is within ROUGH of the exact one, so that the best by exact values is at
    most 2 * ROUGH below the best by rough ones. Mostly no other token is as near as that; else exact values decide. The
    row's most likely token is always kept and has a candidate above -2.9, so nothing below -4 can win.
    """
    rough = tl.where(kept, noise - far, -_INF)
    near = rough >= tl.maximum(tl.max(rough, 0) - 2 * ROUGH, -4.0)
    first, last = tl.min(tl.where(near, ids, 0x7FFFFFFF), 0), tl.max(tl.where(near, ids, -1), 0)
    if first < last:
        last = packed_id(tl.max(tl.where(near, pack(gumbel(key, ids) - far, ids), NOTHING), 0)).to(tl.int32)
    return last


@triton.jit(
    do_not_specialize=["blocks", "sums_size", "real_width", "integer_width"],
    do_not_specialize_on_alignment=["sums", "records", "draws", "reals", "integers", "slots", "positions"],
)
def draw_kernel(  # type: ignore[no-untyped-def]
    logits, sums, records, draws, reals, integers, slots, positions,
    vocab, stride, blocks, sums_size, real_width, integer_width,
    BLOCK: tl.constexpr, DIGITS: tl.constexpr, SHIFT: tl.constexpr,
    TOP_K: tl.constexpr, NUCLEUS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: what a block has to offer with noise, above the edge and at it.

    `draws` int64 [B, 4, blocks]: ids of the best candidates above the edge and at it (see `_winner`), how many tokens
    are at it, and the mass above it; the last two with NUCLEUS alone.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    temperature = tl.load(reals + slot * real_width)
    top_k, top_p, log_min_p = _filters(reals, integers, slot, real_width, integer_width, TOP_K, NUCLEUS)
    key = stream_key(tl.load(integers + slot * integer_width), tl.load(positions + row))
    _wait(OVERLAP)
    record = records + row * RECORD
    if _settled(record, top_k, top_p, log_min_p) == 0:
        x, ids, inside = _load_block(logits, row, block, vocab, stride, BLOCK)
        noise, peak = rough_gumbel(key, ids), _recorded(record)
        far = distance(x, peak, temperature)
        own = sums + row * sums_size
        edge = _INF + top_p * 0
        if TOP_K:  # noqa: SIM102 - this one is decided when the kernel is compiled
            if top_k > 0:
                last, lacking = _prefix(own, top_k, DIGITS, DIGITS)
                edge = distance(key_value(last, SHIFT), peak, temperature)
        if NUCLEUS:
            if TOP_K:
                own += DIGITS * (RADIX + 2)
            if top_p < 1:
                last, lacking = _prefix(own, top_k, DIGITS, DIGITS)
                _remember(own, last, lacking, block == 0, DIGITS, DIGITS)
                edge = distance(key_value(last, SHIFT), peak, temperature)
        above, tied, likely = far < edge, inside & (far == edge), -far >= log_min_p
        target = draws + row * 4 * blocks + block
        tl.store(target, _winner(above & likely, noise, far, ids, key))
        if TOP_K or NUCLEUS:
            tl.store(target + blocks, _winner(tied & likely, noise, far, ids, key))
        if NUCLEUS:
            tl.store(target + 2 * blocks, tl.sum(tied.to(tl.int64), 0))
            tl.store(target + 3 * blocks, tl.sum(tl.where(above, mass_of(far), 0), 0))


@triton.jit
def _candidates(draws, logits, key, peak, temperature, blocks, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The packed candidates of a row's ids that `_winner` found, one per block; int64 [BLOCKS]."""
    i = tl.arange(0, BLOCKS)
    ids = tl.load(draws + i, mask=i < blocks, other=-1).to(tl.int32)
    x = tl.load(logits + ids, mask=ids >= 0, other=-float("inf")).to(tl.float32)
    candidate = pack(gumbel(key, ids) - distance(x, peak, temperature), ids)
    return tl.where(ids >= 0, candidate, NOTHING)


@triton.jit
def _store_token(tokens, row, best):  # type: ignore[no-untyped-def]
    """The candidate's id, which it returns; -1 where its value is NaN or -inf."""
    token = tl.where(packed_value(best) > -_INF, packed_id(best), -1)
    tl.store(tokens + row, token)
    return token


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["peaks", "tokens"])
def greedy_kernel(peaks, tokens, blocks, BLOCKS: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program: the token of a row from its blocks' candidates."""
    _wait(OVERLAP)
    row = tl.program_id(0)
    _store_token(tokens, row, _best_of(peaks + row * blocks, blocks, BLOCKS))


@triton.jit(
    do_not_specialize=["blocks", "sums_size", "real_width", "integer_width"],
    do_not_specialize_on_alignment=["sums", "records", "draws", "reals", "integers", "slots", "positions", "tokens"],
)
def pick_kernel(  # type: ignore[no-untyped-def]
    logits, sums, records, draws, reals, integers, slots, positions, tokens,
    vocab, stride, blocks, sums_size, real_width, integer_width,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DIGITS: tl.constexpr, SHIFT: tl.constexpr,
    TOP_K: tl.constexpr, NUCLEUS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: the token of a row that is not settled.

    Of the tokens at top-p's edge, the first by id enter until p is reached. That cuts through one block at most,
    whose share is drawn again here.
    """
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    temperature = tl.load(reals + slot * real_width)
    top_k, top_p, log_min_p = _filters(reals, integers, slot, real_width, integer_width, TOP_K, NUCLEUS)
    key = stream_key(tl.load(integers + slot * integer_width), tl.load(positions + row))
    _wait(OVERLAP)
    record = records + row * RECORD
    if _settled(record, top_k, top_p, log_min_p) == 0:
        peak = _recorded(record)
        own = draws + row * 4 * blocks
        own_logits = logits + row.to(tl.int64) * stride
        best = tl.max(_candidates(own, own_logits, key, peak, temperature, blocks, BLOCKS), 0)
        if TOP_K or NUCLEUS:
            tied = _candidates(own + blocks, own_logits, key, peak, temperature, blocks, BLOCKS)
            at_edge = tl.max(tied, 0)
            if NUCLEUS and top_p < 1:
                edges = sums + row * sums_size
                if TOP_K:
                    edges += DIGITS * (RADIX + 2)
                edge = _edge(edges, peak, temperature, DIGITS, SHIFT)
                i = tl.arange(0, BLOCKS)
                mass = tl.sum(tl.load(own + 3 * blocks + i, mask=i < blocks, other=0), 0)
                each = mass_of(edge)  # above 0: a token of mass 0 comes after p was reached
                quota = (_nucleus_target(edges, top_p) - mass + each - 1) // each
                running = tl.cumsum(tl.load(own + 2 * blocks + i, mask=i < blocks, other=0), 0)
                whole = running <= quota
                at_edge = tl.max(tl.where(whole, tied, NOTHING), 0)
                left = quota - tl.max(tl.where(whole, running, 0), 0)
                cut = tl.sum(whole.to(tl.int32), 0)
                if (cut < blocks) & (left > 0):
                    x, ids, inside = _load_block(logits, row, cut, vocab, stride, BLOCK)
                    far = distance(x, peak, temperature)
                    entering = inside & (far == edge)
                    entering = entering & (tl.cumsum(entering.to(tl.int32), 0) <= left)
                    candidate = pack(gumbel(key, ids) - far, ids)
                    candidate = tl.where(entering & (-far >= log_min_p), candidate, NOTHING)
                    at_edge = tl.maximum(at_edge, tl.max(candidate, 0))
            best = tl.maximum(best, at_edge)
        _store_token(tokens, row, best)
