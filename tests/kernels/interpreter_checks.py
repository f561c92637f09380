"""Triton's attention kernels against the dense reference in Triton's interpreter; run by test_attention_triton.py.

float32 only: the interpreter's `tl.dot` is wrong on bfloat16. Pages of 8 bits get numbers that they have: its rounding
to them is wrong.
"""

from __future__ import annotations

import itertools
import random

import ptx
import torch
from attention_cases import Cache, dense_packed, error, make_cache, newest_rows, pack, take_newest

from hybridgen.kernels.attention import balanced
from hybridgen.kernels.attention.decode import Tuning as DecodeTuning
from hybridgen.kernels.attention.decode import decode_attention
from hybridgen.kernels.attention.prefill import prefill_attention
from hybridgen.kernels.attention.schedule import Shares, schedule, schedule_words
from hybridgen.kernels.attention.write import write_kv
from hybridgen.kernels.linear import rounded_rows_kernels

CASES = [  # query heads, kv heads, key dim, value dim, page size, lengths, new tokens, options
    (4, 2, 8, 8, 8, [5, 17, 40], [5, 3, 1], {}),
    (7, 1, 16, 24, 16, [70, 1, 33], [70, 1, 3], {}),
    (2, 2, 16, 16, 64, [200, 2], [60, 1], {"window": 37, "softcap": 5.0, "sinks": True}),
    (8, 2, 16, 16, 8, [90, 150], [9, 150], {"window": 9}),
    (2, 1, 16, 16, 32, [33], [33], {"sinks": True}),
    (4, 2, 16, 16, 16, [200, 2, 150], [60, 1, 150], {"chunk": 37, "sinks": True}),
    (8, 2, 16, 16, 8, [90, 96], [9, 96], {"chunk": 8}),
    (2, 1, 16, 16, 32, [130, 64], [130, 1], {"chunk": 64, "softcap": 5.0}),
]


def _write(cache: Cache, kv_heads: int) -> None:
    slots, positions, _ = pack(cache, cache.lengths, len(cache.lengths))
    both = torch.cat([torch.cat(fed) for fed in cache.fed], dim=2).transpose(0, 1).contiguous()
    k, v = both.transpose(0, 1).split([cache.keys[0].shape[2], cache.values[0].shape[2]], dim=2)
    write_kv(k, v, cache.k_pages, cache.v_pages, cache.block_table, slots, positions)


FP8 = torch.float8_e4m3fn


def _same(found: tuple[torch.Tensor, ...], cache: Cache) -> bool:
    """Whether the pages hold each sequence's last K and V."""
    wanted = [torch.stack([one[-1].float() for one in each]) for each in (cache.keys, cache.values)]
    return all(torch.equal(a.float(), b) for a, b in zip(found, wanted, strict=True))


def check_case_fp8(number: int) -> None:
    """`check_case` with pages of 8 bits."""
    check_case(number, FP8)


def check_balanced_fp8(number: int) -> None:
    """`check_balanced` with pages of 8 bits."""
    check_balanced(number, FP8)


def check_pairs(number: int) -> None:
    """Decode of float16 queries over pages of 8 bits, which are read by two numbers at once."""
    ptx.install()
    dim, value_dim, group, block, options = (
        (32, 48, 2, 16, {}),
        (64, 64, 4, 32, {"window": 40, "softcap": 3.0}),
        (72, 32, 1, 64, {"chunk": 24}),
    )[number]
    torch.manual_seed(number)
    lengths = [1, 70, 33, 129, 64]
    cache = make_cache(lengths, 2, dim, value_dim, dtype=torch.float16, kept=FP8, exact=True)
    q, ones = torch.randn(len(lengths), 2 * group, dim).half(), [1] * len(lengths)
    sinks = torch.randn(2 * group).half() if number else None
    expected = dense_packed(q, cache, ones, 0.3, sinks=sinks, **options)
    slots, positions, _ = pack(cache, ones, len(ones))
    pages = cache.k_pages, cache.v_pages, cache.block_table
    tail = options.get("window", 0), options.get("chunk", 0), options.get("softcap", 0.0), sinks
    newest: dict[str, torch.Tensor] = {}
    for programs in (1, 16):
        tune = DecodeTuning(block, 4, 1, programs, programs)
        for rows in (slice(0, 5), slice(3, 4)):
            own = {name: each[rows] for name, each in newest.items()}
            out = decode_attention(q[rows], *pages, slots[rows], positions[rows], 0.3, *tail, **own, tune=tune)
            assert error(out, expected[rows]) < 5e-4
        newest = newest or take_newest(cache)
    assert _same(newest_rows(cache), cache)


