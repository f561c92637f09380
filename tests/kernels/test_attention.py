"""The attention ops on the CPU against dense float64 attention."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from attention_cases import NO_PAGE, dense_packed, error, make_cache, newest_rows, pack, take_newest
from torch import Tensor

from hybridgen.kernels.attention import reference as attention_reference
from hybridgen.kernels.attention.ops import (
    Options,
    Places,
    decode_attention,
    is_balanced,
    make_schedule,
    prefill_attention,
    schedule_attention,
    write_kv,
)

OPTIONS = {
    "plain": {},
    "window": {"window": 21},
    "window of one": {"window": 1},
    "wide window": {"window": 4096},
    "chunk": {"chunk": 21},
    "chunk of one": {"chunk": 1},
    "wide chunk": {"chunk": 4096},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 40, "softcap": 5.0, "sinks": True},
    "all but a window": {"chunk": 32, "softcap": 5.0, "sinks": True},
}
SHAPES = [  # query heads, kv heads, key dim, value dim, page size
    (4, 4, 8, 8, 8),
    (4, 2, 64, 64, 16),
    (8, 2, 80, 80, 64),
    (7, 1, 96, 96, 16),
    (16, 2, 128, 128, 16),
    (14, 2, 64, 32, 8),
    (6, 3, 24, 40, 256),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _options(name: str, heads: int) -> dict:
    options = dict(OPTIONS[name])
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads)
    return options


def _decode(q: Tensor, cache, **options) -> Tensor:
    positions = torch.tensor(cache.lengths) - 1
    new = {name: options.pop(name) for name in ("k", "v") if name in options}
    places = Places(cache.k_pages, cache.v_pages, cache.block_table, cache.slots, positions)
    return decode_attention(q, places, Options(0.3, **options), **new)


def _prefill(q: Tensor, cache, new: list[int], **options) -> Tensor:
    slots, positions, starts = pack(cache, new, sequences=len(new) + 2)
    places = Places(cache.k_pages, cache.v_pages, cache.block_table, slots, positions)
    return prefill_attention(q, places, starts, Options(0.3, **options))


def test_write_kv_puts_each_token_in_its_page() -> None:
    cache = make_cache([1, 40, 17], kv_heads=3, dim=16, value_dim=8, filled=False)
    full = make_cache([1], kv_heads=3, dim=16, value_dim=8)  # the table row of another call is not touched
    qkv = torch.randn(58, 5 * 3, 24).transpose(0, 1).contiguous().transpose(0, 1)  # heads before tokens in memory
    k, v = qkv[:, 3:6, :16], qkv[:, 6:9, 16:]
    slots, positions, _ = pack(cache, cache.lengths, sequences=3)
    write_kv(k, v, Places(cache.k_pages, cache.v_pages, cache.block_table, slots, positions))
    for token in range(58):
        page = cache.block_table[slots[token], positions[token] // 16]
        assert torch.equal(cache.k_pages[page, :, positions[token] % 16], k[token])
        assert torch.equal(cache.v_pages[page, :, positions[token] % 16], v[token])
    assert cache.k_pages.isfinite().sum() == k.numel()
    assert cache.v_pages.isfinite().sum() == v.numel()
    assert full.k_pages.isfinite().sum() == 3 * 16


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_matches_dense(shape: tuple[int, ...], name: str) -> None:
    heads, kv_heads, dim, value_dim, page_size = shape
    cache = make_cache([1, 16, 17, 130, 63, 64, 65], kv_heads, dim, value_dim, page_size)
    options = _options(name, heads)
    q = torch.randn(7, heads, dim)
    expected = dense_packed(q, cache, [1] * 7, 0.3, **options)
    assert error(_decode(q, cache, **options), expected) < 1e-6
    newest = take_newest(cache)
    assert error(_decode(q, cache, **options, **newest), expected) < 1e-6
    for written, given in zip(newest_rows(cache), newest.values(), strict=True):
        assert torch.equal(written, given)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("new", [[70, 1, 33, 5], [7, 1, 17, 3]], ids=["fresh", "continued"])
def test_prefill_matches_dense(shape: tuple[int, ...], name: str, new: list[int]) -> None:
    heads, kv_heads, dim, value_dim, page_size = shape
    cache = make_cache([70, 1, 33, 5], kv_heads, dim, value_dim, page_size)
    options = _options(name, heads)
    q = torch.randn(sum(new), heads, dim)
    expected = dense_packed(q, cache, new, 0.3, **options)
    assert error(_prefill(q, cache, new, **options), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    cache = make_cache([50, 90], 2, 64, dtype=dtype)
    limit = 4 * torch.finfo(dtype).eps
    q = torch.randn(2, 8, 64).to(dtype)
    out = _decode(q, cache)
    assert out.dtype == dtype
    assert error(out, dense_packed(q, cache, [1, 1], 0.3)) < limit
    q = torch.randn(60, 8, 64).to(dtype)
    out = _prefill(q, cache, [50, 10])
    assert out.dtype == dtype
    assert error(out, dense_packed(q, cache, [50, 10], 0.3)) < limit


def test_queries_may_be_strided_views() -> None:
    cache = make_cache([30, 8], 2, 16)
    q = torch.randn(4, 38, 20).transpose(0, 1)[:, :, 2:18]
    out = _prefill(q, cache, [30, 8])
    assert out.is_contiguous()
    assert error(out, dense_packed(q, cache, [30, 8], 0.3)) < 1e-6
    out = _decode(q[:2], cache)
    assert out.is_contiguous()
    assert error(out, dense_packed(q[:2], cache, [1, 1], 0.3)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"window": 24}, {"chunk": 24}])
@pytest.mark.parametrize("step", [1, 7, 16, 50])
def test_prefill_in_parts_equals_one_prefill(step: int, options: dict) -> None:
    cache = make_cache([100], 2, 16, page_size=8, filled=False)
    table, slot = cache.block_table, cache.slots
    q = torch.randn(100, 4, 16)
    parts = []
    for begin in range(0, 100, step):
        places = torch.arange(begin, min(begin + step, 100))
        slots = slot.expand(len(places))
        k, v = cache.keys[0][places], cache.values[0][places]
        write_kv(k, v, Places(cache.k_pages, cache.v_pages, table, slots, places))
        starts = torch.tensor([0, len(places), len(places)], dtype=torch.int32)
        parts.append(
            prefill_attention(
                q[places],
                Places(cache.k_pages, cache.v_pages, table, slots, places),
                starts,
                Options(0.3, **options),
            )
        )
    assert error(torch.cat(parts), dense_packed(q, cache, [100], 0.3, **options)) < 1e-6


def test_sequences_without_tokens() -> None:
    cache = make_cache([20, 9], 2, 16)
    slots, positions, starts = pack(cache, [20, 9], sequences=2)
    starts = torch.tensor([0, 0, 20, 20, 29, 29], dtype=torch.int32)
    q = torch.randn(29, 4, 16)
    pages = cache.k_pages, cache.v_pages, cache.block_table
    out = prefill_attention(q, Places(*pages, slots, positions), starts, Options(0.3))
    assert error(out, dense_packed(q, cache, [20, 9], 0.3)) < 1e-6
    assert prefill_attention(q[:0], Places(*pages, slots[:0], positions[:0]), starts * 0, Options(0.3)).shape == (
        0,
        4,
        16,
    )
    assert decode_attention(q[:0], Places(*pages, slots[:0], positions[:0]), Options(0.3)).shape == (0, 4, 16)


def test_padding_rows_on_the_dummy_page_touch_no_other_row() -> None:
    cache = make_cache([37, 12], 2, 16)
    cache.block_table[:, -1] = 0
    padding = next(s for s in range(4) if s not in cache.slots.tolist())
    cache.block_table[padding] = 0
    q = torch.randn(5, 4, 16)
    slots = torch.cat([cache.slots, torch.full((3,), padding, dtype=torch.int32)])
    positions = torch.tensor([36, 11, 0, 0, 5])
    pages = cache.k_pages, cache.v_pages, cache.block_table
    out = decode_attention(q, Places(*pages, slots, positions), Options(0.3))
    assert error(out[:2], dense_packed(q[:2], cache, [1, 1], 0.3)) < 1e-6
    nan = torch.full((5, 2, 16), torch.nan)
    before = cache.k_pages[1:].clone()
    write_kv(nan[2:], nan[2:], Places(*pages, slots[2:], positions[2:]))
    assert torch.equal(before.nan_to_num(9.0), cache.k_pages[1:].nan_to_num(9.0))


def test_pages_before_the_window_may_be_gone() -> None:
    cache = make_cache([100, 60], 2, 16, page_size=8)
    window = 20
    slots, positions, starts = pack(cache, [30, 10], sequences=2)
    for i, length, new in ((0, 100, 30), (1, 60, 10)):
        lowest = length - new - window + 1
        slot = cache.slots[i]
        page = cache.block_table[slot, lowest // 8]
        cache.k_pages[page, :, : lowest % 8] = torch.nan
        cache.v_pages[page, :, : lowest % 8] = torch.nan
        cache.block_table[slot, : lowest // 8] = NO_PAGE
    q = torch.randn(40, 4, 16)
    pages = cache.k_pages, cache.v_pages, cache.block_table
    out = prefill_attention(q, Places(*pages, slots, positions), starts, Options(0.3, window=window))
    assert error(out, dense_packed(q, cache, [30, 10], 0.3, window=window)) < 1e-6
    q = torch.randn(2, 4, 16)
    assert error(_decode(q, cache, window=window), dense_packed(q, cache, [1, 1], 0.3, window=window)) < 1e-6


def test_long_rows_are_worked_off_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_reference, "_GATHER_BYTES", 1)
    monkeypatch.setattr(attention_reference, "_SCORE_ELEMENTS", 1000)
    cache = make_cache([50, 30, 70], 2, 16)
    q = torch.randn(3, 4, 16)
    assert error(_decode(q, cache, softcap=2.0), dense_packed(q, cache, [1] * 3, 0.3, softcap=2.0)) < 1e-6
    q = torch.randn(60, 4, 16)
    for options in ({}, {"softcap": 2.0}, {"window": 9}, {"chunk": 9}):
        out = _prefill(q, cache, [10, 30, 20], **options)
        assert error(out, dense_packed(q, cache, [10, 30, 20], 0.3, **options)) < 1e-6


def test_opcheck() -> None:
    cache = make_cache([9, 20], 2, 16)
    slots, positions, starts = pack(cache, [9, 20], sequences=3)
    for tensor in (cache.k_pages, cache.v_pages):
        tensor.nan_to_num_(0.0)
    pages = cache.k_pages, cache.v_pages, cache.block_table
    k, v, q = torch.randn(29, 2, 16), torch.randn(29, 2, 16), torch.randn(29, 4, 16)
    ops = torch.ops.hybridgen
    torch.library.opcheck(ops.write_kv.default, (k, v, *pages, slots, positions))
    options = (0.3, 7, 0, 2.0, torch.randn(4))
    torch.library.opcheck(ops.decode_attention.default, (q, *pages, slots, positions, *options))
    torch.library.opcheck(ops.decode_attention.default, (q, *pages, slots, positions, *options, k, v))
    schedule = torch.zeros(9, dtype=torch.int32)
    torch.library.opcheck(ops.decode_attention.default, (q, *pages, slots, positions, *options, k, v, schedule))
    torch.library.opcheck(ops.schedule_attention.default, (*pages, slots, positions, 4, 7, 0, schedule))
    torch.library.opcheck(ops.prefill_attention.default, (q, *pages, slots, positions, starts, *options))


def _prefill_layer(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    """A layer's attention as a model calls it."""
    k_pages, v_pages, table, slots, positions, starts = rest
    places = Places(k_pages, v_pages, table, slots, positions)
    write_kv(k, v, places)
    return prefill_attention(q * 2, places, starts, Options(0.3)) + 1


