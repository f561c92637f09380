"""The attention ops on the CPU with pages of 8 bits, against caches that are rounded by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import by_hand, dense_packed, error, make_cache, newest_rows, pack, take_newest

from hybridgen.kernels.attention.ops import Options, Places, decode_attention, prefill_attention, write_kv

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 2.0}, {"chunk": 24}], ids=str)
def test_pages_are_a_cache_that_is_rounded_by_hand(dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    lengths, new, ones = [1, 40, 33, 17], [1, 5, 33, 1], [1] * 4
    cache = make_cache(lengths, 2, 16, 24, dtype=dtype, filled=False, kept=FP8)
    pages = cache.k_pages, cache.v_pages, cache.block_table
    slots, positions, _ = pack(cache, lengths, len(lengths))
    write_kv(torch.cat(cache.fed[0]), torch.cat(cache.fed[1]), Places(*pages, slots, positions))
    q = torch.randn(len(lengths), 4, 16).to(dtype)
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    expected = dense_packed(q, cache, ones, 0.3, **options)
    slots, positions, _ = pack(cache, ones, len(lengths))
    places = Places(*pages, slots, positions)
    assert error(decode_attention(q, places, Options(0.3, **options)), expected) < limit
    out = decode_attention(q, places, Options(0.3, **options), **take_newest(cache))
    assert error(out, expected) < limit
    for found, wanted in zip(newest_rows(cache), (cache.keys, cache.values), strict=True):
        assert torch.equal(found.float(), torch.stack([one[-1].float() for one in wanted]))
    q = torch.randn(sum(new), 4, 16).to(dtype)
    slots, positions, starts = pack(cache, new, sequences=len(new) + 2)
    out = prefill_attention(q, Places(*pages, slots, positions), starts, Options(0.3, **options))
    assert error(out, dense_packed(q, cache, new, 0.3, **options)) < limit


def test_one_position_of_all_rows_is_written_as_it_is_rounded() -> None:
    torch.manual_seed(4)
    cache = make_cache([20, 20], 2, 16, dtype=torch.float32, kept=FP8)
    q = torch.randn(2, 4, 16)
    expected = dense_packed(q, cache, [1, 1], 0.3)
    newest = take_newest(cache)
    slots, positions, _ = pack(cache, [1, 1], 2)
    places = Places(cache.k_pages, cache.v_pages, cache.block_table, slots, positions)
    assert error(decode_attention(q, places, Options(0.3), **newest), expected) < 1e-6


def test_what_is_too_large_becomes_the_largest_number() -> None:
    pages = torch.zeros(2, 1, 8, 16, dtype=FP8), torch.zeros(2, 1, 8, 16, dtype=FP8)
    k = torch.tensor([1e6, -500.0, torch.nan, 448.0]).repeat(4)[None, None]
    table, zero = torch.tensor([[1]], dtype=torch.int32), torch.zeros(1, dtype=torch.long)
    write_kv(k, -k, Places(*pages, table, zero.int(), zero))
    wanted = torch.tensor([448.0, -448.0, torch.nan, 448.0]).repeat(4)
    for page, sign in zip(pages, (1, -1), strict=True):
        assert torch.equal((sign * page[1, 0, 0].float()).nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_rounding_by_hand_is_torchs() -> None:
    torch.manual_seed(5)
    values = torch.cat([torch.randn(10000) * scale for scale in (1e-3, 1.0, 60.0)])
    assert torch.equal(by_hand(values).float(), values.to(FP8).float())