def check_balanced_pairs(number: int) -> None:
    """Decode of float16 queries by a schedule over pages of 8 bits, which are read by two numbers at once."""
    ptx.install()
    dim, value_dim, group, options = ((32, 48, 2, {"window": 40}), (40, 32, 4, {"softcap": 3.0}))[number]
    torch.manual_seed(number)
    lengths = [1, 70, 33, 64]
    cache = make_cache(lengths, 2, dim, value_dim, dtype=torch.float16, kept=FP8, exact=True)
    q, ones = torch.randn(len(lengths), 2 * group, dim).half(), [1] * len(lengths)
    sinks = torch.randn(2 * group).half() if number else None
    expected = dense_packed(q, cache, ones, 0.3, sinks=sinks, **options)
    slots, positions, _ = pack(cache, ones, len(ones))
    pages = cache.k_pages, cache.v_pages, cache.block_table
    limits, tune = (options.get("window", 0), 0), BALANCED[number]
    words = balanced.words_needed(*pages[:2], 2 * group, len(lengths), cache.block_table.shape[1], *limits, tune)
    plan = torch.zeros(words, dtype=torch.int32)
    balanced.write_schedule(*pages, slots, positions, 2 * group, *limits, plan, tune)
    tail = 0.3, *limits, options.get("softcap", 0.0), sinks
    assert error(balanced.decode_attention(q, *pages, slots, positions, *tail, None, None, plan, tune), expected) < 5e-4
    newest = take_newest(cache)
    out = balanced.decode_attention(q, *pages, slots, positions, *tail, newest["k"], newest["v"], plan, tune)
    assert error(out, expected) < 5e-4
    assert _same(newest_rows(cache), cache)


def check_case(number: int, kept: torch.dtype | None = None) -> None:
    """Decode, with new tokens and without, and prefill, for one of `CASES`."""
    torch.manual_seed(number)
    heads, kv_heads, dim, value_dim, page_size, lengths, new, named = CASES[number]
    options = {"window": 0, "chunk": 0, "softcap": 0.0, "sinks": None, **named}
    if options["sinks"]:
        options["sinks"] = torch.randn(heads)
    tail = options["window"], options["chunk"], options["softcap"], options["sinks"]
    cache = make_cache(lengths, kv_heads, dim, value_dim, page_size, filled=False, kept=kept, exact=kept is not None)
    _write(cache, kv_heads)
    pages = cache.k_pages, cache.v_pages, cache.block_table
    ones = [1] * len(lengths)
    q = torch.randn(len(lengths), heads, dim)
    expected = dense_packed(q, cache, ones, 0.3, **options)
    slots, positions, _ = pack(cache, ones, len(ones))
    errors = []
    for programs in (1, 64):
        tune = DecodeTuning(block=32, warps=4, stages=1, programs=programs, programs_single=programs)
        out = decode_attention(q, *pages, slots, positions, 0.3, *tail, tune=tune)
        errors.append(error(out, expected))
        out = decode_attention(q[:1], *pages, slots[:1], positions[:1], 0.3, *tail, tune=tune)
        errors.append(error(out, expected[:1]))
        newest = take_newest(cache)
        out = decode_attention(q, *pages, slots, positions, 0.3, *tail, **newest, tune=tune)
        errors.append(error(out, expected))
        if not _same(newest_rows(cache), cache):
            raise AssertionError("the new K and V are not in the pages")
    q = torch.randn(heads, sum(new), dim).transpose(0, 1)
    slots, positions, starts = pack(cache, new, len(new) + 2)
    out = prefill_attention(q, *pages, slots, positions, starts, 0.3, *tail)
    errors.append(error(out, dense_packed(q, cache, new, 0.3, **options)))
    assert max(errors) < 1e-6, (heads, kv_heads, dim, value_dim, page_size, named, errors)


BALANCED = [  # positions a tile, programs a multiprocessor, positions a chunk, queries carried
    balanced.Tuning(16, 4, 2, 1, 32, True),
    balanced.Tuning(16, 4, 2, 3, 16, False),
    balanced.Tuning(32, 4, 2, 2, 64, True),
]


