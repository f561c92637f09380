"""Whole decode steps that were compiled, kept in an entry of the compile cache.

A step is found by what it is: a digest of its operators with their arguments, and of the shapes, strides and dtypes of
the tensors that it reads and writes (`step_graph`). What else decides about the code (versions, processor, threads,
settings of compilers) is in the entry's key. So a step that is found is the step that was compiled, and nothing has to
be traced; the weights' values and the number of the cache's pages are not in it.
"""

from __future__ import annotations

import contextvars
import importlib
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridgen.compilation.behind import CompileJob, load_step
from hybridgen.compilation.layers import switched_off
from hybridgen.compilation.step_graph import StepGraph
from hybridgen.config import EngineConfig, Mode
from hybridgen.errors import described

logger = logging.getLogger(__name__)


def compiles_whole(config: EngineConfig, mode: Mode, device_type: str) -> bool:
    """Whether decode steps are compiled whole, in place of the layers: mode hybrid on a CPU, by Inductor.

    Not where somebody drafts: a drafter of the user's is no code that another process could be told of. Not where
    several processes run each step together: they compile layers, at the same moment.
    """
    whole = device_type == "cpu" and mode is Mode.HYBRID and config.compile_backend == "inductor"
    return whole and not config.drafts and config.tensor_parallel == 1 and switched_off() is None


def compiles_behind(config: EngineConfig, mode: Mode, device_type: str) -> bool:
    """Whether compiled steps are made while steps run as they are, and no start waits for one that has to be made."""
    return config.lazy_capture and compiles_whole(config, mode, device_type)


CompiledStep = Callable[..., object]
"""Called with the graph's inputs."""


class CompiledSteps:
    """The compiled steps of one engine, in a directory."""

    def __init__(self, directory: Path | None, *, offline: bool, fall_back: Callable[[str], None]) -> None:
        """
        Args:
            directory: of an entry's working copy, whose files were checked; None: nothing is kept.
            offline: compile nothing.
            fall_back: told the reason where a file is not used.
        """
        self.directory = directory
        self.offline = offline
        self._fall_back = fall_back
        self.loaded = 0
        """Steps that came from the directory."""
        self.compiled = 0
        """Steps that were compiled for this engine."""
        self.missing = 0
        """Steps that were not there, with `offline`."""

    @property
    def empty(self) -> bool:
        """Whether the directory holds none."""
        return self.directory is None or not any(self.directory.glob(_name("*")))

    def find(self, graph: StepGraph, inputs: Sequence[Tensor]) -> CompiledStep | None:
        """The compiled form of a step; None where it is not kept, or cannot be loaded.

        A file is code: the directory is a working copy that was checked file by file (`store.entry`).
        """
        path = self._path(graph, inputs)
        if path is None or not path.exists():
            return None
        try:
            found = load_step(path)
        except Exception as error:  # unpickling runs torch's code, which may raise anything
            logger.debug("a compiled step is not used", exc_info=True)
            path.unlink(missing_ok=True)
            self._fall_back(f"compile cache: a compiled step cannot be loaded ({described(error)})")
            return None
        self.loaded += 1
        return found

    def start(self, graph: StepGraph, inputs: Sequence[Tensor]) -> CompileJob:
        """Begin to compile a step, in another process; what it makes is kept."""
        return CompileJob(graph, inputs, self._path(graph, inputs))

    def take(self, job: CompileJob) -> CompiledStep:
        """What a job made; waits for it.

        Raises:
            RuntimeError: it could not be compiled.
        """
        found = job.result()
        self.compiled += 1
        return found

    def _path(self, graph: StepGraph, inputs: Sequence[Tensor]) -> Path | None:
        return None if self.directory is None else self.directory / _name(graph.digest(inputs))


def _name(digest: str) -> str:
    return f"step-{digest}.bin"


class Loader:
    """Imports what loading a step needs, on a thread of its own that the first question starts."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def ready(self) -> bool:
        """Whether it is imported."""
        if self._thread is None:
            # With this thread's context: torch keeps some settings in it.
            work = partial(contextvars.copy_context().run, import_loader)
            self._thread = threading.Thread(target=work, name="hybridgen-loader", daemon=True)
            self._thread.start()
        return not self._thread.is_alive()


def import_loader() -> None:
    """Import what loading a step needs, and let torch find out which vector instructions there are: a second that a
    thread can spend while weights are read."""
    importlib.import_module("torch._inductor.compile_fx")
    isa: Any = importlib.import_module("torch._inductor.cpu_vec_isa")
    isa.pick_vec_isa()
