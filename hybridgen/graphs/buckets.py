"""Which sizes are recorded: buckets that other sizes are padded to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

USUAL_PROMPT = 512
"""Prefill buckets are close together up to here. Above it there are few, whose recordings end at the logits and are for
many prompts: such calls have several, and what is launched behind them costs nothing beside them."""
_LARGE = (1024, 2048, 4096)


def decode_buckets(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then in steps of 8 to 64 and of 16 above; ends with `max_batch`."""
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, max_batch + 16, 16))
    return (*(size for size in sizes if size < max_batch), max_batch)


def prefill_buckets(most: int, worth: int = 0) -> tuple[int, ...]:
    """In steps of 16 to 256 and of 32 to 512; then 1024, 2048, 4096 and `most` itself.

    Args:
        most: tokens that a call can have.
        worth: above 512, the largest for which a recording is worth while.
    """
    small = (*range(16, 256, 16), *range(256, USUAL_PROMPT + 1, 32))
    large = sorted({size for size in (*_LARGE, most) if USUAL_PROMPT < size <= worth})
    return tuple(size for size in (*small, *large) if size <= most)


def checked_buckets(sizes: Iterable[int], most: int) -> tuple[int, ...]:
    """A user's sizes in order, without those above `most`."""
    return tuple(sorted({size for size in sizes if size <= most}))


def round_up(size: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest bucket that holds `size`; None when it is above all of them."""
    index = bisect_left(buckets, size)
    return buckets[index] if index < len(buckets) else None
