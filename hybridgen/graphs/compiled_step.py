"""Steps of a CPU as one compiled function each: attention, cache write, norms, head and choice in it.

A step is recorded as its operators (`compilation.step_graph`), and Inductor compiles them in another process while
steps run as they are (`compilation.behind`). A replay is a call of the compiled function: no Python of the model runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hybridgen.compilation.behind import CompileJob
from hybridgen.compilation.step_graph import record_step
from hybridgen.graphs.key import GraphKey
from hybridgen.graphs.recorder import NotReadyError, Recorded, checked_seconds

OWNER = "compiled step"


class CompiledStepRecorder:
    """Compiles one step at a time, behind."""

    owner = OWNER

    def __init__(self) -> None:
        self._job: tuple[GraphKey, CompileJob, list[torch.Tensor], list[int]] | None = None

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        """Start compiling the step, or take what was compiled of it.

        Raises:
            NotReadyError: it is being compiled.
            RuntimeError: the step cannot be recorded, or not compiled.
        """
        job = self._job
        if job is not None and not job[1].done:
            raise NotReadyError
        if job is None or job[0] != key:
            if job is not None:  # nobody wants it any more
                self.close()
            step()  # what the first run sets up is no part of it
            graph, inputs = record_step(step)
            places = [one.data_ptr() for one in inputs]
            self._job = key, CompileJob(graph, inputs), inputs, places
            raise NotReadyError
        self._job = None
        _, process, inputs, places = job
        compiled = process.result()
        if [one.data_ptr() for one in inputs] != places:
            raise RuntimeError("its tensors moved while it was compiled")
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
        )

    def close(self) -> None:
        """Stop what is being compiled."""
        if self._job is not None:
            self._job[1].close()
            self._job = None


def _call(compiled: Callable[..., object], inputs: tuple[torch.Tensor, ...]) -> None:
    compiled(*inputs)


def _nothing() -> None:
    return None
