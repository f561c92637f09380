"""Triton kernels of `kernels.sampling`, which says how they divide the work."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.sampling_math import (
    NOTHING,
    RADIX,
    distance,
    gumbel,
    key_value,
    mass_of,
    pack,
    packed_id,
    packed_value,
    rank_key,
    stream_key,
)

_INF = tl.constexpr(float("inf"))


@triton.jit
def _wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    if OVERLAP:
        # Before anything is read or written, so that a kernel's end implies the end of all before it.
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
def _walk(sums, target, UNTIL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first UNTIL digits of the key at which the running sum reaches the target, and what is lacking before it."""
    bins = tl.arange(0, RADIX)
    prefix = target * 0
    for place in tl.static_range(UNTIL):
        part = tl.load(sums + place * RADIX + bins)
        short = tl.cumsum(part, 0) < target
        digit = tl.minimum(tl.sum(short.to(tl.int32), 0), RADIX - 1)
        target -= tl.sum(tl.where(bins < digit, part, 0), 0)
        prefix = prefix * RADIX + digit
    return prefix, target


@triton.jit
def _nucleus_target(sums, top_p):  # type: ignore[no-untyped-def]
    """The mass that top-p asks for: p of what the first digit's sums add up to, at least the smallest unit."""
    total = tl.sum(tl.load(sums + tl.arange(0, RADIX)), 0)
    return tl.maximum((total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _edge(sums, target, peak, temperature, DIGITS: tl.constexpr, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Distance of the token at which the running sum reaches the target."""
    key, _ = _walk(sums, target, DIGITS)
    return distance(key_value(key, SHIFT), peak, temperature)


@triton.jit(
    do_not_specialize=["blocks", "sums_size"],
    do_not_specialize_on_alignment=["peaks", "sums"],
)
def scan_kernel(  # type: ignore[no-untyped-def]
    logits, peaks, sums, vocab, stride, blocks, sums_size,
    BLOCK: tl.constexpr, SUMS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: the best candidate of a block. The first of a row sets its SUMS sums to zero."""
    _wait(OVERLAP)
    block, row = tl.program_id(0), tl.program_id(1)
    x, ids, inside = _load_block(logits, row, block, vocab, stride, BLOCK)
    best = tl.max(tl.where(inside, pack(x, ids), NOTHING), 0)
    tl.store(peaks + row * blocks + block, best)
    if SUMS > 0 and block == 0:
        i = tl.arange(0, SUMS)
        tl.store(sums + row * sums_size + i, tl.zeros([SUMS], tl.int64), mask=i < sums_size)


@triton.jit(
    do_not_specialize=["blocks", "sums_size", "real_width", "integer_width"],
    do_not_specialize_on_alignment=["peaks", "sums", "reals", "integers", "slots"],
)
def digit_kernel(  # type: ignore[no-untyped-def]
    logits, peaks, sums, reals, integers, slots, vocab, stride, blocks, sums_size, real_width, integer_width,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DIGITS: tl.constexpr, PLACE: tl.constexpr, SHIFT: tl.constexpr,
    TOP_K: tl.constexpr, NUCLEUS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program adds a block's tokens to the sums of digit PLACE: those whose digits before agree with the edge's.

    Counts for the k-th token's key, or with NUCLEUS masses for the key of top-p's edge; there TOP_K says that the
    row's first sums are those of top-k, which comes before.
    """
    _wait(OVERLAP)
    block, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    temperature = tl.load(reals + slot * real_width)
    top_p = tl.load(reals + slot * real_width + 1)
    top_k = tl.load(integers + slot * integer_width + 1)
    peak = packed_value(_best_of(peaks + row * blocks, blocks, BLOCKS))
    wanted = (temperature > 0) & (tl.abs(peak) < _INF)
    if NUCLEUS:
        wanted = wanted & (top_p < 1)
    else:
        wanted = wanted & (top_k > 0)
    if wanted:
        x, _, inside = _load_block(logits, row, block, vocab, stride, BLOCK)
        key = rank_key(x, SHIFT)
        own = sums + row * sums_size
        if NUCLEUS:
            far = distance(x, peak, temperature)
            weight = mass_of(far)
            if TOP_K:
                kept = _INF + top_p * 0
                if top_k > 0:
                    kept = _edge(own, tl.minimum(top_k, vocab), peak, temperature, DIGITS, SHIFT)
                weight = tl.where(far <= kept, weight, 0)
                own += DIGITS * RADIX
            target = top_k * 0
            if PLACE > 0:
                target = _nucleus_target(own, top_p)
        else:
            weight = tl.full([BLOCK], 1, tl.int64)
            target = tl.minimum(top_k, vocab)
        prefix, _ = _walk(own, target, PLACE)
        rest = key >> (4 * (DIGITS - 1 - PLACE))
        weight = tl.where(inside & ((rest >> 4) == prefix), weight, 0)
        digit = (rest & (RADIX - 1)).to(tl.int32)
        bins = tl.arange(0, RADIX)
        part = tl.sum(tl.where(digit[:, None] == bins[None, :], weight[:, None], 0), 0)
        # Integers: the order in which blocks add does not show.
        tl.atomic_add(own + PLACE * RADIX + bins, part, mask=part > 0, sem="relaxed")


@triton.jit
def _edges(  # type: ignore[no-untyped-def]
    sums, top_k, top_p, vocab, peak, temperature,
    DIGITS: tl.constexpr, SHIFT: tl.constexpr, TOP_K: tl.constexpr, NUCLEUS: tl.constexpr,
):  # fmt: skip
    """The largest distance that top-k and top-p keep; infinite where neither is set."""
    edge = _INF + top_p * 0
    if TOP_K:
        if top_k > 0:
            edge = _edge(sums, tl.minimum(top_k, vocab), peak, temperature, DIGITS, SHIFT)
        sums += DIGITS * RADIX
    if NUCLEUS:
        if top_p < 1:
            edge = _edge(sums, _nucleus_target(sums, top_p), peak, temperature, DIGITS, SHIFT)
    return edge


@triton.jit(
    do_not_specialize=["blocks", "sums_size", "real_width", "integer_width"],
    do_not_specialize_on_alignment=["peaks", "sums", "draws", "reals", "integers", "slots", "positions"],
)
def draw_kernel(  # type: ignore[no-untyped-def]
    logits, peaks, sums, draws, reals, integers, slots, positions,
    vocab, stride, blocks, sums_size, real_width, integer_width,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DIGITS: tl.constexpr, SHIFT: tl.constexpr,
    TOP_K: tl.constexpr, NUCLEUS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: what a block has to offer with noise, above the edge and at it.

    `draws` int64 [B, 4, blocks]: the best packed candidates above the edge and at it, how many tokens are at it, and
    the mass above it.
    """
    _wait(OVERLAP)
    block, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    temperature = tl.load(reals + slot * real_width)
    peak = packed_value(_best_of(peaks + row * blocks, blocks, BLOCKS))
    if (temperature > 0) & (tl.abs(peak) < _INF):
        top_p = tl.load(reals + slot * real_width + 1)
        log_min_p = tl.load(reals + slot * real_width + 2)
        top_k = tl.load(integers + slot * integer_width + 1)
        key = stream_key(tl.load(integers + slot * integer_width), tl.load(positions + row))
        x, ids, inside = _load_block(logits, row, block, vocab, stride, BLOCK)
        far = distance(x, peak, temperature)
        own = sums + row * sums_size
        edge = _edges(own, top_k, top_p, vocab, peak, temperature, DIGITS, SHIFT, TOP_K, NUCLEUS)
        above, tied = inside & (far < edge), inside & (far == edge)
        candidate = pack(gumbel(key, ids) - far, ids)
        candidate = tl.where(-far >= log_min_p, candidate, NOTHING)
        target = draws + row * 4 * blocks + block
        tl.store(target, tl.max(tl.where(above, candidate, NOTHING), 0))
        tl.store(target + blocks, tl.max(tl.where(tied, candidate, NOTHING), 0))
        if NUCLEUS:
            tl.store(target + 2 * blocks, tl.sum(tied.to(tl.int64), 0))
            tl.store(target + 3 * blocks, tl.sum(tl.where(above, mass_of(far), 0), 0))


@triton.jit
def _store_token(tokens, row, best):  # type: ignore[no-untyped-def]
    """The candidate's id; -1 where its value is NaN or -inf."""
    value = packed_value(best)
    usable = value > -_INF
    tl.store(tokens + row, tl.where(usable, packed_id(best), -1))


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["peaks", "tokens"])
def greedy_kernel(peaks, tokens, blocks, BLOCKS: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program: the token of a row from its blocks' candidates."""
    _wait(OVERLAP)
    row = tl.program_id(0)
    _store_token(tokens, row, _best_of(peaks + row * blocks, blocks, BLOCKS))


@triton.jit(
    do_not_specialize=["blocks", "sums_size", "real_width", "integer_width"],
    do_not_specialize_on_alignment=["peaks", "sums", "draws", "reals", "integers", "slots", "positions", "tokens"],
)
def pick_kernel(  # type: ignore[no-untyped-def]
    logits, peaks, sums, draws, reals, integers, slots, positions, tokens,
    vocab, stride, blocks, sums_size, real_width, integer_width,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DIGITS: tl.constexpr, SHIFT: tl.constexpr,
    TOP_K: tl.constexpr, NUCLEUS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: the token of a row, greedy or drawn.

    Of the tokens at top-p's edge, the first by id enter until p is reached. That cuts through one block at most,
    whose share is drawn again here.
    """
    _wait(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    temperature = tl.load(reals + slot * real_width)
    best = _best_of(peaks + row * blocks, blocks, BLOCKS)
    peak = packed_value(best)
    if temperature > 0:
        if tl.abs(peak) < _INF:
            own = draws + row * 4 * blocks
            best = _best_of(own, blocks, BLOCKS)
            at_edge = _best_of(own + blocks, blocks, BLOCKS)
            if NUCLEUS:
                top_p = tl.load(reals + slot * real_width + 1)
                if top_p < 1:
                    top_k = tl.load(integers + slot * integer_width + 1)
                    edges = sums + row * sums_size
                    edge = _edges(edges, top_k, top_p, vocab, peak, temperature, DIGITS, SHIFT, TOP_K, NUCLEUS)
                    if TOP_K:
                        edges += DIGITS * RADIX
                    i = tl.arange(0, BLOCKS)
                    mass = tl.sum(tl.load(own + 3 * blocks + i, mask=i < blocks, other=0), 0)
                    each = mass_of(edge)  # above 0: a token of mass 0 comes after p was reached
                    quota = (_nucleus_target(edges, top_p) - mass + each - 1) // each
                    running = tl.cumsum(tl.load(own + 2 * blocks + i, mask=i < blocks, other=0), 0)
                    whole = running <= quota
                    tied = tl.load(own + blocks + i, mask=i < blocks, other=NOTHING)
                    at_edge = tl.max(tl.where(whole, tied, NOTHING), 0)
                    left = quota - tl.max(tl.where(whole, running, 0), 0)
                    cut = tl.sum(whole.to(tl.int32), 0)
                    if (cut < blocks) & (left > 0):
                        x, ids, inside = _load_block(logits, row, cut, vocab, stride, BLOCK)
                        far = distance(x, peak, temperature)
                        entering = inside & (far == edge)
                        entering = entering & (tl.cumsum(entering.to(tl.int32), 0) <= left)
                        log_min_p = tl.load(reals + slot * real_width + 2)
                        key = stream_key(tl.load(integers + slot * integer_width), tl.load(positions + row))
                        candidate = pack(gumbel(key, ids) - far, ids)
                        candidate = tl.where(entering & (-far >= log_min_p), candidate, NOTHING)
                        at_edge = tl.maximum(at_edge, tl.max(candidate, 0))
            best = tl.maximum(best, at_edge)
        else:
            best = best * 0 + NOTHING
    _store_token(tokens, row, best)
