"""Fused decode of a runner: made, tuned, compared with the model's own layers, and looked after when a step fails."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybridgen.execution.runner import ModelRunner, on_its_stream
from hybridgen.graphs import Recorder
from hybridgen.graphs.key import GraphKey
from hybridgen.models import BoundModel

if TYPE_CHECKING:
    from hybridgen.fused.decode import FusedDecode

logger = logging.getLogger(__name__)


@on_its_stream
def fuse(
    runner: ModelRunner,
    bound: BoundModel,
    max_context: int,
    *,
    tuned: Mapping[str, Any] | None = None,
    kept: Callable[[str, Callable[[], bytes]], bytes] | None = None,
) -> FusedDecode:
    """From now on decode small batches with fused kernels, where the model and the device allow it.

    Args:
        bound: the runner's model.
        tuned: what `tune()` returned for this model and device.
        kept: gives machine code kept under a key, or makes and keeps it.
    """
    # Imported here: Triton and NVRTC are not there everywhere.
    from hybridgen.fused.decode import fuse_decode

    fused = runner.steps.fused = fuse_decode(
        bound,
        tuple(state.pages for state in runner.states),
        runner.steps.inputs(),
        max_context=max_context,
        max_rows=runner.state.max_batch,
        tuned=tuned,
        kept=kept,
    )
    return fused


@on_its_stream
def tune(runner: ModelRunner, seconds: float) -> dict[str, Any]:
    """Tune the fused kernels for about so long; returns the choices as plain values. Not while requests run."""
    from hybridgen.fused import tuning

    if runner.steps.fused is None:
        return {}
    try:
        return tuning.tune(runner.steps.fused, seconds)
    finally:
        runner.recover()


@on_its_stream
def compare(runner: ModelRunner, sizes: Sequence[int]) -> str:
    """Use the chain of fused kernels up to the size where the model's own layers are faster.

    Both are recorded and timed at these sizes, with padding. Not while requests run.

    Returns:
        Why it is not used beyond that; empty where it is used at all of them.
    """
    fused = runner.steps.fused
    if fused is None or fused.chain is None:
        return ""
    from hybridgen.graphs.cuda import CudaGraphRecorder

    recorder = CudaGraphRecorder(runner.device)
    used = fused.least_chain_rows - 1
    try:
        for rows in sorted(size for size in sizes if fused.least_chain_rows <= size <= fused.chain_rows):
            key = GraphKey.decode(rows, None)
            chain, layers = (_recorded_seconds(runner, recorder, key, by) for by in (fused, None))
            logger.info("decode of %d rows: chain %.1f us, layers %.1f us", rows, chain * 1e6, layers * 1e6)
            if chain >= layers:
                why = f"{rows} rows take it {chain * 1e3:.2f} ms, and the layers {layers * 1e3:.2f} ms"
                fused.use_chain_up_to(used, why)
                return why
            used = rows
    finally:
        recorder.close()
        runner.recover()
    return ""


def _recorded_seconds(runner: ModelRunner, recorder: Recorder, key: GraphKey, fused: FusedDecode | None) -> float:
    """What a replay of a step takes with these fused kernels, or without any."""
    with runner.steps.fused_by(fused):
        runner.prepare(key)
        recorded = recorder.record(key, functools.partial(runner.steps.run, key))
        recorded.release()
        return recorded.seconds


@on_its_stream
def inspect(runner: ModelRunner) -> str | None:
    """Look for the cause of logits without numbers; mend it and say what it was, if it was a fused step's."""
    fused = runner.steps.fused
    if fused is None or not fused.stopped():
        return None
    return "a fused decode step waited in vain and was given up"
