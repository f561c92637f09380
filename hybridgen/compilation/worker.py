"""The process that compiles a recorded step for another: `python -m hybridgen.compilation.worker FOLDER`.

Inductor holds Python's lock for seconds to minutes; in a process of its own it disturbs no step.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor

import hybridgen.kernels.attention.ops
import hybridgen.kernels.step.linear  # noqa: F401
from hybridgen.compilation.behind import ARTIFACT, TASK, OneTensor


def _empty(one: OneTensor) -> torch.Tensor:
    # Not written to, so a weight takes no memory here.
    return torch.empty_strided(one.shape, one.stride, dtype=one.dtype)


def main(folder: Path) -> None:
    """Compile the folder's task and leave the artifact there."""
    graph, tensors, threads = pickle.loads((folder / TASK).read_bytes())
    torch.set_num_threads(threads)
    with torch.inference_mode():
        compiled = torch._inductor.standalone_compile(
            graph.module(),
            [_empty(one) for one in tensors],
            dynamic_shapes="from_example_inputs",
            options={"config_patches": {"size_asserts": False}},
        )
    unfinished = folder / "unfinished"
    compiled.save(path=str(unfinished), format="binary")
    os.replace(unfinished, folder / ARTIFACT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
