"""Is a recording right? Its first replay against the step itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hybridgen.graphs.store import Recording

if TYPE_CHECKING:
    from hybridgen.execution.runner import ModelRunner


def validate(runner: ModelRunner, recording: Recording) -> str | None:
    """Replay the staged step, put the state back, run it without the recording, and compare bit for bit.

    The recording goes first, so that a K or V that it does not write is missing in its own attention. Both write the
    same places, so the cache is right after the second, whose outcome stands.

    Returns:
        What differed; None if nothing did.
    """
    mutable = [runner.state.table, *runner.ring.tensors().values(), *_optional(runner)]
    before = [tensor.clone() for tensor in mutable]
    try:
        recording.recorded.replay()
        replayed = [tensor.clone() for tensor in mutable]
    finally:
        _restore(mutable, before)
    try:
        runner.steps.run(recording.key)
        differ = [_differ(ours, theirs) for ours, theirs in zip(replayed, mutable, strict=True)]
    except BaseException:
        _restore(mutable, before)
        raise
    return "its first replay gave other values than the step without it" if any(differ) else None


def _restore(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _optional(runner: ModelRunner) -> list[torch.Tensor]:
    counts = runner.sampler.output_counts
    return [tensor for tensor in (runner.steps.logits, counts) if tensor is not None]


def _differ(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return not torch.equal(ours.nan_to_num(), theirs.nan_to_num())
