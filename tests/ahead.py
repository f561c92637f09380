"""What the process that `forks` come from does before the first of them: imports, and a compilation."""

from __future__ import annotations

import importlib
import os
import tempfile

IMPORTS = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch._inductor.standalone_compile",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "hybridgen.api",
    "hybridgen.cli.main",
    "hybridgen.compilation.worker",
    "hybridgen.engine",
    "hybridgen.engine.rank",
    "hybridgen.graphs.store",
    "hybridgen.serving.process",
    "hybridgen.serving.replicas.replicas",
    "tabulate",  # for Dynamo, at the end of every process
)


def load() -> None:
    """Import it, for one thread."""
    for name in IMPORTS:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def compile_something() -> None:
    """Compile something small: what Inductor then imports, and finds out about the compiler, takes six seconds of the
    processor, in which forks do it no more."""
    import torch
    import torch._dynamo.utils
    import torch._inductor.config
    import tqdm
    from torch.fx.experimental.proxy_tensor import make_fx

    tqdm.tqdm.monitor_interval = 0  # its thread
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    inputs = torch.zeros(8, 16), torch.zeros(16, 16)
    with (
        tempfile.TemporaryDirectory() as os.environ[variable],
        torch._inductor.config.patch(compile_threads=1),
        torch.inference_mode(),
    ):
        graph = make_fx(lambda x, y: torch.softmax((x @ y).relu(), -1))(*inputs)
        torch._inductor.standalone_compile(graph, list(inputs), dynamic_shapes="from_example_inputs")
    os.environ.pop(variable)
    if before is not None:
        os.environ[variable] = before
    tqdm.tqdm.monitor_interval = 10
    torch._dynamo.utils.counters.clear()  # so that tests count their own
