"""A runner on a tiny model, with a cache of a few pages, and no engine around it."""

from __future__ import annotations

import families
import torch

from hybridgen.cache import CacheShape, allocate_pages
from hybridgen.execution import ModelRunner
from hybridgen.models import bind


def make_runner(
    name: str = "llama",
    *,
    max_batch: int = 4,
    token_budget: int = 64,
    pages: int = 9,
    query_len: int = 1,
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
        query_len=query_len,
        compile_backend=compile_backend,
    )
    runner.attach(allocate_pages(CacheShape(bound.layer_shapes, 16, torch.float32), pages, torch.device("cpu")))
    return runner


def free_runner(runner: ModelRunner) -> None:
    """Undo what a runner changed."""
    runner.close()
    runner.bound.release()
