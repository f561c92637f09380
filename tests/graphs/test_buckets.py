"""Buckets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridgen.graphs import checked_buckets, decode_buckets, prefill_buckets
from hybridgen.graphs.buckets import round_up

SMALL = (*range(16, 257, 16), *range(288, 513, 32))


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 9)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
        (64, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)),
        (100, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100)),
    ],
)
def test_decode_sizes(max_batch: int, sizes: tuple[int, ...]) -> None:
    assert decode_buckets(max_batch) == sizes


@pytest.mark.parametrize("max_batch", range(1, 300))
def test_every_batch_has_a_bucket(max_batch: int) -> None:
    ladder = decode_buckets(max_batch)
    assert list(ladder) == sorted(set(ladder))
    assert ladder[-1] == max_batch
    for size in range(1, max_batch + 1):
        bucket = round_up(size, ladder)
        assert bucket is not None
        assert bucket - size < max(size, 16)


@pytest.mark.parametrize(
    ("most", "worth", "sizes"),
    [
        (1, 0, ()),
        (15, 0, ()),
        (16, 0, (16,)),
        (100, 8192, (16, 32, 48, 64, 80, 96)),
        (8192, 0, SMALL),
        (8192, 512, SMALL),
        (8192, 2500, (*SMALL, 1024, 2048)),
        (8192, 8192, (*SMALL, 1024, 2048, 4096, 8192)),
        (3000, 8192, (*SMALL, 1024, 2048, 3000)),
        (2048, 8192, (*SMALL, 1024, 2048)),
        (600, 8192, (*SMALL, 600)),
    ],
)
def test_prefill_sizes(most: int, worth: int, sizes: tuple[int, ...]) -> None:
    assert prefill_buckets(most, worth) == sizes


def test_a_users_sizes() -> None:
    assert checked_buckets([8, 1, 8, 3], 8) == (1, 3, 8)
    assert checked_buckets([8, 1, 9], 8) == (1, 8)
    assert checked_buckets([], 8) == ()


@given(st.sets(st.integers(1, 50)), st.integers(1, 60))
def test_rounding_up(sizes: set[int], size: int) -> None:
    assert round_up(size, tuple(sorted(sizes))) == min((s for s in sizes if s >= size), default=None)
