"""Engines of two ranks that fuse decode steps, on CPUs, with the chain interpreted; run by test_fused_ranks.py."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import families

from hybridgen import Engine
from hybridgen.engine import builder
from hybridgen.engine.warm_start import Starter
from hybridgen.parallel import ranks
from hybridgen.telemetry.statistics import EngineStats

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "max_context": 64,
    "kv_memory": "8MiB",
    "max_batch": 2,
    "token_budget": 32,
    "decode_buckets": [1, 2],
    "prefill_buckets": [],
}
PROMPTS = [[5, 6, 7, 8], [3]]
COMMAND = f"import quick_interpreter\nquick_interpreter.install()\n{ranks.COMMAND}"


def outcome(path: Path, **fields: Any) -> tuple[list[list[int]], EngineStats]:
    """Tokens of a batch and of one row, and how they came about."""
    with Engine.load(path, **CONFIG, **fields) as engine:
        done = [*engine.generate(PROMPTS, max_new_tokens=3), engine.generate(PROMPTS[0], max_new_tokens=2)]
        if "tensor_parallel" in fields:
            runner: Any = engine._runner
            if not runner.ranks_agree():
                raise AssertionError("the ranks have other tokens")
        return [list(each.token_ids) for each in done], engine.stats()


def compare(family: str, first: str = "") -> EngineStats:
    """The tokens of two ranks that fuse what they can, with those of one process.

    Args:
        first: what rank 1 runs before anything else.
    """
    # Only CUDA has executors that are worth it; a chain that is interpreted would lose every comparison.
    builder.fuses_decode = lambda mode, device: mode == "hybrid"  # type: ignore[assignment]
    Starter.choose_decode = lambda *arguments, **keywords: None  # type: ignore[method-assign]
    ranks.COMMAND = f"{first}\n{COMMAND}"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = families.write(family, Path(folder), **families.depth(family))
        expected, _ = outcome(path, mode="eager")
        found, stats = outcome(path, mode="hybrid", tensor_parallel=2, compile_backend="eager", compile_cache=False)
    if found != expected:
        raise AssertionError(f"{found} is not {expected}")
    return stats


def check_chain(number: int) -> None:
    """All ranks decode with the chain, whatever the other kernels lack."""
    stats = compare("llama")
    kinds = {kind for phase, kind, _ in stats.steps if phase == "decode"}
    if kinds != {"chain, stand-in"}:
        raise AssertionError(f"decode ran by {kinds}: {stats.fused}")


def check_head_norms(number: int) -> None:
    """A model that norms its heads, and has its head's weight from the embedding."""
    stats = compare("qwen3")
    if "a chain" not in str(stats.fused):
        raise AssertionError(stats.fused)


def check_one_rank_cannot(number: int) -> None:
    """A rank whose chain cannot be built keeps all ranks from it, and its reason is told."""
    lines = [
        "from hybridgen.fused.chain import step",
        "def refuse(*a, **k): raise step.Unfit('a trial')",
        "step.Unfit = __import__('hybridgen.models.decoder', fromlist=['Unfit']).Unfit",
        "step.check = refuse",
    ]
    stats = compare("llama", "\n".join(lines))
    kinds = {kind for phase, kind, _ in stats.steps if phase == "decode"}
    told = "rank 1: a trial" in str(stats.fused) and "rank 1: a trial" in str(stats.fallbacks)
    if kinds != {"layers, stand-in"} or not told:
        raise AssertionError(f"{kinds}: {stats.fused}, {stats.fallbacks}")