def check_balanced(number: int, kept: torch.dtype | None = None) -> None:
    """Decode by a schedule, with new tokens and without, for one of `CASES`; and rows alone, with equal bits."""
    torch.manual_seed(number)
    heads, kv_heads, dim, value_dim, page_size, lengths, _, named = CASES[number]
    options = {"window": 0, "chunk": 0, "softcap": 0.0, "sinks": None, **named}
    if options["sinks"]:
        options["sinks"] = torch.randn(heads)
    cache = make_cache(lengths, kv_heads, dim, value_dim, page_size, filled=False, kept=kept, exact=kept is not None)
    _write(cache, kv_heads)
    ones = [1] * len(lengths)
    q = torch.randn(len(lengths), heads, dim)
    expected = dense_packed(q, cache, ones, 0.3, **options)
    slots, positions, _ = pack(cache, ones, len(ones))
    pages = cache.k_pages, cache.v_pages, cache.block_table
    limits = options["window"], options["chunk"]
    tail = 0.3, *limits, options["softcap"], options["sinks"]
    errors = []
    for tune in BALANCED:
        words = balanced.words_needed(*pages[:2], heads, len(lengths), cache.block_table.shape[1], *limits, tune)
        plan = torch.zeros(words, dtype=torch.int32)

        def run(rows: slice, plan=plan, tune=tune, k=None, v=None) -> torch.Tensor:
            plan.fill_(-1)  # what is read of it was written for these rows
            where = *pages, slots[rows], positions[rows]
            balanced.write_schedule(*where, heads, *limits, plan, tune)
            return balanced.decode_attention(q[rows], *where, *tail, k, v, plan, tune)

        out = run(slice(None))
        errors.append(error(out, expected))
        for row in range(len(lengths)):
            alone = run(slice(row, row + 1))
            if not torch.equal(alone[0], out[row]):
                raise AssertionError(f"row {row} has other bits alone: {(alone[0] - out[row]).abs().max()}")
        newest = take_newest(cache)
        out = run(slice(None), **newest)
        errors.append(error(out, expected))
        if not _same(newest_rows(cache), cache):
            raise AssertionError("the new K and V are not in the pages")
    assert max(errors) < 1e-6, (heads, kv_heads, dim, value_dim, page_size, named, errors)


def check_schedules() -> None:
    """Whose chunks are dealt: each one once, all tiles counted, and the largest load that of dealing one by one."""
    drawn = random.Random(0)
    for kv_heads, programs, chunk_tiles, row_chunks, longest, count in (
        (1, 3, 8, 300, 2000, 20),
        (2, 66, 8, 300, 2000, 33),
        (4, 21, 16, 300, 2000, 9),
        (8, 3, 4, 300, 500, 5),
        (1, 7, 8, 3, 9000, 17),  # some rows have longer chunks
        (1, 40, 8, 2, 9000, 5),
    ):
        lengths = [drawn.randint(1, longest) for _ in range(count)]
        pages = -(-longest // 64)
        shares = Shares(kv_heads, 64, 0, 0, 64, chunk_tiles, row_chunks, programs)
        table = torch.arange(count * pages, dtype=torch.int32).view(count, pages)
        plan = torch.full((schedule_words(count, pages, shares),), -1, dtype=torch.int32)
        schedule(table, torch.arange(count), torch.tensor(lengths) - 1, shares, plan)
        words = plan.tolist()
        chunks_at = 16
        parts_at = chunks_at + count + 1
        begins_at = parts_at + shares.parts
        order_at = begins_at + shares.parts + 1
        sizes: dict[int, int] = {}  # of chunks by their first tiles
        rows_of: dict[int, int] = {}
        tile, usual, chunks = 0, 0, 0
        for row, length in enumerate(lengths):
            tiles = -(-length // 64)
            size = max(chunk_tiles, -(-tiles // row_chunks))
            assert words[chunks_at + row] == chunks
            chunks += -(-tiles // size)
            usual += size == chunk_tiles
            for start in range(0, tiles, size):
                sizes[tile + start] = min(size, tiles - start)
                rows_of[tile + start] = row
            tile += tiles
        assert words[0] == tile
        assert words[chunks_at + count] == len(sizes) == chunks
        begins = words[begins_at : begins_at + shares.parts + 1]
        several = {tile: sum(1 for row in rows_of.values() if row == rows_of[tile]) > 1 for tile in sizes}
        flagged = [words[order_at + a : order_at + b] for a, b in itertools.pairwise(begins)]
        dealt = [[word & (2**30 - 1) for word in part] for part in flagged]
        assert all((word >> 30 == 1) == several[word & (2**30 - 1)] for part in flagged for word in part)
        assert sorted(itertools.chain(*dealt)) == sorted(sizes)
        loads = [sum(sizes[each] for each in part) for part in dealt]
        assert words[parts_at : parts_at + shares.parts] == loads
        one_by_one = [0] * shares.parts
        for size in sorted(sizes.values(), reverse=True):
            one_by_one[one_by_one.index(min(one_by_one))] += size
        assert max(loads) == max(one_by_one) if usual == count else max(loads) <= 2 * max(one_by_one)


def check_rounded_rows() -> None:
    """Rows of numbers that have codes, by scales that are powers of two: the interpreter rounds others wrongly."""
    torch.manual_seed(0)
    codes = (torch.randn(5, 96) * 100).to(FP8)
    codes[:, 3] = torch.tensor([448.0, -448.0, 448.0, -448.0, 0.0]).to(FP8)
    codes[4] = 0.0
    scales = torch.tensor([1.0, 2.0**-20, 2.0**9, 0.5, 0.0])[:, None]
    found, scale = rounded_rows_kernels.round_rows(codes.float() * scales)
    assert torch.equal(found.float(), codes.float())
    assert torch.equal(scale[:4], scales[:4])
    _, scale = rounded_rows_kernels.round_rows(torch.tensor([[1.0, torch.nan] * 8]))
    assert bool(scale.isnan().all())
