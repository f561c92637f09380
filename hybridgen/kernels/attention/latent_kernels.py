"""Triton kernels of `latent_launches`, which says how they divide the work."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridgen.kernels.attention.common import load_pages
from hybridgen.kernels.attention.decode_kernels import _cut


@triton.jit
def _latents(  # type: ignore[no-untyped-def]
    pages, ids, start, first_column,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pointers [BLOCK, COLUMNS] to columns of the positions from `start` on."""
    local = tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)
    if BLOCK <= PAGE:
        # One 64-bit address and constant 32-bit offsets: a tile lies in one piece.
        line = ids.to(tl.int64) * PAGE
        if BLOCK < PAGE:
            line += start & (PAGE - 1)
        return pages + line * WIDTH + first_column + (local[:, None] * WIDTH + columns[None, :])
    else:
        line = ids.to(tl.int64) * PAGE + ((start + local) & (PAGE - 1))
        return pages + line[:, None] * WIDTH + first_column + columns[None, :]


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    pages, ids, start, end, first_column,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """SIZE columns of the positions from `start` on, [BLOCK, COLUMNS]; zeros from position `end` on."""
    inside = tl.arange(0, COLUMNS) < SIZE
    written = start + tl.arange(0, BLOCK) < end
    pointers = _latents(pages, ids, start, first_column, PAGE, WIDTH, BLOCK, COLUMNS)
    if COLUMNS == SIZE:
        return tl.load(pointers, mask=written[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=written[:, None] & inside[None, :], other=0.0)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, query_rotary, peak, sums, mixed, pages, table, place_of_row, first, last, end, scale,
    PAGE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_ROPE: tl.constexpr,
):  # fmt: skip
    """Softmax and mix of rows of queries over the tiles first to last, of which every row sees the first position.

    Positions are rows of the products and queries are their columns, [BLOCK, rows] and [BLOCK_RANK, rows]: latents are
    the left operand of both, read once into shared memory and multiplied from there, and queries may be as few as 16.
    `sums` [BLOCK, rows] are summed over positions behind the last tile.
    """
    width: tl.constexpr = RANK + ROPE
    factor = scale * 1.4426950408889634
    ids = load_pages(table, first * BLOCK, end, PAGE, BLOCK)
    for tile in range(first, last):
        start = tile * BLOCK
        # Both are read in the loop. Rotary keys that came a tile early, through registers, gave wrong scores with
        # Triton 3.6 on compute capability 9, where 16 or 32 queries were multiplied by 64 positions (wgmma).
        rotary = _read(pages, ids, start, end, RANK, PAGE, width, ROPE, BLOCK, BLOCK_ROPE)
        latent = _read(pages, ids, start, end, 0, PAGE, width, RANK, BLOCK, BLOCK_RANK)
        # The next tile's page ids, a tile early: it is requested as soon as a buffer is free.
        ids = load_pages(table, start + BLOCK, end, PAGE, BLOCK)
        scores = tl.dot(rotary, tl.trans(query_rotary), input_precision="ieee")
        scores = tl.dot(latent, tl.trans(query), scores, input_precision="ieee")
        seen = start + tl.arange(0, BLOCK)[:, None] <= place_of_row[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0) * factor)
        weights = tl.exp2(scores * factor - new_peak[None, :])
        rescale = tl.exp2(peak - new_peak)
        sums = sums * rescale[None, :] + weights
        mixed = mixed * rescale[None, :]
        mixed = tl.dot(tl.trans(latent), weights.to(latent.dtype), mixed, input_precision="ieee")
        peak = new_peak
    return peak, sums, mixed


