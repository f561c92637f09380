"""Steps of a CPU as one compiled function each: attention, cache write, norms, head and choice in it.

A step is recorded as its operators (`compilation.step_graph`). Where the compile cache has the compiled form, it is
loaded; else Inductor compiles it in another process while steps run as they are (`compilation.behind`). A replay is a
call of the compiled function: no Python of the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from hybridgen.compilation.behind import CompileJob
from hybridgen.compilation.step_graph import record_step
from hybridgen.compilation.steps import CompiledStep, CompiledSteps, Loader
from hybridgen.errors import CacheMissError
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import NotReadyError, Recorded, checked_seconds

OWNER = "compiled step"


class CompiledStepRecorder:
    """Loads steps that are kept, and compiles others, one at a time."""

    owner = OWNER

    def __init__(self, steps: CompiledSteps, *, waits: bool, loader: Loader | None = None) -> None:
        """
        Args:
            waits: wait for what is compiled, while idle too; else steps go on meanwhile.
            loader: what is waited for likewise before a kept step is loaded; None: nothing is.
        """
        self._steps = steps
        self._waits = waits
        self._loader = loader
        self._job: tuple[GraphKey, CompileJob, list[torch.Tensor], list[int]] | None = None

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        """Load the step, start compiling it, or take what was compiled of it.

        Raises:
            NotReadyError: it is being compiled.
            CacheMissError: `offline_compile=True`, and it is not kept.
            RuntimeError: the step cannot be recorded, or not compiled.
        """
        if self._loader is not None and not self._steps.empty and not self._loader.ready():
            raise NotReadyError
        if self._job is None or self._job[0] != key:
            step()  # what the first run sets up is no part of it
            graph, inputs = record_step(step)
            kept = self._steps.find(graph, inputs)
            if kept is not None:
                return _recorded(kept, inputs, step, known)
            if self._steps.offline:
                self._steps.missing += 1
                raise CacheMissError(
                    "offline_compile=True, and the compile cache does not hold this step; run hybridgen cache warm "
                    "with the engine's settings, or allow compiling"
                )
            if self._job is not None and not self._job[1].done:
                raise NotReadyError
            self.close()  # nobody asked for it again
            places = [one.data_ptr() for one in inputs]
            self._job = key, self._steps.start(graph, inputs), inputs, places
        _, process, inputs, places = self._job
        if not process.done and not self._waits:
            raise NotReadyError
        self._job = None
        compiled = self._steps.take(process)
        if [one.data_ptr() for one in inputs] != places:
            raise RuntimeError("its tensors moved while it was compiled")
        return _recorded(compiled, inputs, step, known)

    @property
    def behind(self) -> str:
        """What is waited for, in words."""
        if self._job is None:
            return "what loads it is imported"
        return "compiled" if self._job[1].done else f"being compiled by process {self._job[1].pid}"

    def close(self) -> None:
        """Stop what is being compiled."""
        if self._job is not None:
            self._job[1].close()
            self._job = None


def _recorded(
    compiled: CompiledStep,
    inputs: Sequence[torch.Tensor],
    step: Callable[[], None],
    known: tuple[float, float] | None,
) -> Recorded:
    replay = partial(_call, compiled, tuple(inputs))
    replay()
    plain, seconds = (None, None) if known is None else known
    return Recorded(
        replay=replay,
        release=_nothing,
        owner=OWNER,
        plain_seconds=checked_seconds(step, _nothing, plain),
        seconds=checked_seconds(replay, _nothing, seconds),
        bytes=0,
        exact=False,
    )


def _call(compiled: CompiledStep, inputs: tuple[torch.Tensor, ...]) -> None:
    compiled(*inputs)


def _nothing() -> None:
    return None
