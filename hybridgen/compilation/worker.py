"""The process that compiles a recorded step for another: `python -m hybridgen.compilation.worker FOLDER`.

Inductor holds Python's lock for seconds to minutes; in a process of its own it disturbs no step.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor

import hybridgen.kernels.attention.latent
import hybridgen.kernels.attention.ops
import hybridgen.kernels.linear.quantised
import hybridgen.kernels.step.linear  # noqa: F401
from hybridgen.compilation.behind import TASK, Task
from hybridgen.compilation.step_graph import OneTensor


def _empty(one: OneTensor) -> torch.Tensor:
    # Not written to, so a weight takes no memory here.
    return torch.empty_strided(one.shape, one.stride, dtype=one.dtype)


def end_with_parent() -> None:
    """Wait until the process that asked for this one has ended, and end with what was started here: nobody else
    would."""
    os.read(0, 1)  # not by a file object: its lock would be held when this process ends by itself
    os.killpg(0, signal.SIGKILL)


def main(folder: Path) -> None:
    """Compile the folder's task and leave the artifact where it says."""
    task: Task = pickle.loads((folder / TASK).read_bytes())
    torch.set_num_threads(task.threads)
    with torch.inference_mode():
        compiled = torch._inductor.standalone_compile(
            task.graph.module(),
            [_empty(one) for one in task.inputs],
            dynamic_shapes="from_example_inputs",
            options={"config_patches": {"size_asserts": False}},
        )
    unfinished = task.artifact.with_name(f".{task.artifact.name}")
    compiled.save(path=str(unfinished), format="binary")
    os.replace(unfinished, task.artifact)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    main(Path(sys.argv[1]))
