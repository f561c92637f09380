"""What schedules an engine's requests: its pages, and who gets them."""

from __future__ import annotations

from collections.abc import Sequence

from hybridgen.cache import LayerState, PageManager, pages_in_turn
from hybridgen.config import EngineConfig, ResolvedConfig
from hybridgen.engine.scheduler import Scheduler
from hybridgen.execution import ModelRunner
from hybridgen.models import BoundModel


def why_not_shared(
    config: EngineConfig, resolved: ResolvedConfig, bound: BoundModel, states: Sequence[LayerState]
) -> str | None:
    """Why requests share no pages; None where they do.

    Args:
        states: what the model's layers keep between steps.
    """
    if not config.prefix_cache:
        return "off: prefix_cache=False"
    fixed, longest = bound.fixed_keys_context, resolved.max_context
    if fixed is not None and fixed < longest:
        return (
            f"off: keys of this model depend on a request's length above {fixed} tokens; max_context={fixed} or less "
            "turns it on"
        )
    if any(state.bytes_per_slot or not state.rerunnable for state in states):
        return "off: layers of this model keep a state that is not in pages"
    return None


def make_pages(
    config: EngineConfig, resolved: ResolvedConfig, count: int, reaches: Sequence[int | None], *, shares: bool
) -> PageManager:
    """Who has which of the pool's pages.

    Args:
        count: pages of the pool.
        reaches: how many positions a query sees at most, of each model that has pages; None: all of them.
        shares: whether requests share pages.
    """
    ends = [reach for reach in reaches if reach is not None]
    ring_pages = None
    if len(ends) == len(reaches):
        tokens = max(resolved.token_budget, resolved.query_len)
        ring_pages = pages_in_turn(max(ends), tokens, config.page_size)
    return PageManager(count, config.page_size, shares=shares, ring_pages=ring_pages)


def make_scheduler(
    config: EngineConfig, resolved: ResolvedConfig, bound: BoundModel, runner: ModelRunner, pages: PageManager
) -> Scheduler:
    """The scheduler; nothing is fed beside decode yet."""
    return Scheduler(
        pages=pages,
        max_batch=config.max_batch,
        token_budget=resolved.token_budget,
        score_budget=runner.score_budget,
        shortest_run=bound.shortest_run,
        whole_prompts=not bound.continues_runs,
        reprefill_length=bound.reprefill_length,
        longest_first=config.longest_first,
    )
