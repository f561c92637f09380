"""A runner on a tiny model, with a cache of a few pages, and no engine around it."""

from __future__ import annotations

import families
import torch

from hybridgen.cache import allocate
from hybridgen.execution import ModelRunner
from hybridgen.models import BoundModel, bind


def make_runner(
    name: str = "llama",
    *,
    max_batch: int = 4,
    token_budget: int = 64,
    pages: int = 9,
    compile_backend: str | None = None,
    **changes: int,
) -> ModelRunner:
    """On the CPU; `changes` are fields of the model's config. `free_runner()` gives the model back."""
    bound = bind(families.build(name, **changes))
    runner = ModelRunner(
        bound,
        vocab_size=families.VOCAB,
        max_batch=max_batch,
        max_pages=4,
        token_budget=token_budget,
        compile_backend=compile_backend,
    )
    attach_cache(runner, bound, pages)
    return runner


def attach_cache(runner: ModelRunner, bound: BoundModel, pages: int) -> None:
    """A cache of so many float32 pages of 16 positions."""
    states = bound.layer_states(16, torch.float32)
    allocate(states, pages, runner.state.max_batch + 1, torch.device("cpu"))
    runner.attach(states)


def free_runner(runner: ModelRunner) -> None:
    """Undo what a runner changed."""
    runner.close()
    runner._bound.release()
