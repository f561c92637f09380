"""Is a recording right? Its first replay against the step itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def compare_first_replay(
    replay: Callable[[], object], run: Callable[[], object], mutable: Sequence[torch.Tensor]
) -> str | None:
    """Replay the staged step, put the state back, run it without the recording, and compare bit for bit.

    The recording goes first: a key or value that it fails to write is then missing in its own attention. Both write the
    same places, so the cache is right after the second, whose outcome stays.

    Args:
        mutable: all that the step changes, but the cache.

    Returns:
        What differed; None if nothing did.
    """
    before = [tensor.clone() for tensor in mutable]
    try:
        replay()
        replayed = [tensor.clone() for tensor in mutable]
    finally:
        _restore(mutable, before)
    try:
        run()
        differ = [_differ(ours, theirs) for ours, theirs in zip(replayed, mutable, strict=True)]
    except BaseException:
        _restore(mutable, before)
        raise
    return "its first replay gave other values than the step without it" if any(differ) else None


def _restore(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _differ(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return not torch.equal(ours.nan_to_num(), theirs.nan_to_num())
