"""Is a recording right? Its first replay against the step itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hybridgen.graphs import Recording

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
_ALLOWED_TO_DIFFER = 1
"""First replays with another token than the step, where other code rounds elsewhere."""
DIFFERENT = "its first replay gave other values than the step without it"


def distrust(
    recording: Recording, run: Callable[[], object], mutable: Sequence[torch.Tensor], dtype: torch.dtype
) -> str | None:
    """Run a step whose recording was never replayed for anybody, and compare.

    Where other code rounds elsewhere, another token can come out without a fault, if two are that close: one such step
    says nothing, and the next is compared again.

    Args:
        run, mutable: see `compare_first_replay`.
        dtype: of the model.

    Returns:
        Why the recording is not to be used; None: it is.
    """
    exact = recording.recorded.exact
    tolerance = 0.0 if exact else tolerance_of(dtype)
    # Runs the step, whatever comes out.
    wrong = compare_first_replay(recording.recorded.replay, run, mutable, tolerance=tolerance)
    recording.differed += wrong is not None
    recording.checked = wrong is None or exact
    return wrong if exact or recording.differed > _ALLOWED_TO_DIFFER else None


def compare_first_replay(
    replay: Callable[[], object], run: Callable[[], object], mutable: Sequence[torch.Tensor], *, tolerance: float = 0.0
) -> str | None:
    """Replay the staged step, put the state back, run it without the recording, and compare.

    The recording goes first: a key or value that it fails to write is then missing in its own attention. Both write the
    same places, so the cache is right after the second, whose outcome stays.

    Args:
        mutable: all that the step changes, but the cache.
        tolerance: norm of the difference over the norm, of numbers that are not integers; 0 for equal bits.

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
        differ = [_differ(ours, theirs, tolerance) for ours, theirs in zip(replayed, mutable, strict=True)]
    except BaseException:
        _restore(mutable, before)
        raise
    return DIFFERENT if any(differ) else None


def tolerance_of(dtype: torch.dtype) -> float:
    """Largest norm of the difference of logits over their norm, for code that computes the same and rounds elsewhere:
    in half precision each of the two is about a hundredth from float32."""
    return _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])


def _restore(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _differ(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    if not tolerance or not ours.is_floating_point():
        return not torch.equal(ours, theirs)
    return bool((ours - theirs).float().norm() > tolerance * theirs.float().norm())
