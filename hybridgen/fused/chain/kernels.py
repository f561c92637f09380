"""Triton kernels of `chain`: a few rows through one decoder layer, every weight read once.

A projection multiplies a tile of weights, operand A of the tensor cores, with the rows of the step, operand B, padded
to 8 or 16. Its inner dimension is cut into SPLITS interleaved parts that are the batch of one `tl.dot`: the warps of
a program work on different columns of the same few output features, and their sums are added in a fixed order, so
that results repeat bit for bit. Several programs may share a tile's columns, too (SLICES), for fewer reads of the
input by wider tiles: their sums meet in scratch, and an integer counter says who adds them up.

Kernels overlap by programmatic dependent launch (OVERLAP): a projection requests its first weights, which depend on no
other kernel, before it waits for the kernel that makes its input. Every program waits before it ends, so that the end
of a kernel implies the end of all before it. RELEASE says how early the next kernel may start. Early is not always
better: where a kernel's programs fill the multiprocessors, those of the next one crowd on the few that have room first,
and one that has three times its share of the weights to read holds up all.

RMSNorm is split between the kernel that makes the hidden state and the one that reads it. The maker hands on
`state * scale` in the weights' dtype and, in float32, the sum of squares of its own features; the reader multiplies,
adds up the sums, and divides at the end: the factor is the same for a whole row. The plain-torch equivalents are in
`reference`.

Layouts, row-major: handed and input [rows, inner]; state, float32 [rows, features]; squares, float32 [parts, 16].
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SQUARES_ROWS = tl.constexpr(16)
"""Length of a line of sums of squares, whatever the rows."""


@triton.jit
def _squares(squares, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_PARTS, ROWS]: what to add up for a state's sums of squares. Rows that are not there hold anything."""
    part = tl.arange(0, BLOCK_PARTS)
    row = tl.arange(0, ROWS)
    return tl.load(squares + part[:, None] * SQUARES_ROWS + row[None, :], mask=part[:, None] < PARTS, other=0.0)


@triton.jit
def _root(mean):  # type: ignore[no-untyped-def]
    """The square root; 1 for (almost) 0."""
    return tl.sqrt(tl.where(mean > 1e-30, mean, 1.0))


