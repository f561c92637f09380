"""What an engine has done and holds, gathered from its parts."""

from __future__ import annotations

from hybridgen.cache import total_bytes
from hybridgen.engine.assembly import Parts
from hybridgen.graphs.report import graph_stats
from hybridgen.kernels.step import metadata
from hybridgen.telemetry.statistics import EngineStats, PrefixStats, SpeculationStats


def engine_stats(parts: Parts) -> EngineStats:
    """The statistics of an open engine."""
    checkpoint, counters, built = parts.checkpoint, parts.counters, parts.built
    runner, scheduler = built.runner, built.loop.scheduler
    compiled, pages = runner.compiled, scheduler.pages
    return EngineStats(
        model=checkpoint.name,
        mode=str(parts.resolved.mode),
        device=str(checkpoint.device),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        startup=parts.startup.seconds(counters.first_token),
        artifacts=parts.starter.stats(runner),
        requests=dict(counters.requests),
        tokens=dict(counters.tokens),
        steps=dict(counters.steps),
        fallbacks=_fallbacks(parts),
        compiled=compiled.compiles if compiled else 0,
        late_compiles=compiled.late_compiles if compiled else 0,
        graphs=graph_stats(runner.graphs),
        decode=built.meter.stats(),
        fused=_fused(parts),
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        pages=pages.capacity,
        free_pages=pages.free,
        page_size=parts.config.page_size,
        cache_bytes=built.cache_bytes,
        kv_dtype=_kv_dtype(parts),
        weights=parts.formats,
        prefix=PrefixStats(
            state=built.prefix_state,
            pages=pages.kept,
            prompt_tokens=pages.asked,
            cached_tokens=pages.found,
            evicted=pages.evicted,
        ),
        speculation=_speculation(parts),
    )


def _fused(parts: Parts) -> dict[str, str]:
    starter = parts.starter
    drafting = {} if starter.drafting is None else {"passes of the drafting head": starter.drafting}
    return starter.fused | starter.chosen | drafting


def _kv_dtype(parts: Parts) -> str:
    """The dtype of cached keys and values, and what their scales are."""
    own = str(parts.checkpoint.dtype).removeprefix("torch.")
    if parts.config.kv_dtype is None:
        return own
    scaled = len(parts.kv_scales)
    return f"fp8, {f'scales of {scaled} layers from the checkpoint' if scaled else 'scales of 1'}"


def _speculation(parts: Parts) -> SpeculationStats:
    drafting = parts.built.runner.drafting
    if drafting is None:
        return SpeculationStats()
    counted = parts.counters.drafts
    return SpeculationStats(
        drafter=drafting.name if drafting.failure is None else f"off: {drafting.failure}",
        steps=counted["rows"],
        tokens=counted["tokens"],
        drafted=counted["checked"],
        accepted=counted["accepted"],
        weight_bytes=0 if parts.drafter is None else parts.drafter.weight_bytes,
        cache_bytes=total_bytes(drafting.states, parts.built.num_pages, parts.resolved.slots + 1),
    )


def _fallbacks(parts: Parts) -> dict[str, int]:
    counted = parts.counters.fallbacks.copy()
    if metadata.fallbacks():
        counted["copy_metadata: Triton failed, torch copied (in this process)"] = metadata.fallbacks()
    return dict(counted)
