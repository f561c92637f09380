"""A recorded step is compiled behind: in another process, while steps go on running as they are."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hybridgen
from hybridgen.compilation.step_graph import StepGraph

TASK, ARTIFACT = "task", "artifact"
_PRIORITY = 10
"""What the compiling process adds to its niceness."""


class OneTensor(NamedTuple):
    """What is compiled for, of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class CompileJob:
    """One step on its way through Inductor."""

    def __init__(self, graph: StepGraph, inputs: Sequence[Tensor]) -> None:
        """Start the process. It has this one's environment, and so its compile cache."""
        self._folder = Path(tempfile.mkdtemp(prefix="hybridgen-compile-"))
        tensors = [OneTensor(tuple(one.shape), tuple(one.stride()), one.dtype) for one in inputs]
        (self._folder / TASK).write_bytes(pickle.dumps((graph, tensors, torch.get_num_threads())))
        root = str(Path(hybridgen.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hybridgen.compilation.worker", str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
                # Not to be interrupted by a Ctrl-C that is for this process.
                start_new_session=True,
            )
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _PRIORITY)

    @property
    def done(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def result(self) -> Callable[..., Any]:
        """The compiled step. It must be `done`.

        Raises:
            RuntimeError: it could not be compiled.
        """
        try:
            artifact = self._folder / ARTIFACT
            if self._process.returncode != 0 or not artifact.exists():
                lines = (self._folder / "log").read_text(errors="replace").strip().splitlines()
                last = lines[-1][:300] if lines else f"exit status {self._process.returncode}"
                raise RuntimeError(f"the compiling process failed: {last}")
            compiled: Callable[..., Any] = torch._inductor.CompiledArtifact.load(path=str(artifact), format="binary")
            return compiled
        finally:
            self.close()

    def close(self) -> None:
        """End the process if it runs, and remove its files."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
