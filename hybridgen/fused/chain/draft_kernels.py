"""Triton: what a drafting head's passes have beside the chain's kernels. `draft_head` says in which order they run.

Imports Triton; import it only where that is there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(
    do_not_specialize=["text_stride", "context", "padding", "rows"],
    do_not_specialize_on_alignment=["text", "slots", "lengths", "brought", "room"],
)
def place_kernel(  # type: ignore[no-untyped-def]
    text, slots, lengths, brought, room, tokens, positions, token_slots, places, place_slots,
    text_stride, context, padding, rows,
    FED: tl.constexpr, BLOCK_FED: tl.constexpr, MOST: tl.constexpr, BLOCK_MOST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: where a row's pairs lie, and what stands behind them.

    Of the FED tokens that a step fed: `tokens`, the one behind each, `positions` and `token_slots`; what was not
    accepted goes to the padding slot. Of the MOST passes: the position of each one's pair, and its slot, [MOST, rows].
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    length = tl.load(lengths + row)
    count = tl.load(brought + row)
    left = tl.load(room + row)
    fed = tl.arange(0, BLOCK_FED)
    position = length - count - 1 + fed
    known = (fed < count) & (position >= 0) & (fed < FED)
    behind = tl.minimum(position + 1, context - 1)
    token = tl.load(text + slot * text_stride + behind, mask=known, other=0)
    line = row * FED + fed
    tl.store(tokens + line, token.to(tl.int64), mask=fed < FED)
    tl.store(positions + line, tl.where(known, position, 0), mask=fed < FED)
    tl.store(token_slots + line, tl.where(known, slot, padding).to(tl.int32), mask=fed < FED)
    made = tl.arange(0, BLOCK_MOST)
    place = length + made - 2
    inside = (place >= 0) & (made - 2 < left)
    target = made * rows + row
    tl.store(places + target, tl.where(inside, place, 0), mask=made < MOST)
    tl.store(place_slots + target, tl.where(inside, slot, padding).to(tl.int32), mask=made < MOST)


@triton.jit(do_not_specialize=["vocab", "drafted"], do_not_specialize_on_alignment=["tokens"])
def pair_kernel(  # type: ignore[no-untyped-def]
    hidden, tokens, names, embedding, token_scale, hidden_scale, pair, around, squares, counters, eps, vocab, drafted,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, COUNTERS: tl.constexpr, BLOCK_COUNTERS: tl.constexpr,
    NAMED: tl.constexpr, NORMED: tl.constexpr, SQUARES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: a row's embedding and its hidden state, float32 [rows, FEATURES], each normed, side by side; and what
    goes around attention, float32.

    NAMED: `tokens` are columns of the head's logits, and `names` has the ids of these.
    NORMED: the normed hidden state goes around. SQUARES: so do its sums of squares, in the chain's first line.

    The first program sets all counters to 0, which they are but after a launch that was aborted.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    feature = tl.arange(0, BLOCK)
    inside = feature < FEATURES
    if row == 0:
        index = tl.arange(0, BLOCK_COUNTERS)
        tl.store(counters + index, 0, mask=index < COUNTERS)
    token = tl.load(tokens + row)
    if NAMED:
        token = tl.load(names + tl.maximum(tl.minimum(token, drafted - 1), 0))
    token = tl.maximum(tl.minimum(token, vocab - 1), 0)
    x = tl.load(embedding + token * FEATURES + feature, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(hidden + row * FEATURES + feature, mask=inside, other=0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / FEATURES + eps)
    x *= tl.load(token_scale + feature, mask=inside, other=0.0)
    normed = y * tl.rsqrt(tl.sum(y * y, 0) / FEATURES + eps)
    normed *= tl.load(hidden_scale + feature, mask=inside, other=0.0)
    line = pair + row * (2 * FEATURES) + feature
    tl.store(line, x.to(pair.dtype.element_ty), mask=inside)
    tl.store(line + FEATURES, normed.to(pair.dtype.element_ty), mask=inside)
    kept = normed if NORMED else y
    tl.store(around + row * FEATURES + feature, kept, mask=inside)
    if SQUARES:
        tl.store(squares + row, tl.sum(kept * kept, 0))


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["brought", "positions", "token_slots", "block_table"],
)
def settle_kernel(  # type: ignore[no-untyped-def]
    projected, around, qkv, state, squares, k_pages, v_pages, cos, sin, brought, positions, token_slots, block_table,
    table_stride,
    FED: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_LINE: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: one of the FED tokens that a step fed of a row, whose heads are `projected`, float32
    [rows * FED, HEADS + 2 KV, DIM]. Keys and values of those before a row's last accepted one go to their pages; of
    that one, heads and state go where the chain reads them, in the row's line.

    It lets no other kernel start early: attention asks for cached keys and values before it waits.
    """
    if OVERLAP:
        gdc_wait()
    token = tl.program_id(0)
    row = token // FED
    last = tl.load(brought + row) - 1
    fed = token % FED
    LINE: tl.constexpr = (HEADS + 2 * KV) * DIM
    line = projected + token * LINE
    if fed == last:
        place = tl.arange(0, BLOCK_LINE)
        heads = tl.load(line + place, mask=place < LINE, other=0.0)
        tl.store(qkv + row * LINE + place, heads, mask=place < LINE)
        feature = tl.arange(0, BLOCK)
        kept = tl.load(around + token * FEATURES + feature, mask=feature < FEATURES, other=0.0)
        tl.store(state + row * FEATURES + feature, kept, mask=feature < FEATURES)
        tl.store(squares + row, tl.sum(kept * kept, 0))
    if fed < last:
        position = tl.load(positions + token)
        table = block_table + tl.load(token_slots + token).to(tl.int64) * table_stride
        page = tl.load(table + position // PAGE).to(tl.int64)
        HALF: tl.constexpr = DIM // 2
        head = tl.arange(0, BLOCK_KV)[:, None]
        dim = tl.arange(0, BLOCK_DIM)[None, :]
        inside = (head < KV) & (dim < DIM)
        angle = position * HALF + dim % HALF
        c = tl.load(cos + angle, mask=dim < DIM, other=0.0)
        s = tl.load(sin + angle, mask=dim < DIM, other=0.0)
        s = tl.where(dim < HALF, -s, s)
        keys = line + HEADS * DIM + head * DIM
        partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
        key = tl.load(keys + dim, mask=inside, other=0.0) * c + tl.load(keys + partner, mask=inside, other=0.0) * s
        value = tl.load(keys + KV * DIM + dim, mask=inside, other=0.0)
        target = ((page * KV + head) * PAGE + position % PAGE) * DIM + dim
        tl.store(k_pages + target, key.to(k_pages.dtype.element_ty), mask=inside)
        tl.store(v_pages + target, value.to(v_pages.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["drafted"], do_not_specialize_on_alignment=["columns", "names", "room", "made"])
def name_kernel(  # type: ignore[no-untyped-def]
    columns, names, room, made, drafted, MOST: tl.constexpr, BLOCK_MOST: tl.constexpr, NAMED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: a row's drafts [MOST], from columns of the head's logits (below 0: they held no number)."""
    if OVERLAP:
        gdc_wait()
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK_MOST)
    inside = place < MOST
    column = tl.load(columns + row * MOST + place, mask=inside, other=0)
    token = column
    if NAMED:
        token = tl.load(names + tl.maximum(tl.minimum(column, drafted - 1), 0), mask=inside, other=0)
    token = tl.where(column < 0, -2, token)
    token = tl.where(place >= tl.load(room + row), -1, token)
    tl.store(made + row * MOST + place, token, mask=inside)