def _decode_layer(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    k_pages, v_pages, table, slots, positions, _ = rest
    places = Places(k_pages, v_pages, table, slots, positions)
    return decode_attention(q * 2, places, Options(0.3), k=k, v=v) + 1


LAYERS = pytest.mark.parametrize("layer", [_prefill_layer, _decode_layer])


def _compile_case(tokens: int) -> tuple[Tensor, ...]:
    cache = make_cache([tokens], 2, 16, filled=False)
    slots, positions, starts = pack(cache, [tokens], sequences=2)
    inputs = torch.randn(tokens, 8, 16)
    q, k, v = inputs.split([4, 2, 2], dim=1)
    # Pages and table keep their sizes; the number of tokens varies.
    k_pages = torch.full((9, 2, 16, 16), torch.nan)
    table = torch.zeros(3, 6, dtype=torch.int32)
    table[cache.slots[0] % 3, :4] = torch.tensor([5, 2, 7, 1], dtype=torch.int32)
    return q, k, v, k_pages, k_pages.clone(), table, slots % 3, positions, starts


@LAYERS
def test_compile_keeps_one_graph_for_all_lengths(layer: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (5, 20, 33):
        inputs = _compile_case(tokens)
        expected = layer(*(x.clone() for x in inputs))
        for x in (inputs[0], inputs[1], inputs[2], inputs[6], inputs[7]):
            torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
        assert torch.allclose(compiled(*inputs), expected)
    assert counter.frame_count == 1


@LAYERS
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiled_write_copies_no_cache(layer: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    inputs = _compile_case(20)
    expected = layer(*(x.clone() for x in inputs))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    out, (code,) = torch._inductor.utils.run_and_get_code(compiled, *inputs)
    assert torch.allclose(out, expected)
    assert "torch.ops.hybridgen." in code
    assert "clone" not in code
    assert "copy_" not in code
    assert "empty_strided_cpu((9, 2, 16, 16)" not in code


def test_import_without_triton() -> None:
    script = "import sys; sys.modules['triton'] = None; import hybridgen.kernels"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_reference_attends_whatever_the_schedule_holds() -> None:
    cache = make_cache([20, 9], 2, 16)
    slots, positions, _ = pack(cache, [1, 1], sequences=2)
    places = Places(cache.k_pages, cache.v_pages, cache.block_table, slots, positions)
    schedule = make_schedule(*places[:3], 4, 200, 0, 0)
    assert (schedule.numel(), schedule.dtype) == (0, torch.int32)  # nobody reads it here
    schedule_attention(places, 4, 0, 0, schedule)
    q = torch.randn(2, 4, 16)
    out = decode_attention(q, places, Options(0.3), schedule=torch.full((9,), -1, dtype=torch.int32))
    assert error(out, dense_packed(q, cache, [1, 1], 0.3)) < 1e-6


def test_steps_of_many_rows_are_balanced() -> None:
    assert not any(map(is_balanced, range(24)))
    assert all(map(is_balanced, (24, 25, 64, 128, 4096)))
