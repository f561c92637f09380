"""Steps recorded by Inductor's cudagraph trees.

The whole step is compiled with `mode="reduce-overhead"`: once for one row and once for any number of them, by phase and
sampler; a tree then records each size. A tree replays only what it knows not to have moved, so everything that
outlives a step is marked as static; then a step may also write to it (`torch/_inductor/cudagraph_trees.py`,
`check_for_mutation`).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial

import torch

# Here, at the top: up to torch 2.11 trees work only on the thread that imported them (pytorch issue 123177).
import torch._inductor.cudagraph_trees
from torch import Tensor
from torch._dynamo.utils import counters

from hybridgen.compilation.layers import cached_for
from hybridgen.device.capture import CAPTURING
from hybridgen.graphs.key import LAYERS, GraphKey
from hybridgen.graphs.recorder import Recorded, checked_seconds, this_thread
from hybridgen.graphs.steps import TreeSteps
from hybridgen.models.attention import Phase
from hybridgen.sampling import SamplerPlan

OWNER = "cudagraph tree"
_RECOMPILE_LIMIT = 64
"""Kinds of steps: phases, one or many rows, samplers."""
_RUNS = 3
"""A tree warms up, records, and replays."""


def run_step(steps: TreeSteps, phase: Phase, plan: SamplerPlan | None, tokens: Tensor, rows: Tensor) -> None:
    """The compile unit. `tokens` and `rows` stand for their lengths: a tensor's can be marked as dynamic."""
    steps.run(GraphKey(LAYERS, phase, rows.shape[0], tokens.shape[0], 1, plan))


class TreeRecorder:
    """Compiles steps whole, and leaves recording and replaying to Inductor."""

    owner = OWNER

    def __init__(self, steps: TreeSteps, *, max_batch: int, token_budget: int, backend: str | None = None) -> None:
        """Compile nothing yet. A `backend` other than Inductor compiles without trees, for tests."""
        self._steps = steps
        self._most = {"tokens": token_budget, "rows": max_batch}
        # A code object of its own: compiled entries hang on the code, and engines would share their limit.
        own = types.FunctionType(run_step.__code__.replace(co_name="tree_step"), run_step.__globals__, "tree_step")
        self._compiled = (
            torch.compile(own, fullgraph=True, dynamic=False, mode="reduce-overhead")
            if backend is None
            else torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
        )
        self._known: set[tuple[Phase, bool, bool, SamplerPlan | None]] = set()

    def knows(self, key: GraphKey) -> bool:
        """Whether a step of this kind is compiled, so that recording one more size takes no compilation."""
        return _kind(key) in self._known

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        """Compile the step where that has not been done, and run it until its tree replays it.

        Raises:
            RuntimeError: the tree refused to record it.
        """
        limits = torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT)
        with CAPTURING, limits, cached_for(*self._most.values()):
            return self._record(key, step, known)

    def _record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        for tensor in self._steps.tensors().values():
            torch._dynamo.mark_static_address(tensor)
        step()
        plain = checked_seconds(step, torch.cuda.synchronize, None if known is None else known[0])
        free = torch.cuda.mem_get_info()[0]
        skips = counters["inductor"]["cudagraph_skips"]
        replay = self.replay_of(key)
        for _ in range(_RUNS):
            replay()
        torch.cuda.synchronize()
        if counters["inductor"]["cudagraph_skips"] > skips:
            raise RuntimeError("Inductor skipped the cudagraph; TORCH_LOGS=cudagraphs says why")
        used = max(0, free - torch.cuda.mem_get_info()[0])
        return Recorded(
            replay=replay,
            release=_nothing,
            owner=OWNER,
            plain_seconds=plain,
            seconds=checked_seconds(replay, torch.cuda.synchronize, None if known is None else known[1]),
            bytes=used,
            thread=this_thread(),
        )

    def replay_of(self, key: GraphKey) -> Callable[[], None]:
        """The compiled step of this size, to call."""
        tokens, rows = self._steps.sized(key)
        same = key.phase is Phase.DECODE
        if key.tokens > 1:
            torch._dynamo.mark_dynamic(tokens, 0, min=2, max=self._most["rows" if same else "tokens"])
        if same:
            rows = tokens
        elif key.rows > 1:
            torch._dynamo.mark_dynamic(rows, 0, min=2, max=self._most["rows"])
        self._known.add(_kind(key))
        return partial(self._replay, key.phase, key.sampler, tokens, rows)

    def close(self) -> None:
        return None

    def _replay(self, phase: Phase, plan: SamplerPlan | None, tokens: Tensor, rows: Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self._compiled(self._steps, phase, plan, tokens, rows)


def _kind(key: GraphKey) -> tuple[Phase, bool, bool, SamplerPlan | None]:
    return key.phase, key.tokens > 1, key.rows > 1, key.sampler


def _nothing() -> None:
    return None
