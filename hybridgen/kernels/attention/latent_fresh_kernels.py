"""Triton: causal attention of prompts that begin in this call, to the keys and values of their own tokens.

`latent_launches` says when it runs. A FlashAttention-2 loop (arXiv:2307.08691) over packed tokens: nothing is read from
pages, because a run that begins at position 0 has all that it sees in the call.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _columns(  # type: ignore[no-untyped-def]
    base, lines, stride, inside, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """[lines, BLOCK_SIZE] of rows at `base`, `stride` apart; without MASK all lines are inside."""
    columns = tl.arange(0, BLOCK_SIZE)
    pointers = base + (lines * stride)[:, None] + columns[None, :]
    if MASK:
        return tl.load(pointers, mask=inside[:, None] & (columns < SIZE)[None, :], other=0.0)
    elif BLOCK_SIZE == SIZE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < SIZE)[None, :], other=0.0)


@triton.jit
def _attend_own(  # type: ignore[no-untyped-def]
    query, query_rotary, peak, total, mixed, keys, values, rotary, begin, first, last, tokens, token, scale,
    stride, rotary_stride,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_NOPE: tl.constexpr, BLOCK_ROPE: tl.constexpr, BLOCK_VALUE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One pass over the run's tiles first to last; without MASK every row sees all of them."""
    factor = scale * 1.4426950408889634
    for tile in range(first, last):
        place = tile * BLOCK + tl.arange(0, BLOCK)
        inside = place < tokens
        lines = (begin + place).to(tl.int64)
        key = _columns(keys, lines, stride, inside, NOPE, BLOCK_NOPE, MASK)
        turned = _columns(rotary, lines, rotary_stride, inside, ROPE, BLOCK_ROPE, MASK)
        value = _columns(values, lines, stride, inside, VALUE, BLOCK_VALUE, MASK)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.dot(query_rotary, tl.trans(turned), scores, input_precision="ieee")
        if MASK:
            scores = tl.where(place[None, :] <= token[:, None], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(weights, 1)
        mixed = mixed * rescale[:, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision="ieee")
        peak = new_peak
    return peak, total, mixed


@triton.jit(
    do_not_specialize=["sequences"],
    do_not_specialize_on_alignment=["positions", "query_starts"],
)
def fresh_kernel(  # type: ignore[no-untyped-def]
    q, q_rotary, both, rotary, positions, query_starts, out,
    scale, sequences, q_stride_token, q_stride_head, q_rotary_stride_token, q_rotary_stride_head, rotary_stride,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_NOPE: tl.constexpr, BLOCK_ROPE: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_ROWS tokens of one run, for one head; runs that began in an earlier call are left as they are.

    `both` [T, HEADS, NOPE + VALUE] are keys and values behind each other; `out` [T, HEADS, VALUE].
    """
    head = tl.program_id(0) % HEADS
    # Late tiles have the longest contexts: they start first.
    tile = tl.num_programs(0) // HEADS - 1 - tl.program_id(0) // HEADS
    # As in `prefill`: sequence i owns the tiles from starts[i] // BLOCK_ROWS + i on.
    index = tl.arange(0, BLOCK_SEQUENCES)
    starts = tl.load(query_starts + index, mask=index < sequences, other=0)
    owned = (starts // BLOCK_ROWS + index <= tile) & (index < sequences)
    sequence = tl.sum(owned.to(tl.int32), 0) - 1
    begin = tl.load(query_starts + sequence)
    tokens = tl.load(query_starts + sequence + 1) - begin
    row_start = (tile - (begin // BLOCK_ROWS + sequence)) * BLOCK_ROWS
    if row_start < tokens:  # noqa: SIM102
        if tl.load(positions + begin) == 0:
            token = row_start + tl.arange(0, BLOCK_ROWS)
            inside = token < tokens
            lines = (begin + token).to(tl.int64)
            query = _columns(q + head * q_stride_head, lines, q_stride_token, inside, NOPE, BLOCK_NOPE, True)
            query_rotary = _columns(
                q_rotary + head * q_rotary_stride_head, lines, q_rotary_stride_token, inside, ROPE, BLOCK_ROPE, True
            )
            width: tl.constexpr = NOPE + VALUE
            keys = both + head * width
            values = keys + NOPE
            end = tl.minimum(row_start + BLOCK_ROWS, tokens)
            middle = row_start // BLOCK  # tiles before it are seen whole by every row
            peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            mixed = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
            peak, total, mixed = _attend_own(
                query, query_rotary, peak, total, mixed, keys, values, rotary, begin, 0, middle, tokens, token,
                scale, HEADS * width, rotary_stride, NOPE, ROPE, VALUE, BLOCK, BLOCK_NOPE, BLOCK_ROPE, BLOCK_VALUE,
                False,
            )  # fmt: skip
            peak, total, mixed = _attend_own(
                query, query_rotary, peak, total, mixed, keys, values, rotary, begin, middle, tl.cdiv(end, BLOCK),
                tokens, token, scale, HEADS * width, rotary_stride, NOPE, ROPE, VALUE, BLOCK, BLOCK_NOPE, BLOCK_ROPE,
                BLOCK_VALUE, True,
            )  # fmt: skip
            columns = tl.arange(0, BLOCK_VALUE)
            target = out + ((lines * HEADS + head) * VALUE)[:, None] + columns[None, :]
            mixed = (mixed / total[:, None]).to(out.dtype.element_ty)
            tl.store(target, mixed, mask=inside[:, None] & (columns < VALUE)[None, :])
