"""A recorded step is compiled behind: in another process, while steps go on running as they are."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridgen.compilation.step_graph import OneTensor, StepGraph

TASK = "task"
_PRIORITY = 10
"""What the compiling process adds to its niceness."""


class Task(NamedTuple):
    """What the compiling process is told."""

    graph: StepGraph
    inputs: list[OneTensor]
    threads: int
    artifact: Path
    """Where it leaves what it made."""


def load_step(path: Path) -> Callable[..., Any]:
    """What the compiling process made: a function of the step's inputs."""
    import torch._inductor.compile_fx  # which the artifact needs and does not import

    return torch._inductor.CompiledArtifact.load(path=str(path), format="binary")


class CompileJob:
    """One step on its way through Inductor."""

    def __init__(self, graph: StepGraph, inputs: Sequence[Tensor], keep: Path | None = None) -> None:
        """Start the process. It has this one's environment, and so its compile cache.

        Args:
            keep: where what it makes is to stay; None: nowhere.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="hybridgen-compile-"))
        self._artifact = self._folder / "artifact" if keep is None else keep
        task = Task(graph, graph.described(inputs), torch.get_num_threads(), self._artifact)
        (self._folder / TASK).write_bytes(pickle.dumps(task))
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hybridgen.compilation.worker", str(self._folder)],
                stdin=subprocess.PIPE,  # whose end tells it that this process has ended, however it did
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
                # Not to be interrupted by a Ctrl-C that is for this process.
                start_new_session=True,
            )
        if hasattr(os, "setpriority"):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, self._process.pid, _PRIORITY)
        self._closed = False
        self._compiled: Callable[..., Any] | None = None
        self._error: Exception | None = None
        atexit.register(self.close)
        # Loading what was compiled takes seconds too, and most of them wait.
        self._thread = threading.Thread(target=self._load, name="hybridgen-compile", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the process that compiles."""
        return self._process.pid

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return not self._thread.is_alive()

    def result(self) -> Callable[..., Any]:
        """The compiled step; waits for it.

        Raises:
            RuntimeError: it could not be compiled.
        """
        self._thread.join()
        if self._compiled is None:
            raise RuntimeError(f"the compiling process failed: {self._error}") from self._error
        return self._compiled

    def _load(self) -> None:
        try:
            status = self._process.wait()
            if self._closed:
                return
            if status != 0 or not self._artifact.exists():
                lines = (self._folder / "log").read_text(errors="replace").strip().splitlines()
                raise RuntimeError(lines[-1][:300] if lines else f"exit status {status}")
            self._compiled = load_step(self._artifact)
        except Exception as error:  # told by `result`
            self._error = error
        finally:
            if self._process.stdin is not None:
                self._process.stdin.close()
            atexit.unregister(self.close)
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """End the process if it runs; its files go with it."""
        self._closed = True
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # the C++ compiler with it
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
