"""The Triton attention ops on a GPU against dense float64 attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from attention_cases import NO_PAGE, Cache, dense_packed, error, make_cache, newest_rows, pack, take_newest

from hybridgen.kernels.attention import balanced
from hybridgen.kernels.attention import reference as attention_reference
from hybridgen.kernels.attention.ops import (
    Options,
    Places,
    decode_attention,
    make_schedule,
    prefill_attention,
    schedule_attention,
    write_kv,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
OPTIONS = {
    "plain": {},
    "window": {"window": 100},
    "chunk": {"chunk": 100},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 300, "softcap": 5.0, "sinks": True},
}
SHAPES = [  # query heads, kv heads, key dim, value dim, page size
    (32, 8, 64, 64, 64),
    (32, 8, 128, 128, 64),
    (8, 8, 128, 128, 16),
    (14, 2, 64, 64, 16),
    (7, 1, 80, 80, 8),
    (16, 2, 96, 96, 32),
    (12, 6, 112, 64, 128),
    (8, 1, 256, 256, 64),
    (64, 8, 64, 64, 256),
    (4, 2, 8, 8, 16),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    # Each shape as most layers are, and with everything at once; each option alone; the other dtypes.
    *[(shape, name, BF16) for shape in SHAPES for name in ("plain", "all")],
    *[(shape, name, BF16) for shape in SHAPES[1:3] for name in ("window", "chunk", "softcap", "sinks")],
    *[(shape, name, FP32) for shape, name in zip(SHAPES[2:8], OPTIONS, strict=True)],
    *[(shape, name, FP16) for shape, name in zip(SHAPES[4:], OPTIONS, strict=True)],
]
EACH_CASE = pytest.mark.parametrize(("shape", "name", "dtype"), CASES, ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[FP32, BF16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def by_schedule(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call that attended by a schedule."""
    found: list[int] = []
    attend = balanced.decode_attention
    monkeypatch.setattr(
        balanced, "decode_attention", lambda q, *rest, **new: found.append(len(q)) or attend(q, *rest, **new)
    )
    return found


def _options(name: str, heads: int, dtype: torch.dtype) -> dict:
    options = dict(OPTIONS[name])
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads, device="cuda").to(dtype)
    return options


def _poison() -> None:
    """Fill freed memory with NaN, so that an output element which nobody writes shows."""
    blocks = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(16)]
    del blocks


def _decode(q: Tensor, cache: Cache, **options) -> Tensor:
    """As a step does it: with a schedule, of which steps of few rows make no use."""
    slots, positions, _ = pack(cache, [1] * len(q), len(q))
    new = {name: options.pop(name) for name in ("k", "v") if name in options}
    return _attend(q, Places(*pages_of(cache), slots, positions), Options(q.shape[2] ** -0.5, **options), **new)


def _attend(q: Tensor, places: Places, options: Options, **new) -> Tensor:
    limits = options.window, options.chunk
    schedule = make_schedule(*places[:3], q.shape[1], len(q) + 9, *limits)
    schedule.fill_(-1)  # what is read of it was written for these rows
    schedule_attention(places, q.shape[1], *limits, schedule)
    _poison()
    return decode_attention(q, places, options, schedule=schedule, **new)


def _prefill(q: Tensor, cache: Cache, new: list[int], **options) -> Tensor:
    slots, positions, starts = pack(cache, new, sequences=len(new) + 2)
    _poison()
    pages = cache.k_pages, cache.v_pages, cache.block_table
    return prefill_attention(q, Places(*pages, slots, positions), starts, Options(q.shape[2] ** -0.5, **options))


