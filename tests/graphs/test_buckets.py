"""Buckets."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hybridgen.graphs import decode_buckets, prefill_buckets

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


def test_every_batch_has_a_bucket() -> None:
    for max_batch in range(1, 300):
        ladder = decode_buckets(max_batch)
        assert list(ladder) == sorted(set(ladder))
        assert ladder[-1] == max_batch
        for below, bucket in pairwise((0, *ladder)):
            smallest = below + 1
            assert bucket - smallest < max(smallest, 16), max_batch


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
