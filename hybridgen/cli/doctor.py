"""`hybridgen doctor`: what this machine can do, and why not what it cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hybridgen.cli.output import check_output_is_open, say, say_json
from hybridgen.errors import described

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "accelerate")


class Finding(NamedTuple):
    """One thing looked at."""

    name: str
    ok: bool
    detail: str


def add_command(commands: Any) -> None:
    """Add `doctor`."""
    parser = commands.add_parser("doctor", help="say what this machine can do, and why not")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; returns the exit status."""
    check_output_is_open()
    findings = examine()
    if arguments.json:
        say_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            say(f"{'ok' if finding.ok else 'no':<3} {finding.name:<13} {finding.detail}")
    return 0


def examine() -> list[Finding]:
    """Look at everything; takes a few seconds, because it compiles and runs one small function."""
    return [*_packages(), _cuda(), _compiler(), _cache_directory(), *_modes()]


def _packages() -> Iterator[Finding]:
    yield Finding("python", True, f"{platform.python_version()} on {platform.machine()}")
    for name in PACKAGES:
        try:
            yield Finding(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            needed = "mode jit on CUDA and the CUDA kernels need it" if name == "triton" else f"pip install {name}"
            yield Finding(name, False, f"not installed; {needed}")


def _cuda() -> Finding:
    import torch

    if torch.version.cuda is None:
        return Finding("cuda", False, f"this build of torch ({torch.__version__}) has no CUDA; models run on the CPU")
    if not torch.cuda.is_available():
        return Finding("cuda", False, f"torch has CUDA {torch.version.cuda} but sees no device; check the driver")
    parts = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        parts.append(
            f"cuda:{index} {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    return Finding("cuda", True, f"CUDA {torch.version.cuda}; " + "; ".join(parts))


def _compiler() -> Finding:
    """The C++ compiler that Inductor's CPU kernels, and Triton's launchers, are built with."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "gcc"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None and "CXX" in os.environ:
        why = "is not found" if len(names[0].split()) == 1 else "is not one program, and Inductor runs it as one"
        return Finding("compiler", False, f'CXX="{names[0]}" {why}; set CXX to a compiler alone, or unset it for g++')
    if found is None:
        return Finding("compiler", False, f"no {' or '.join(names)}; install g++ or set CXX (mode jit needs it)")
    return Finding("compiler", True, found)


def _cache_directory() -> Finding:
    """Where Inductor keeps what it compiles."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir())
    if os.access(path, os.W_OK):
        return Finding("cache", True, f"{path} (TORCHINDUCTOR_CACHE_DIR)")
    return Finding("cache", False, f"{path} is not writable; set TORCHINDUCTOR_CACHE_DIR to a directory that is")


def _modes() -> Iterator[Finding]:
    yield Finding("mode eager", True, "runs everywhere")
    cannot_compile = _try_compile()
    yield Finding("mode jit", cannot_compile is None, cannot_compile or "torch.compile made and ran a function")
    recorded, how = _try_capture()
    yield Finding("mode graph", recorded, how)
    yield Finding("mode hybrid", recorded and cannot_compile is None, cannot_compile or how)


def _try_capture() -> tuple[bool, str]:
    """Record and replay a small step the way the engine does; whether that worked, and what was used or went wrong."""
    import torch

    from hybridgen.graphs import Recorder, StandInRecorder
    from hybridgen.graphs.key import GraphKey

    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    total = torch.zeros(4, device=device)
    recorder: Recorder = StandInRecorder()

    def step() -> None:
        total.add_(1)

    try:
        if on_cuda:
            from hybridgen.graphs.cuda import CudaGraphRecorder

            recorder = CudaGraphRecorder(device)
        recorded = recorder.record(GraphKey.decode(1, None), step, None)
        before = total.tolist()
        recorded.replay()
        moved = total.tolist() == [value + 1 for value in before]
        recorded.release()
        recorder.close()
    except Exception as error:  # whatever the driver raises is the finding
        return False, f"the capture failed: {described(error)}"
    if not moved:
        return False, "a replay gave another result than the step; the driver or this build of torch is broken"
    return True, "a CUDA graph was captured and replayed" if on_cuda else "with a stand-in: a CPU has no graphs"


def _try_compile() -> str | None:
    """Compile and run a small function; what went wrong, or None."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed; Inductor needs it on CUDA"

    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * 2

    x = torch.arange(16, dtype=torch.float32, device=device)
    try:
        compiled = torch.compile(double, fullgraph=True)(x)
    except Exception as error:  # whatever the tool chain raises is the finding
        return f"torch.compile failed: {described(error)}"
    if not torch.allclose(compiled, double(x)):
        return "torch.compile gave another result than eager; the tool chain is broken"
    return None
