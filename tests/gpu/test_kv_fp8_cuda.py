"""Pages of 8 bits on a GPU: the Triton attention ops against caches rounded by hand, and engines that have them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from attention_cases import Cache, by_hand, dense_packed, error, make_cache, newest_rows, pack, take_newest

import hybridgen
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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="numbers of 8 bits"
    ),
]
FP8 = torch.float8_e4m3fn
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SHAPES = [  # query heads, kv heads, key dim, value dim, page size
    (32, 8, 128, 128, 64),
    (32, 8, 64, 64, 64),
    (14, 2, 64, 64, 16),
    (16, 2, 96, 96, 32),
    (12, 6, 112, 64, 128),
    (8, 1, 256, 256, 64),
    (4, 2, 8, 8, 16),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"window": 300, "softcap": 5.0, "sinks": True},
    "chunk": {"chunk": 100},
}
CASES = [
    *[(shape, name, torch.bfloat16) for shape in SHAPES for name in ("plain", "all")],
    (SHAPES[0], "chunk", torch.bfloat16),
    (SHAPES[1], "all", torch.float16),
    (SHAPES[3], "plain", torch.float16),
    (SHAPES[2], "all", torch.float32),
    (SHAPES[0], "plain", torch.float32),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _options(name: str, heads: int, dtype: torch.dtype) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads, device="cuda").to(dtype)
    return options


def _filled(lengths: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> Cache:
    """A cache whose pages `write_kv` fills."""
    _, kv_heads, dim, value_dim, page_size = shape
    cache = make_cache(lengths, kv_heads, dim, value_dim, page_size, dtype, "cuda", filled=False, kept=FP8)
    slots, positions, _ = pack(cache, lengths, len(lengths))
    places = Places(cache.k_pages, cache.v_pages, cache.block_table, slots, positions)
    write_kv(torch.cat(cache.fed[0]), torch.cat(cache.fed[1]), places)
    return cache


def _poison() -> None:
    blocks = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(16)]
    del blocks


def _decode(q: Tensor, cache: Cache, options: dict[str, Any], **new: Tensor) -> Tensor:
    slots, positions, _ = pack(cache, [1] * len(q), len(q))
    places = Places(cache.k_pages, cache.v_pages, cache.block_table, slots, positions)
    given = Options(q.shape[2] ** -0.5, **options)
    schedule = make_schedule(*places[:3], q.shape[1], len(q), given.window, given.chunk)
    schedule_attention(places, q.shape[1], given.window, given.chunk, schedule)
    _poison()
    return decode_attention(q, places, given, schedule=schedule, **new)


def _newest_are_rounded(cache: Cache) -> bool:
    wanted = [torch.stack([one[-1].float() for one in each]) for each in (cache.keys, cache.values)]
    return all(torch.equal(a.float(), b) for a, b in zip(newest_rows(cache), wanted, strict=True))


@pytest.mark.parametrize("rows", [1, 10, 70])
@pytest.mark.parametrize(("shape", "name", "dtype"), CASES, ids=str)
def test_decode(shape: tuple[int, ...], name: str, dtype: torch.dtype, rows: int) -> None:
    lengths = [1, 16, 17, 1300, 63, 64, 65, 5000, 128, 129]
    lengths = [3000] if rows == 1 else lengths if rows == 10 else lengths + [7 * i + 1 for i in range(60)]
    assert is_balanced(rows) == (rows == 70)
    cache = _filled(lengths, shape, dtype)
    options = _options(name, shape[0], dtype)
    q = torch.randn(rows, shape[0], shape[2], device="cuda").to(dtype)
    expected = dense_packed(q, cache, [1] * rows, shape[2] ** -0.5, **options)
    assert error(_decode(q, cache, options), expected) < LIMITS[dtype]
    assert error(_decode(q, cache, options, **take_newest(cache)), expected) < LIMITS[dtype]
    assert _newest_are_rounded(cache)


@pytest.mark.parametrize("new", [[700, 1, 33, 5], [7, 1, 17, 3]], ids=["fresh", "continued"])
@pytest.mark.parametrize(("shape", "name", "dtype"), CASES, ids=str)
def test_prefill(shape: tuple[int, ...], name: str, dtype: torch.dtype, new: list[int]) -> None:
    cache = _filled([700, 1, 333, 90], shape, dtype)
    options = _options(name, shape[0], dtype)
    q = torch.randn(sum(new), shape[0], shape[2], device="cuda").to(dtype)
    slots, positions, starts = pack(cache, new, sequences=len(new) + 2)
    places = Places(cache.k_pages, cache.v_pages, cache.block_table, slots, positions)
    _poison()
    out = prefill_attention(q, places, starts, Options(shape[2] ** -0.5, **options))
    assert error(out, dense_packed(q, cache, new, shape[2] ** -0.5, **options)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_writes_round_to_the_nearest_and_saturate(dtype: torch.dtype) -> None:
    pages = torch.zeros(2, 1, 64, 128, dtype=FP8, device="cuda"), torch.zeros(2, 1, 64, 128, dtype=FP8, device="cuda")
    scale = torch.tensor([1e-3, 1.0, 30.0, 400.0], device="cuda").repeat(16)[:, None, None]
    k = (torch.randn(64, 1, 128, device="cuda") * scale).to(dtype)
    k[0, 0, :3] = torch.tensor([torch.nan, 1e4, -1e4])
    table = torch.tensor([[1]], dtype=torch.int32, device="cuda")
    places = torch.arange(64, device="cuda")
    write_kv(k, -k, Places(*pages, table, torch.zeros_like(places).int(), places))
    for page, sign in zip(pages, (1, -1), strict=True):
        found, wanted = sign * page[1, 0].float(), by_hand(k[:, 0]).float()
        wanted[0, 0] = found[0, 0] if found[0, 0].isnan() else 0.0
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("mode", ["eager", "graph", "hybrid"])
def test_engines_generate_the_same(mode: str, tmp_path: Path) -> None:
    """In float32 the tokens of the CPU's reference, prefix cache and drafts included."""
    path = families.write("llama", tmp_path)
    settings: dict[str, Any] = {"max_batch": 4, "page_size": 16, "token_budget": 48, "max_context": 128}
    settings |= {"kv_memory": "16MiB", "kv_dtype": "fp8", "dtype": "float32"}
    prompts = [*families.prompts_of((7, 70, 1, 33)), families.prompts_of((70,))[0]]
    with hybridgen.Engine.load(path, mode="eager", device="cpu", **settings) as engine:
        expected = [out.token_ids for out in engine.generate(prompts, max_new_tokens=14)]
    for more in ({}, {"speculation": "ngram"}):
        with hybridgen.Engine.load(path, mode=mode, device="cuda", **more, **settings) as engine:
            assert [out.token_ids for out in engine.generate(prompts, max_new_tokens=14)] == expected
            stats = engine.stats()
            if mode == "hybrid":
                assert "cached in 8 bits" in " ".join(stats.fused.values())
            assert not stats.graphs.failures