def _strided(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """A view of a wider, transposed buffer, as a fused projection leaves it."""
    wide = torch.randn(tokens, (heads + 3) * dim, device="cuda").to(dtype)
    return wide.view(tokens, heads + 3, dim)[:, 2 : 2 + heads]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*[(shape, BF16) for shape in SHAPES], (SHAPES[6], FP32), (SHAPES[7], FP16)], ids=str
)
def test_write_kv(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, kv_heads, dim, value_dim, page_size = shape
    lengths = [1, 300, 77]
    empty = make_cache(lengths, kv_heads, dim, value_dim, page_size, dtype, "cuda", filled=False)
    slots, positions, _ = pack(empty, lengths, 3)
    k, v = torch.cat(empty.keys), torch.cat(empty.values)
    both = torch.cat([k, v], dim=2).transpose(0, 1).contiguous().transpose(0, 1)
    pages = empty.k_pages, empty.v_pages, empty.block_table
    write_kv(both[:, :, :dim], both[:, :, dim:], Places(*pages, slots, positions))
    page = empty.block_table[slots.long(), positions // page_size].long()
    assert torch.equal(empty.k_pages[page, :, positions % page_size], k)
    assert torch.equal(empty.v_pages[page, :, positions % page_size], v)
    assert empty.k_pages.isfinite().sum() == k.numel()
    assert empty.v_pages.isfinite().sum() == v.numel()


@EACH_CASE
def test_decode(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    heads, kv_heads, dim, value_dim, page_size = shape
    lengths = [1, 16, 17, 1300, 63, 64, 65, 5000, 128, 129]
    cache = make_cache(lengths, kv_heads, dim, value_dim, page_size, dtype, "cuda")
    options = _options(name, heads, dtype)
    q = _strided(len(lengths), heads, dim, dtype)
    expected = dense_packed(q, cache, [1] * len(lengths), dim**-0.5, **options)
    assert error(_decode(q, cache, **options), expected) < LIMITS[dtype]
    for row in (0, 7):
        one = cache.only(row)
        assert error(_decode(q[row : row + 1], one, **options), expected[row : row + 1]) < LIMITS[dtype]
        newest = take_newest(one)
        assert error(_decode(q[row : row + 1], one, **options, **newest), expected[row : row + 1]) < LIMITS[dtype]
        assert all(torch.equal(a, b) for a, b in zip(newest_rows(one), newest.values(), strict=True))
    newest = take_newest(cache)
    assert error(_decode(q, cache, **options, **newest), expected) < LIMITS[dtype]
    for written, given in zip(newest_rows(cache), newest.values(), strict=True):
        assert torch.equal(written, given)


BORDERS = [1, 2, 16, 17, 63, 64, 65, 128, 129, 255, 256, 257, 511, 512, 513, 1024, 1025, 4000]


def _ragged(rows: int, top: int) -> list[int]:
    return [*BORDERS, *torch.randint(1, top, (rows - len(BORDERS),)).tolist()]


@EACH_CASE
def test_decode_by_a_schedule(shape: tuple[int, ...], name: str, dtype: torch.dtype, by_schedule: list[int]) -> None:
    heads, kv_heads, dim, value_dim, page_size = shape
    cache = make_cache(_ragged(70, 1200), kv_heads, dim, value_dim, page_size, dtype, "cuda")
    options = _options(name, heads, dtype)
    q = _strided(70, heads, dim, dtype)
    expected = dense_packed(q, cache, [1] * 70, dim**-0.5, **options)
    assert error(_decode(q, cache, **options), expected) < LIMITS[dtype]
    newest = take_newest(cache)
    assert error(_decode(q, cache, **options, **newest), expected) < LIMITS[dtype]
    for written, given in zip(newest_rows(cache), newest.values(), strict=True):
        assert torch.equal(written, given)
    assert by_schedule == [70, 70]


@pytest.mark.parametrize("rows", [64, 256, 700])
def test_decode_of_many_rows_by_a_schedule(rows: int, by_schedule: list[int]) -> None:
    cache = make_cache(_ragged(rows, 300), 2, 64, page_size=64, dtype=BF16, device="cuda")
    q = torch.randn(rows, 8, 64, device="cuda").bfloat16()
    assert error(_decode(q, cache), dense_packed(q, cache, [1] * rows, 0.125)) < LIMITS[BF16]
    assert by_schedule == [rows]


def test_a_very_long_row_among_others_by_a_schedule(by_schedule: list[int]) -> None:
    """Also chunks that are longer than usual, so that their sums fit in scratch."""
    lengths = [131_072, *_ragged(63, 300)]
    cache = make_cache(lengths, 1, 128, page_size=64, dtype=BF16, device="cuda")
    q = torch.randn(64, 32, 128, device="cuda").bfloat16()
    assert error(_decode(q, cache), dense_packed(q, cache, [1] * 64, 128**-0.5)) < LIMITS[BF16]
    assert by_schedule == [64]


def test_few_rows_are_not_attended_by_a_schedule(by_schedule: list[int]) -> None:
    cache = make_cache([100] * 23, 2, 64, page_size=16, dtype=BF16, device="cuda")
    q = torch.randn(23, 8, 64, device="cuda").bfloat16()
    assert error(_decode(q, cache), dense_packed(q, cache, [1] * 23, 0.125)) < LIMITS[BF16]
    assert not by_schedule


def test_a_schedule_needs_room() -> None:
    cache = make_cache([100] * 64, 2, 64, page_size=16, dtype=BF16, device="cuda")
    slots, positions, _ = pack(cache, [1] * 64, 64)
    places = Places(*pages_of(cache), slots, positions)
    schedule = make_schedule(*pages_of(cache), 8, 64, 0, 0)
    with pytest.raises(ValueError, match="for 64 rows"):
        schedule_attention(places, 8, 0, 0, schedule[:-1])


def pages_of(cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
    return cache.k_pages, cache.v_pages, cache.block_table


@pytest.mark.parametrize("lengths", [[32768], [32768, 5, 700, 20000], [100] * 70], ids=["one", "ragged", "many"])
def test_decode_long_and_many(lengths: list[int], dtype: torch.dtype) -> None:
    cache = make_cache(lengths, 2, 64, page_size=64, dtype=dtype, device="cuda", spare_pages=100)
    q = torch.randn(len(lengths), 8, 64, device="cuda").to(dtype)
    expected = dense_packed(q, cache, [1] * len(lengths), 64**-0.5)
    assert error(_decode(q, cache), expected) < LIMITS[dtype]
    newest = take_newest(cache)
    assert error(_decode(q, cache, **newest), expected) < LIMITS[dtype]
    assert all(torch.equal(a, b) for a, b in zip(newest_rows(cache), newest.values(), strict=True))


def test_decode_rows_that_never_split(dtype: torch.dtype) -> None:
    cache = make_cache([30, 40, 1], 2, 64, page_size=64, dtype=dtype, device="cuda", spare_pages=0)
    q = torch.randn(3, 8, 64, device="cuda").to(dtype)
    assert error(_decode(q, cache), dense_packed(q, cache, [1] * 3, 0.125)) < LIMITS[dtype]


def test_reference_runs_on_cuda_too(dtype: torch.dtype) -> None:
    cache = make_cache([90, 40], 2, 64, page_size=16, dtype=dtype, device="cuda")
    q = torch.randn(60, 8, 64, device="cuda").to(dtype)
    slots, positions, starts = pack(cache, [50, 10], 2)
    out = attention_reference.prefill_attention(q, *pages_of(cache), slots, positions, starts, 0.125, 9, 0, 2.0, None)
    expected = dense_packed(q, cache, [50, 10], 0.125, window=9, softcap=2.0)
    assert error(out, expected) < max(LIMITS[dtype], 1e-5)
    out = attention_reference.decode_attention(q, *pages_of(cache), slots, positions, 0.125, 9, 0, 2.0, None)
    assert error(out, expected) < max(LIMITS[dtype], 1e-5)


@EACH_CASE
def test_prefill(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    heads, kv_heads, dim, value_dim, page_size = shape
    cache = make_cache([300, 1, 130, 64], kv_heads, dim, value_dim, page_size, dtype, "cuda")
    options = _options(name, heads, dtype)
    for new in ([300, 1, 130, 64], [65, 1, 100, 1]):  # all of the prompts, and their ends
        q = _strided(sum(new), heads, dim, dtype)
        expected = dense_packed(q, cache, new, dim**-0.5, **options)
        assert error(_prefill(q, cache, new, **options), expected) < LIMITS[dtype]


@pytest.mark.parametrize("dim", [64, 128])
def test_prefill_large_tiles(dim: int, dtype: torch.dtype) -> None:
    cache = make_cache([2500, 600], 8, dim, page_size=64, dtype=dtype, device="cuda")
    for new in ([2500, 600], [2100, 33]):
        q = torch.randn(sum(new), 32, dim, device="cuda").to(dtype)
        expected = dense_packed(q, cache, new, dim**-0.5)
        assert error(_prefill(q, cache, new), expected) < LIMITS[dtype]


@pytest.mark.parametrize("rows", [2, 66])
def test_freed_pages_before_the_window(rows: int, dtype: torch.dtype) -> None:
    cache = make_cache([1000, 600] * (rows // 2), 2, 64, page_size=16, dtype=dtype, device="cuda")
    window, new = 200, [300, 100] * (rows // 2)
    for slot, length, count in zip(cache.slots.tolist(), cache.lengths, new, strict=True):
        lowest = length - count - window + 1
        page = cache.block_table[slot, lowest // 16]
        cache.k_pages[page, :, : lowest % 16] = torch.nan
        cache.v_pages[page, :, : lowest % 16] = torch.nan
        cache.block_table[slot, : lowest // 16] = NO_PAGE
    if rows == 2:
        q = torch.randn(400, 8, 64, device="cuda").to(dtype)
        expected = dense_packed(q, cache, new, 0.125, window=window)
        assert error(_prefill(q, cache, new, window=window), expected) < LIMITS[dtype]
    q = torch.randn(rows, 8, 64, device="cuda").to(dtype)
    expected = dense_packed(q, cache, [1] * rows, 0.125, window=window)
    assert error(_decode(q, cache, window=window), expected) < LIMITS[dtype]


def test_queries_of_other_strides_and_alignments_after_each_other() -> None:
    cache = make_cache([70, 300], 2, 64, page_size=16, dtype=torch.bfloat16, device="cuda")
    flat = torch.randn(100_000, device="cuda").bfloat16()
    limit = LIMITS[torch.bfloat16]
    for offset, token, head in ((0, 512, 64), (3, 512, 64), (0, 520, 65), (0, 64, 6400), (8, 512, 64), (1, 513, 64)):
        q = flat.as_strided((80, 8, 64), (token, head, 1), offset)
        assert error(_prefill(q, cache, [70, 10]), dense_packed(q, cache, [70, 10], 0.125)) < limit
        assert error(_decode(q[:2], cache), dense_packed(q[:2], cache, [1, 1], 0.125)) < limit
        one = cache.only(0)
        assert error(_decode(q[:1], one), dense_packed(q[:1], one, [1], 0.125)) < limit
        slots, positions, _ = pack(cache, [70, 10], 2)
        copy = make_cache([70, 300], 2, 64, page_size=16, dtype=torch.bfloat16, device="cuda", filled=False)
        k = q[:, :2]
        write_kv(k, k, Places(copy.k_pages, copy.v_pages, cache.block_table, slots, positions))
        page = cache.block_table[slots.long(), positions // 16].long()
        assert torch.equal(copy.k_pages[page, :, positions % 16], k)
        assert torch.equal(copy.v_pages[page, :, positions % 16], k)


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(rows: int, name: str) -> None:
    lengths = [700, 9000, 3, 64, *torch.randint(1, 3000, (rows - 4,)).tolist()]
    cache = make_cache(lengths, 2, 64, page_size=16, dtype=BF16, device="cuda")
    q = torch.randn(rows, 8, 64, device="cuda").bfloat16()
    slots, positions, _ = pack(cache, [1] * rows, rows)
    options = Options(0.125, **_options(name, 8, BF16))
    first = _attend(q, Places(*pages_of(cache), slots, positions), options)
    order = torch.tensor([3, 1, 1, 0] * (rows // 4), device="cuda")
    second = _attend(q[order], Places(*pages_of(cache), slots[order], positions[order]), options)
    assert torch.equal(first[order], second)
    # One row, and padding.
    positions[2:] = positions[0] = 0
    cache.block_table[slots[2:].long(), 0] = cache.block_table[slots[0].long(), 0]
    third = _attend(q, Places(*pages_of(cache), slots, positions), options)
    assert torch.equal(first[1], third[1])


@pytest.mark.parametrize("tokens", [1, 8, 80])
def test_decode_graph_replays_with_other_lengths_and_tables(tokens: int) -> None:
    dtype = torch.bfloat16
    caches = [
        make_cache(
            torch.randint(1, high, (tokens,)).tolist(),
            2,
            64,
            page_size=16,
            dtype=dtype,
            device="cuda",
            spare_pages=9,
        )
        for high in (40, 4000, 400)
    ]
    columns = max(c.block_table.shape[1] for c in caches)
    pages = max(len(c.k_pages) for c in caches)
    k_pages = torch.full((pages, 2, 16, 64), torch.nan, dtype=dtype, device="cuda")
    v_pages = k_pages.clone()
    table = torch.full((tokens + 2, columns), NO_PAGE, dtype=torch.int32, device="cuda")
    slots = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    positions = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    q, k, v = torch.randn(tokens, 12, 64, device="cuda").to(dtype).split([8, 2, 2], dim=1)

    schedule = make_schedule(k_pages, v_pages, table, 8, tokens, 0, 0)

    def step() -> tuple[Tensor, Tensor]:
        places = Places(k_pages, v_pages, table, slots, positions)
        write_kv(k, v, places)
        schedule_attention(places, 8, 0, 0, schedule)
        layers = [decode_attention(q, places, Options(0.125), schedule=schedule) for _ in range(2)]
        return layers[0], layers[1]

    def fill(cache: Cache) -> None:
        for target, source in ((k_pages, cache.k_pages), (v_pages, cache.v_pages)):
            target.fill_(torch.nan)
            target[: len(source)] = source
        table.fill_(NO_PAGE)
        table[:, : cache.block_table.shape[1]] = cache.block_table
        slots.copy_(cache.slots)
        positions.copy_(torch.tensor(cache.lengths) - 1)
        q.normal_()
        k.normal_()
        v.normal_()

    fill(caches[0])
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for cache in caches:
        fill(cache)
        for i in range(tokens):
            cache.keys[i][-1] = k[i]
            cache.values[i][-1] = v[i]
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        for out in outs:
            assert error(out, dense_packed(q, cache, [1] * tokens, 0.125)) < LIMITS[dtype]


def test_prefill_graph_replays_with_other_starts() -> None:
    dtype = torch.bfloat16
    cache = make_cache([150, 90, 400], 2, 64, page_size=16, dtype=dtype, device="cuda")
    q = torch.randn(200, 8, 64, device="cuda").to(dtype)
    buffers = [t.clone() for t in pack(cache, [100, 60, 40], sequences=4)]

    def step() -> Tensor:
        slots, positions, starts = buffers
        return prefill_attention(q, Places(*pages_of(cache), slots, positions), starts, Options(0.125))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for new in ([100, 60, 40], [1, 0, 199], [150, 50, 0]):
        for buffer, value in zip(buffers, pack(cache, new, sequences=4), strict=True):
            buffer.copy_(value)
        out.fill_(torch.nan)
        graph.replay()
        assert error(out, dense_packed(q, cache, new, 0.125)) < LIMITS[dtype]


def test_compiled_write_copies_no_cache() -> None:
    cache = make_cache([200, 30], 2, 64, page_size=16, dtype=torch.bfloat16, device="cuda", filled=False)
    slots, positions, starts = pack(cache, cache.lengths, 2)
    qkv = torch.randn(230, 12 * 64, device="cuda").bfloat16()
    qkv.view(230, 12, 64)[:, 8:10] = torch.cat(cache.keys)
    qkv.view(230, 12, 64)[:, 10:] = torch.cat(cache.values)

    def layer(qkv: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        q, k, v = (qkv * 1).view(-1, 12, 64).split([8, 2, 2], dim=1)
        places = Places(k_pages, v_pages, cache.block_table, slots, positions)
        write_kv(k, v, places)
        out = prefill_attention(q, places, starts, Options(0.125))
        return out + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    out, (code,) = torch._inductor.utils.run_and_get_code(compiled, qkv, cache.k_pages, cache.v_pages)
    q = qkv.view(230, 12, 64)[:, :8]
    assert error(out, dense_packed(q, cache, cache.lengths, 0.125) + 1) < LIMITS[torch.bfloat16]
    assert "clone" not in code
    assert "copy_" not in code