@triton.jit
def _activated(gate, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU, or GELU by its tanh approximation."""
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
        return gate / (1.0 + tl.exp(-2.0 * inner))
    else:
        return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _lines(weight, keys, values, feature, INNER: tl.constexpr, QUERIES: tl.constexpr, ENDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the features' lines of INNER numbers begin: in one tensor, or, if QUERIES is not 0, in three. `weight` has
    the first QUERIES features then, `keys` those up to ENDS, and `values` the rest."""
    line = feature.to(tl.int64)
    if QUERIES > 0:
        behind = tl.where(feature < ENDS, keys + (line - QUERIES) * INNER, values + (line - ENDS) * INNER)
        return tl.where(feature < QUERIES, weight + line * INNER, behind)
    else:
        return weight + line * INNER


@triton.jit
def _prefetch(  # type: ignore[no-untyped-def]
    weight, keys, values, feature, first,
    FEATURES: tl.constexpr, INNER: tl.constexpr, LENGTH: tl.constexpr, QUERIES: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Ask the L2 cache for LENGTH columns from `first` on of some features' weights."""
    LINE: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
    column = first + tl.arange(0, LENGTH // LINE) * LINE
    # A prefetch has no mask: what lies outside goes to the last column of the last feature instead.
    column = tl.minimum(column, INNER - 1)
    row = tl.minimum(feature, FEATURES - 1)
    pointers = _lines(weight, keys, values, row[:, None], INNER, QUERIES, ENDS) + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _weights(pointers, column, feature, limit, FEATURES: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile [SPLITS, BLOCK, COLUMNS] of weights, zeros outside."""
    if EVEN:
        return tl.load(pointers, mask=feature < FEATURES, other=0.0, eviction_policy="evict_first")
    else:
        inside = (feature < FEATURES) & (column < limit)
        return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(pointers, column, row, limit, rows, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile [SPLITS, COLUMNS, ROWS] of the input, zeros outside: zero weights times what lies there may be NaN."""
    if EVEN:
        return tl.load(pointers, mask=row < rows, other=0.0)
    else:
        return tl.load(pointers, mask=(row < rows) & (column < limit), other=0.0)


@triton.jit
def _dot(a, b, total, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + a @ b by the tensor cores; float32 operands, which only tests have, without rounding them.

    Codes of 8 bits become numbers of b's type, exactly."""
    if NATIVE:
        return tl.dot(a.to(b.dtype), b, total)
    else:
        return tl.dot(a.to(b.dtype), b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def project_kernel(  # type: ignore[no-untyped-def]
    source, weight, bias, squares_in, handed_in, state, out, scale, squares_out, handed_out, partial, counters,
    rows, eps, factor, second_weight, third_weight, second_bias, third_bias, code_scale,
    FEATURES: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    SLICES: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr,
    SEPARATE: tl.constexpr, QUERIES: tl.constexpr, ENDS: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr, RELEASE: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr, SCALES_IN: tl.constexpr, SCALES_OUT: tl.constexpr,
    STRIDE: tl.constexpr, NATIVE: tl.constexpr, CODED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`source @ weight.T + bias` for BLOCK features a program, with what comes before and after it.

    NORM: `source` is what a maker handed on; its norm's factor, from `squares_in`, multiplies the product.
    GATED: weight is [2 * FEATURES, INNER], gate first; out = activation(gate) * up.
    CODED: weight has codes of 8 bits, and `code_scale`, float32 [features], what each feature's are multiplied by.
    SEPARATE: up lies in `second_weight` [FEATURES, INNER], or, if QUERIES is not 0, keys (features up to ENDS) there
    and values in `third_weight`, and their biases alike.
    RESIDUAL: state += factor * product, in place; out = state * scale (SCALED) in its dtype, and the program's sum of
    squares goes to its line of `squares_out`. Otherwise out = factor * product, with STRIDE between rows.

    SCALES_OUT, for float16, hands on `state * scale` divided by the root mean square of the state before, which is
    close to the new one's and known to every program: large states would overflow, small ones lose digits. That root
    lies in `handed_out`, and SCALES_IN multiplies by the maker's.

    SLICES: so many programs share a tile's columns, LENGTH for each; the last to arrive, as the tile's counter says,
    adds up the products of all in their order and does the rest.
    """
    tile = tl.program_id(0)
    feature = tile * BLOCK + tl.arange(0, BLOCK)
    STEP: tl.constexpr = SPLITS * COLUMNS
    place = tl.arange(0, SPLITS)[:, None, None] * COLUMNS
    column = place + tl.arange(0, COLUMNS)[None, None, :]
    inner = place + tl.arange(0, COLUMNS)[None, :, None]
    wide = feature[None, :, None]
    row = tl.arange(0, ROWS)[None, None, :]
    begin = tl.program_id(1) * LENGTH
    limit = INNER - begin
    length = tl.minimum(limit, LENGTH)
    pointers = _lines(weight, second_weight, third_weight, wide, INNER, QUERIES, ENDS) + (begin + column)
    if GATED:
        if SEPARATE:
            seconds = second_weight + wide.to(tl.int64) * INNER + (begin + column)
        else:
            seconds = pointers + FEATURES * INNER
    inputs = source + row * INNER + (begin + inner)

    product = tl.zeros([SPLITS, BLOCK, ROWS], tl.float32)
    second = product
    # What the end needs is asked for at the beginning, and nothing waits for it before the end.
    if BIAS:
        places = _lines(bias, second_bias, third_bias, feature, 1, QUERIES, ENDS)
        offset = tl.load(places, mask=feature < FEATURES, other=0.0)
        if GATED:
            places = second_bias + feature if SEPARATE else bias + FEATURES + feature
            second_offset = tl.load(places, mask=feature < FEATURES, other=0.0)
    if CODED:
        of_codes = tl.load(code_scale + feature, mask=feature < FEATURES, other=0.0)
        if GATED:
            second_codes = tl.load(code_scale + FEATURES + feature, mask=feature < FEATURES, other=0.0)
    if SCALED:
        following = tl.load(scale + feature, mask=feature < FEATURES, other=0.0)
    if EARLY:
        first_weights = _weights(pointers, column, wide, limit, FEATURES, INNER, EVEN)
        if GATED:
            first_seconds = _weights(seconds, column, wide, limit, FEATURES, INNER, EVEN)
    if OVERLAP:
        if RELEASE == 0:
            gdc_launch_dependents()
        if AHEAD > 0:
            first = begin + EARLY * STEP
            _prefetch(
                weight, second_weight, third_weight, feature, first, FEATURES, INNER, AHEAD * STEP, QUERIES, ENDS
            )  # fmt: skip
            if GATED:
                up_weight = second_weight if SEPARATE else weight + FEATURES * INNER
                _prefetch(up_weight, up_weight, up_weight, feature, first, FEATURES, INNER, AHEAD * STEP, 0, 0)
        gdc_wait()
        if RELEASE == 1:
            gdc_launch_dependents()
    row_range = tl.arange(0, ROWS)
    inside = (feature < FEATURES)[:, None] & (row_range < rows)[None, :]
    target = row_range[None, :].to(tl.int64) * STRIDE + feature[:, None]
    if NORM or SCALES_OUT:
        squares = _squares(squares_in, PARTS, BLOCK_PARTS, ROWS)
    if SCALES_IN:
        handed_root = tl.load(handed_in + row_range, mask=row_range < rows, other=1.0)
    if RESIDUAL:
        old = tl.load(state + target, mask=inside, other=0.0)
    if EARLY:
        x = _inputs(inputs, inner, row, limit, rows, EVEN)
        product = _dot(first_weights, x, product, NATIVE)
        if GATED:
            second = _dot(first_seconds, x, second, NATIVE)
    for start in tl.range(EARLY * STEP, length, STEP, num_stages=STAGES):
        x = _inputs(inputs + start, inner, row, limit - start, rows, EVEN)
        w = _weights(pointers + start, column, wide, limit - start, FEATURES, INNER, EVEN)
        product = _dot(w, x, product, NATIVE)
        if GATED:
            u = _weights(seconds + start, column, wide, limit - start, FEATURES, INNER, EVEN)
            second = _dot(u, x, second, NATIVE)
    if OVERLAP and RELEASE == 2:
        gdc_launch_dependents()

    y = tl.sum(product, 0)
    if GATED:
        up = tl.sum(second, 0)
    if SLICES > 1:
        SIZE: tl.constexpr = BLOCK * ROWS
        HALVES: tl.constexpr = 2 if GATED else 1
        spot = tl.arange(0, BLOCK)[:, None] * ROWS + row_range[None, :]
        line = partial + tile * (SLICES * HALVES * SIZE)
        own = line + tl.program_id(1) * (HALVES * SIZE) + spot
        tl.store(own, y)
        if GATED:
            tl.store(own + SIZE, up)
        # All threads' stores come before the one thread's count.
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") < SLICES - 1:
            return
        tl.store(counters + tile, 0)
        y = tl.zeros([BLOCK, ROWS], tl.float32)
        up = y
        for part in tl.static_range(SLICES):
            # Other programs wrote it while this one ran: not from the L1 cache.
            y += tl.load(line + part * (HALVES * SIZE) + spot, cache_modifier=".cg")
            if GATED:
                up += tl.load(line + part * (HALVES * SIZE) + SIZE + spot, cache_modifier=".cg")
    if CODED:
        y *= of_codes[:, None]
        if GATED:
            up *= second_codes[:, None]
    if NORM or SCALES_OUT:
        sums = tl.sum(squares, 0)
    if NORM:
        y *= tl.rsqrt(sums / INNER + eps)[None, :]
    if SCALES_IN:
        y *= handed_root[None, :]
    if BIAS:
        y += offset.to(tl.float32)[:, None]
    if GATED:
        if NORM:
            up *= tl.rsqrt(sums / INNER + eps)[None, :]
        if SCALES_IN:
            up *= handed_root[None, :]
        if BIAS:
            up += second_offset.to(tl.float32)[:, None]
        y = _activated(y, GELU) * up
    elif not RESIDUAL:
        y *= factor
    if RESIDUAL:
        y = old + factor * y
        tl.store(state + target, y, mask=inside)
        # Nothing is outside: the product of zeros, and 0 for the state.
        tl.store(squares_out + tile * SQUARES_ROWS + row_range, tl.sum(y * y, 0))
        if SCALED:
            y *= following[:, None]
        if SCALES_OUT:
            root = _root(sums / FEATURES)
            y *= (1.0 / root)[None, :]
            tl.store(handed_out + row_range, root, mask=row_range < rows)
    tl.store(out + target, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def begin_kernel(  # type: ignore[no-untyped-def]
    tokens, embedding, multiplier, state, handed, scale, squares_out, handed_out, counters,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, COUNTERS: tl.constexpr, BLOCK_COUNTERS: tl.constexpr,
    SCALED: tl.constexpr, SCALES_OUT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: one row's embedding, times `multiplier`; handed on like a projection's state.

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
    x = tl.load(embedding + token * FEATURES + feature, mask=inside, other=0.0).to(tl.float32) * multiplier
    _hand_on(
        x, row, feature, inside, state, handed, scale, squares_out, handed_out, FEATURES, SCALED, SCALES_OUT
    )  # fmt: skip


@triton.jit
def _hand_on(  # type: ignore[no-untyped-def]
    x, row, feature, inside, state, handed, scale, squares_out, handed_out,
    FEATURES: tl.constexpr, SCALED: tl.constexpr, SCALES_OUT: tl.constexpr,
):  # fmt: skip
    """Store one whole row's new state [BLOCK], what the next projection reads of it, and its sum of squares."""
    tl.store(state + row * FEATURES + feature, x, mask=inside)
    total = tl.sum(x * x, 0)
    tl.store(squares_out + row, total)
    if SCALED:
        x *= tl.load(scale + feature, mask=inside, other=0.0)
    if SCALES_OUT:
        root = _root(total / FEATURES)
        x /= root
        tl.store(handed_out + row, root)
    tl.store(handed + row * FEATURES + feature, x.to(handed.dtype.element_ty), mask=inside)


@triton.jit
def close_kernel(  # type: ignore[no-untyped-def]
    product, after, state, handed, scale, squares_out, handed_out, eps, factor,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, SCALES_OUT: tl.constexpr, NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: one row's `state += factor * norm(product)`, for layers that norm a projection's output (NORM), and
    without the norm for products that were added up over ranks."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    feature = tl.arange(0, BLOCK)
    inside = feature < FEATURES
    y = tl.load(product + row * FEATURES + feature, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        y *= tl.rsqrt(tl.sum(y * y, 0) / FEATURES + eps)
        y *= tl.load(after + feature, mask=inside, other=0.0)
    x = tl.load(state + row * FEATURES + feature, mask=inside, other=0.0) + factor * y
    _hand_on(
        x, row, feature, inside, state, handed, scale, squares_out, handed_out, FEATURES, SCALED, SCALES_OUT
    )  # fmt: skip