@triton.jit
def _attend_by_heads(  # type: ignore[no-untyped-def]
    queries, query_rotary, pages, table, position, first, last, scale,
    PAGE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_PART: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):  # fmt: skip
    """What `_attend` does for queries at one position, with heads as rows of the products and positions as columns.

    16 heads are as many rows as `mma.sync` has, so that each latent is read once for scores, whatever the warps. A
    latent's columns are PARTS tensors: their products are added up apart, so that they need not wait for each other.

    Returns:
        peak [BLOCK_HEADS], total [BLOCK_HEADS], and the mix as PARTS tensors [BLOCK_HEADS, BLOCK_PART].
    """
    width: tl.constexpr = RANK + ROPE
    factor = scale * 1.4426950408889634
    end = position + 1
    peak = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK_HEADS, BLOCK], tl.float32)
    mixed = ()
    for _ in tl.static_range(PARTS):
        mixed = mixed + (tl.zeros([BLOCK_HEADS, BLOCK_PART], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    ids = load_pages(table, first * BLOCK, end, PAGE, BLOCK)
    for tile in range(first, last):
        start = tile * BLOCK
        rotary = _read(pages, ids, start, end, RANK, PAGE, width, ROPE, BLOCK, BLOCK_ROPE)
        latents = ()
        for part in tl.static_range(PARTS):
            read = _read(
                pages, ids, start, end, part * BLOCK_PART,
                PAGE, width, min(BLOCK_PART, RANK - part * BLOCK_PART), BLOCK, BLOCK_PART,
            )  # fmt: skip
            latents = latents + (read,)  # type: ignore[assignment]  # noqa: RUF005
        ids = load_pages(table, start + BLOCK, end, PAGE, BLOCK)
        scores = tl.dot(query_rotary, tl.trans(rotary), input_precision="ieee")
        for part in tl.static_range(PARTS):
            # Not `+=`, of which Triton would make one chain of products.
            product = tl.dot(queries[part], tl.trans(latents[part]), input_precision="ieee")
            scores = tl.fma(product, tl.full([BLOCK_HEADS, BLOCK], 1.0, tl.float32), scores)
        scores = tl.where((start + tl.arange(0, BLOCK) < end)[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        sums = sums * rescale[:, None] + weights
        weights = weights.to(rotary.dtype)
        new = ()
        for part in tl.static_range(PARTS):
            scaled = mixed[part] * rescale[:, None]
            new = new + (tl.dot(weights, latents[part], scaled, input_precision="ieee"),)  # type: ignore[assignment]  # noqa: RUF005
        mixed = new
        peak = new_peak
    return peak, tl.sum(sums, 1), mixed


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    base, lines, inside, stride_head, heads, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """[rows, BLOCK_SIZE] of queries whose tokens begin at `lines`."""
    columns = tl.arange(0, BLOCK_SIZE)
    pointers = base + (lines + heads.to(tl.int64) * stride_head)[:, None] + columns[None, :]
    return tl.load(pointers, mask=inside[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
def _all_queries(  # type: ignore[no-untyped-def]
    q, q_rotary, line, q_stride_token, q_stride_head, rotary_stride_token, rotary_stride_head, heads, inside,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_ROPE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Queries of a row, as PARTS tensors (one if that is 0), and their rotary rest."""
    width: tl.constexpr = BLOCK_RANK // max(PARTS, 1)
    queries = ()
    for part in tl.static_range(max(PARTS, 1)):
        query = _queries(
            q + part * width, line * q_stride_token, inside, q_stride_head, heads,
            min(width, RANK - part * width), width,
        )  # fmt: skip
        queries = queries + (query,)  # type: ignore[assignment]  # noqa: RUF005
    rotary = _queries(q_rotary, line * rotary_stride_token, inside, rotary_stride_head, heads, ROPE, BLOCK_ROPE)
    return queries, rotary


@triton.jit
def _append(new, target, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write SIZE numbers to a page."""
    columns = tl.arange(0, BLOCK_SIZE)
    values = tl.load(new + columns, mask=columns < SIZE)
    tl.store(target + columns, values.to(target.dtype.element_ty), mask=columns < SIZE)


@triton.jit
def _store(target, lines, inside, values, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write values [BLOCK_RANK, rows] to the rows `lines` of `target` [..., RANK]."""
    ranks = tl.arange(0, BLOCK_RANK)
    pointers = target + lines[:, None] * RANK + ranks[None, :]
    values = tl.trans(values.to(target.dtype.element_ty))
    tl.store(pointers, values, mask=inside[:, None] & (ranks < RANK)[None, :])


@triton.jit
def _store_by_heads(  # type: ignore[no-untyped-def]
    target, lines, inside, values, first: tl.constexpr, RANK: tl.constexpr, BLOCK_PART: tl.constexpr
):  # fmt: skip
    """Write values [rows, BLOCK_PART] to the columns from `first` on of the rows `lines` of `target` [..., RANK]."""
    ranks = first + tl.arange(0, BLOCK_PART)
    pointers = target + lines[:, None] * RANK + ranks[None, :]
    tl.store(pointers, values.to(target.dtype.element_ty), mask=inside[:, None] & (ranks < RANK)[None, :])


@triton.jit(
    do_not_specialize=["tokens", "splits", "chunk_tiles", "row_chunks", "lse_start"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions"],
)
def decode_kernel(  # type: ignore[no-untyped-def]
    q, q_rotary, latent, rotary, pages, block_table, slots, positions, out, partial,
    lse_start, scale, tokens, splits, chunk_tiles, row_chunks, table_stride,
    q_stride_token, q_stride_head, rotary_stride_token, rotary_stride_head, new_stride, new_rotary_stride,
    HEADS: tl.constexpr, PAGE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_ROPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr, APPEND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: every n-th chunk of all rows, for BLOCK_HEADS heads; rows of one chunk are finished here.

    With APPEND the row's newest latent and rotary key are written to its page first, by each program that reads them.
    """
    if OVERLAP:
        # Before anything is read or written, so that a kernel's end implies the end of all before it.
        gdc_wait()
        gdc_launch_dependents()
    parts: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    heads = tl.program_id(0) % parts * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    inside = heads < HEADS
    if BLOCK_ROWS == 1:
        # Asked for before the position is there: what waits for it in turn takes as long as a page's first bytes.
        queries, query_rotary = _all_queries(
            q, q_rotary, 0, q_stride_token, q_stride_head, rotary_stride_token, rotary_stride_head, heads, inside,
            RANK, ROPE, BLOCK_RANK, BLOCK_ROPE, PARTS,
        )  # fmt: skip
        place = tl.load(positions).to(tl.int32)
        low, high, tiles, items = _cut(place, 0, splits, chunk_tiles, BLOCK, 1, 0)
    else:
        rows = tl.arange(0, BLOCK_ROWS)
        places = tl.load(positions + rows, mask=rows < tokens, other=0).to(tl.int32)
        _low, _high, _tiles, chunks = _cut(places, 0, splits, chunk_tiles, BLOCK, 1, 0)
        chunks = tl.where(rows < tokens, chunks, 0)
        ends = tl.cumsum(chunks, 0)
        items = tl.sum(chunks, 0)
    for item in range(tl.program_id(0) // parts, items, tl.num_programs(0) // parts):
        if BLOCK_ROWS > 1:
            row = tl.sum((ends <= item).to(tl.int32), 0)
            chunk = item - tl.sum(tl.where(rows < row, chunks, 0), 0)
            position = tl.load(positions + row).to(tl.int32)
            table = block_table + tl.load(slots + row).to(tl.int64) * table_stride
            low, high, tiles, count = _cut(position, 0, splits, chunk_tiles, BLOCK, 1, 0)
        else:
            row = item * 0
            chunk = item
            position = place
            table = block_table + tl.load(slots).to(tl.int64) * table_stride
            count = items
        first = low + chunk * tiles
        last = tl.minimum(first + tiles, high)
        if APPEND:  # noqa: SIM102
            if last == high:
                page = tl.load(table + position // PAGE).to(tl.int64)
                target = pages + (page * PAGE + position % PAGE) * (RANK + ROPE)
                _append(latent + row.to(tl.int64) * new_stride, target, RANK, BLOCK_RANK)
                _append(rotary + row.to(tl.int64) * new_rotary_stride, target + RANK, ROPE, BLOCK_ROPE)
                tl.debug_barrier()  # all threads read what some of them wrote
        line = row.to(tl.int64)
        if BLOCK_ROWS > 1:
            queries, query_rotary = _all_queries(
                q, q_rotary, line, q_stride_token, q_stride_head, rotary_stride_token, rotary_stride_head, heads,
                inside, RANK, ROPE, BLOCK_RANK, BLOCK_ROPE, PARTS,
            )  # fmt: skip
        parts_of_row = (line * row_chunks + chunk) * HEADS + heads
        if PARTS:
            width: tl.constexpr = BLOCK_RANK // PARTS
            peak, total, means = _attend_by_heads(
                queries, query_rotary, pages, table, position, first, last, scale,
                PAGE, RANK, ROPE, BLOCK, BLOCK_HEADS, width, PARTS, BLOCK_ROPE,
            )  # fmt: skip
            for part in tl.static_range(PARTS):
                mean = means[part] / total[:, None]
                if count == 1:
                    _store_by_heads(out, line * HEADS + heads, inside, mean, part * width, RANK, width)
                else:
                    _store_by_heads(partial, parts_of_row, inside, mean, part * width, RANK, width)
        else:
            peak = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
            sums = tl.zeros([BLOCK, BLOCK_HEADS], tl.float32)
            mixed = tl.zeros([BLOCK_RANK, BLOCK_HEADS], tl.float32)
            peak, sums, mixed = _attend(
                queries[0], query_rotary, peak, sums, mixed, pages, table, heads * 0 + position, first, last,
                position + 1, scale, PAGE, RANK, ROPE, BLOCK, BLOCK_RANK, BLOCK_ROPE,
            )  # fmt: skip
            total = tl.sum(sums, 0)
            mixed = mixed / total[None, :]
            if count == 1:
                _store(out, line * HEADS + heads, inside, mixed, RANK, BLOCK_RANK)
            else:
                _store(partial, parts_of_row, inside, mixed, RANK, BLOCK_RANK)
        if count > 1:
            tl.store(partial + lse_start + parts_of_row, peak + tl.log2(total), mask=inside)


@triton.jit(
    do_not_specialize=["lse_start", "splits", "chunk_tiles", "row_chunks"],
    do_not_specialize_on_alignment=["positions"],
)
def combine_kernel(  # type: ignore[no-untyped-def]
    positions, out, partial, lse_start, splits, chunk_tiles, row_chunks,
    HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ALONE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_COLUMNS of a row's mean latent for one head, over the row's chunks in their order.

    With ALONE, of one row, the places of all chunks are read before it is known how many chunks there are.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    position = tl.load(positions + row).to(tl.int32)
    _low, _high, _tiles, chunks = _cut(position, 0, splits, chunk_tiles, BLOCK, 1, 0)
    places = chunks
    if ALONE:
        places = row_chunks
    if places > 1:
        peak = -float("inf")
        total = 0.0
        mixed = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, places, BLOCK_CHUNKS):
            chunk = start + tl.arange(0, BLOCK_CHUNKS)
            line = (row.to(tl.int64) * row_chunks + chunk) * HEADS + head
            part = tl.load(partial + lse_start + line, mask=chunk < places, other=-float("inf"))
            piece = partial + line[:, None] * RANK + columns[None, :]
            piece = tl.load(piece, mask=(chunk < places)[:, None] & (columns < RANK)[None, :], other=0.0)
            if ALONE:  # nobody wrote to the others
                part = tl.where(chunk < chunks, part, -float("inf"))
                piece = tl.where((chunk < chunks)[:, None], piece, 0.0)
            new_peak = tl.maximum(peak, tl.max(part, 0))
            weights = tl.exp2(part - new_peak)
            rescale = tl.exp2(peak - new_peak)
            total = total * rescale + tl.sum(weights, 0)
            mixed = mixed * rescale + tl.sum(weights[:, None] * piece, 0)
            peak = new_peak
        target = out + (row.to(tl.int64) * HEADS + head) * RANK + columns
        tl.store(target, (mixed / total).to(out.dtype.element_ty), mask=(columns < RANK) & (chunks > 1))


@triton.jit(
    do_not_specialize=["sequences"],
    do_not_specialize_on_alignment=["block_table", "slots", "positions", "query_starts"],
)
def prefill_kernel(  # type: ignore[no-untyped-def]
    q, q_rotary, pages, block_table, slots, positions, query_starts, out,
    scale, sequences, table_stride, q_stride_token, q_stride_head, rotary_stride_token, rotary_stride_head,
    HEADS: tl.constexpr, PAGE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_ROPE: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr, LATER: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_ROWS rows of one sequence, where a row is a token and one of its heads, token first.

    With LATER nothing is written for sequences that begin in this call.
    """
    # Late tiles have the longest contexts: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    # As in `prefill`: sequence i owns the tiles from starts[i] * HEADS // BLOCK_ROWS + i on.
    index = tl.arange(0, BLOCK_SEQUENCES)
    starts = tl.load(query_starts + index, mask=index < sequences, other=0)
    owned = (starts.to(tl.int64) * HEADS // BLOCK_ROWS + index <= tile) & (index < sequences)
    sequence = tl.sum(owned.to(tl.int32), 0) - 1
    begin = tl.load(query_starts + sequence)
    tokens = tl.load(query_starts + sequence + 1) - begin
    row_start = (tile - (begin.to(tl.int64) * HEADS // BLOCK_ROWS + sequence)).to(tl.int32) * BLOCK_ROWS
    if LATER:
        # Behind the last token there is no position.
        first = tl.load(positions + begin, mask=row_start < tokens * HEADS, other=0)
        tokens = tl.where(first > 0, tokens, 0)
    if row_start < tokens * HEADS:
        rows = row_start + tl.arange(0, BLOCK_ROWS)
        token = rows // HEADS
        heads = rows % HEADS
        inside = token < tokens
        line = (begin + token).to(tl.int64)
        query = _queries(q, line * q_stride_token, inside, q_stride_head, heads, RANK, BLOCK_RANK)
        query_rotary = _queries(
            q_rotary, line * rotary_stride_token, inside, rotary_stride_head, heads, ROPE, BLOCK_ROPE
        )
        first_place = tl.load(positions + begin).to(tl.int32)
        table = block_table + tl.load(slots + begin).to(tl.int64) * table_stride
        place_of_row = first_place + token
        end = first_place + tl.minimum((row_start + BLOCK_ROWS - 1) // HEADS, tokens - 1) + 1
        peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
        sums = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
        mixed = tl.zeros([BLOCK_RANK, BLOCK_ROWS], tl.float32)
        peak, sums, mixed = _attend(
            query, query_rotary, peak, sums, mixed, pages, table, place_of_row, 0, tl.cdiv(end, BLOCK), end, scale,
            PAGE, RANK, ROPE, BLOCK, BLOCK_RANK, BLOCK_ROPE,
        )  # fmt: skip
        mixed = mixed / tl.sum(sums, 0)[None, :]
        _store(out, line * HEADS + heads, inside, mixed, RANK, BLOCK_RANK)
