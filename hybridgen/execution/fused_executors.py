"""The fused executors of a runner: made, tuned, compared with the layers, and looked after when one fails."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hybridgen.device.failures import LostRanks
from hybridgen.device.program import Keeper
from hybridgen.execution.runner import ModelRunner
from hybridgen.execution.stream import on_its_stream
from hybridgen.fused.decode import FusedDecode
from hybridgen.graphs import LAYERS, GraphKey, Recorder
from hybridgen.models.binding import key_value_pages
from hybridgen.models.share import Share

logger = logging.getLogger(__name__)


@on_its_stream
def make_fused(
    runner: ModelRunner,
    max_context: int,
    *,
    equal_bits: bool = False,
    tuned: Mapping[str, Any] | None = None,
    kept: Keeper | None = None,
    share: Share | None = None,
) -> FusedDecode:
    """From now on decode small batches with fused executors, where the model and the device allow it.

    Args:
        equal_bits: decode with the kernel for several columns alone.
        tuned: what `tune_fused()` returned for this model and device.
        kept: gives machine code kept under a key, or makes and keeps it.
        share: the other ranks, which do the same, where the model is a rank's share.
    """
    # Imported here: Triton and NVRTC are not there everywhere.
    from hybridgen.fused.build import build_fused

    fused = build_fused(
        runner.bound,
        key_value_pages(runner.states),
        runner.steps.inputs(),
        max_context=max_context,
        max_rows=runner.state.max_batch,
        query_len=runner.state.query_len,
        reads=() if runner.drafting is None else runner.drafting.layers,
        equal_bits=equal_bits,
        tuned=tuned,
        kept=kept,
        share=share,
        scaled_cache=any(getattr(state, "scales", None) is not None for state in runner.states),
    )
    if share is not None:
        share.on_end(fused.give_up)
    runner.use_fused(fused)
    return fused


@on_its_stream
def tune_fused(runner: ModelRunner, seconds: float) -> dict[str, Any]:
    """Tune the fused kernels for about so long; returns the choices as plain values. Not while requests run."""
    from hybridgen.fused import tuning

    if runner.fused is None:
        return {}
    try:
        return tuning.tune(runner.fused, seconds)
    finally:
        runner.use_fused(runner.fused)
        runner.recover()


@on_its_stream
def compare_rows(runner: ModelRunner, sizes: Sequence[int], recorder: Recorder | None = None) -> str:
    """Use the persistent kernel for several rows at the sizes where it is faster than what would serve else.

    That is the chain, or the model's own layers. Both are recorded and timed at these sizes, with padding; beyond the
    columns of a launch the kernel runs several times. Not while requests run.

    Args:
        recorder: who records; closed in the end. By default CUDA graphs of this process alone.

    Returns:
        Where it is not used and why; empty where it is used at all of them.
    """
    fused = runner.fused
    rows = None if fused is None else fused.rows
    if fused is None or rows is None:
        return ""
    recorder = recorder or _cuda_graphs(runner)
    slower, faster = {}, []
    try:
        for size in sorted(size for size in sizes if rows.least <= size <= rows.widest):
            other = LAYERS
            if fused.chain is not None and fused.chain.refuses(GraphKey.decode(size, None)) is None:
                other = fused.chain.name
            ours, theirs = (_recorded_seconds(runner, recorder, size, by) for by in (rows.name, other))
            logger.info("decode of %d rows: %s %.1f us, %s %.1f us", size, rows.name, ours * 1e6, other, theirs * 1e6)
            if ours < theirs:
                faster.append(size)
            else:
                slower[size] = f"{size} rows take it {ours * 1e3:.2f} ms, and the {other} {theirs * 1e3:.2f} ms"
        # One run of sizes: from behind the largest at which it is slower, or up to that one.
        one_launch = [size for size in slower if size <= rows.columns]
        above = [size for size in faster if max(one_launch, default=0) < size <= rows.columns]
        below = [size for size in faster if size < min(one_launch, default=rows.columns + 1)]
        least = max(one_launch) + 1 if one_launch and above else rows.least
        most = rows.columns if above or not one_launch else max(below, default=rows.least - 1)
        if most == rows.columns:  # then in several launches, up to where these are slower
            most = max([most, *(size for size in faster if size < min(set(slower) - set(one_launch), default=99))])
        why = "; ".join(slower.values())
        if (least, most) != (rows.least, rows.most) or why:
            fused.use_rows(least, most, why)
        return why
    finally:
        recorder.close()
        runner.recover()


@on_its_stream
def compare_with_layers(runner: ModelRunner, sizes: Sequence[int], recorder: Recorder | None = None) -> str:
    """Use the chain of fused kernels up to the size where the model's own layers are faster.

    Both are recorded and timed at these sizes, with padding, but for those that the kernel for several rows serves. Not
    while requests run.

    Args:
        recorder: who records; closed in the end. By default CUDA graphs of this process alone.

    Returns:
        Why it is not used beyond that; empty where it is used at all of them.
    """
    chain = None if runner.fused is None else runner.fused.chain
    if runner.fused is None or chain is None:
        return ""
    recorder = recorder or _cuda_graphs(runner)
    used = chain.least - 1
    try:
        for rows in sorted(size for size in sizes if chain.least <= size <= chain.most):
            if runner.fused.rows is not None and runner.fused.rows.refuses(GraphKey.decode(rows, None)) is None:
                continue
            ours, theirs = (_recorded_seconds(runner, recorder, rows, by) for by in (chain.name, LAYERS))
            logger.info("decode of %d rows: chain %.1f us, layers %.1f us", rows, ours * 1e6, theirs * 1e6)
            if ours >= theirs:
                why = f"{rows} rows take it {ours * 1e3:.2f} ms, and the layers {theirs * 1e3:.2f} ms"
                runner.fused.use_chain_up_to(used, why)
                return why
            used = rows
    finally:
        recorder.close()
        runner.recover()
    return ""


def _cuda_graphs(runner: ModelRunner) -> Recorder:
    from hybridgen.graphs.cuda import CudaGraphRecorder

    return CudaGraphRecorder(runner.device)


def _recorded_seconds(runner: ModelRunner, recorder: Recorder, rows: int, executor: str) -> float:
    """What a replay of a decode step takes by this executor."""
    key = GraphKey.decode(rows, None, executor=executor)
    runner.prepare(key)
    recorded = recorder.record(key, functools.partial(runner.run, key), None)
    recorded.release()
    return recorded.seconds


@on_its_stream
def inspect_fused(runner: ModelRunner) -> str | None:
    """Look for the cause of logits without numbers; mend it and say what it was, if it was a fused step's.

    Raises:
        LostRanks: it was one of several ranks.
    """
    if runner.fused is None or not runner.fused.stopped():
        return None
    why = "a fused decode step waited in vain and was given up"
    if runner.fused.share is not None:
        raise LostRanks(why)  # the ranks' kernels do not count alike any more
    return why
