"""Is loaded code right? A few tokens through it, and through the same layers uncompiled."""

from __future__ import annotations

import torch

from hybridgen.compilation.layers import CompiledLayers
from hybridgen.execution.plan import PrefillChunk
from hybridgen.execution.runner import ModelRunner
from hybridgen.execution.validation import tolerance_of
from hybridgen.graphs.key import GraphKey

_PROMPT = 7
_ROWS = 3
_ENDS = 64
"""Prompts whose ends are attended to by a schedule (`kernels.attention.ops.is_balanced`)."""


def compare(runner: ModelRunner, compiled: CompiledLayers) -> str | None:
    """Run a short prompt and decode steps of one and of a few rows, compiled and not.

    Runs on the dummy page and on slots that nobody has yet; leaves state and counters as they were.

    Returns:
        What differed too much; None if nothing did.
    """
    runner.steps.keep_logits()
    ours = _logits(runner)
    with compiled.bypassed():
        theirs = _logits(runner)
    for name, left, right in zip(("a prompt", "decoding one row", "decoding rows"), ours, theirs, strict=False):
        if not bool(torch.isfinite(right).all()):
            continue  # a model whose logits are not finite says nothing about code
        tolerance = tolerance_of(runner.bound.model.dtype)
        error = float((left - right).norm() / right.norm().clamp_min(1e-12))
        if not error <= tolerance:
            return (
                f"{name} gave logits that differ by {error:.2g} of their norm from uncompiled layers, above {tolerance}"
            )
    return None


def compare_cut(runner: ModelRunner) -> str | None:
    """Run prompts whose last layer is cut (`LayersExecutor.cuts`), and the same whole: 1, 2 and more at once.

    Returns:
        What differed too much; None if nothing did.
    """
    runner.steps.keep_logits()
    most = min(_ENDS, runner.max_batch, runner.token_budget // _PROMPT)
    tolerance = tolerance_of(runner.bound.model.dtype)
    try:
        for count in dict.fromkeys((1, min(2, most), most)):
            key, ids = GraphKey.prefill(count * _PROMPT, count, None), _prompt(runner)
            # The same prompt in each slot, because they share the dummy page.
            runner.steps.stage_prefill(
                [PrefillChunk(slot, ids, 0, _PROMPT, 0, True) for slot in range(count)], key.tokens, key.rows
            )
            cut = _run(runner, key)
            runner.steps.run_told(key, None)
            whole = _left(runner, key)
            if not bool(torch.isfinite(whole).all()):
                return "the logits are not finite, so that nothing can be compared"
            error = float((cut - whole).norm() / whole.norm().clamp_min(1e-12))
            if not error <= tolerance:
                return f"{count} prompts gave logits that differ by {error:.2g} of their norm, above {tolerance}"
    finally:
        runner.ring.resynchronize()
    return None


def _prompt(runner: ModelRunner) -> list[int]:
    return [(17 * i + 3) % runner.sampler.vocab_size for i in range(_PROMPT)]


def _logits(runner: ModelRunner) -> list[torch.Tensor]:
    """Logits of a prompt of a few tokens, and of the steps that decode its last token again."""
    steps, state = runner.steps, runner.state
    ids = _prompt(runner)
    found = []
    try:
        key = GraphKey.prefill(_PROMPT, 1, None)
        steps.stage_prefill([PrefillChunk(0, ids, 0, _PROMPT, 0, True)], key.tokens, key.rows)
        found.append(_run(runner, key))
        for rows in dict.fromkeys((1, min(_ROWS, state.max_batch))):
            slots = tuple(range(rows))
            # The same token at the same position in each, because they share the dummy page.
            state.table[:, :rows] = torch.tensor([[ids[-1]], [_PROMPT - 1], [1]], device=state.device)
            steps.stage_decode(slots)
            found.append(_run(runner, GraphKey.decode(rows, None)))
    finally:
        state.table.zero_()
        runner.ring.resynchronize()
    return found


def _run(runner: ModelRunner, key: GraphKey) -> torch.Tensor:
    runner.steps.run(key)
    return _left(runner, key)


def _left(runner: ModelRunner, key: GraphKey) -> torch.Tensor:
    """The logits that a step left."""
    if runner.steps.logits is None:
        raise RuntimeError("the step has left no logits")
    return runner.steps.logits[: key.rows].to(torch.float32, copy=True)  # the next step leaves its own there
