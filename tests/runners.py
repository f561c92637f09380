"""A runner on a tiny model, with a cache of a few pages, and no engine around it."""

from __future__ import annotations

from typing import Any

import families
import torch
from torch import Tensor

from hybridgen.cache import allocate
from hybridgen.execution import ModelRunner
from hybridgen.execution.plan import PrefillChunk
from hybridgen.graphs.key import GraphKey
from hybridgen.models import BoundModel, bind
from hybridgen.models.twin import Twin


def make_runner(
    name: str = "llama",
    *,
    max_batch: int = 4,
    token_budget: int = 64,
    pages: int = 9,
    query_len: int = 1,
    compile_backend: str | None = None,
    live: Any = None,
    **changes: Any,
) -> ModelRunner:
    """On the CPU; `changes` are fields of the model's config. `free_runner()` gives the model back.

    Args:
        live: a live module, on whose twin the runner works; else it builds one of family `name`.
    """
    twin = None if live is None else Twin(live)
    bound = bind(families.build(name, **changes) if twin is None else twin.model)
    runner = ModelRunner(
        bound,
        vocab_size=families.VOCAB,
        max_batch=max_batch,
        max_pages=4,
        token_budget=token_budget,
        query_len=query_len,
        compile_backend=compile_backend,
        twin=twin,
    )
    attach_cache(runner, bound, pages)
    if twin is not None:
        twin.settle()
    return runner


def attach_cache(runner: ModelRunner, bound: BoundModel, pages: int) -> None:
    """A cache of so many float32 pages of 16 positions."""
    states = bound.layer_states(16, torch.float32)
    allocate(states, pages, runner.state.max_batch + 1, torch.device("cpu"))
    runner.attach(states)


def free_runner(runner: ModelRunner) -> None:
    """Undo what a runner changed."""
    runner.close()
    runner.bound.release()


def prefill_logits(runner: ModelRunner, sizes: tuple[int, ...] = (20, 9)) -> Tensor:
    """Logits of a prefill call of prompts of so many tokens."""
    runner.steps.keep_logits()
    chunks = []
    for slot, count in enumerate(sizes):
        runner.state.block_table.assign_all([slot], [[1 + 2 * slot, 2 + 2 * slot]])
        ids = [(17 * i + 3 * slot) % families.VOCAB for i in range(count)]
        chunks.append(PrefillChunk(slot, ids, 0, count, 0, True))
    key = GraphKey.prefill(sum(sizes), len(sizes), None)
    runner.steps.stage_prefill(chunks, key.tokens, key.rows)
    with torch.inference_mode():
        runner.steps.run(key)
    assert runner.steps.logits is not None
    return runner.steps.logits[: key.rows].clone()
