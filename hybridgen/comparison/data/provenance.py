"""Where and with what something was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hybridgen._version import __version__

PACKAGES = ("torch", "transformers", "triton", "tokenizers", "safetensors", "numpy")
CLOCKS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit"


def provenance(device: Any = None) -> dict[str, Any]:
    """Versions, machine, GPU with driver and clocks, commit and command.

    What cannot be found out is None: there is no commit where hybridgen is not run from its repository.

    Args:
        device: the `torch.device` that was measured; the GPU's facts are left out for a CPU.
    """
    import torch

    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "hybridgen": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            **gpu_state(device),
        }
    return facts


def gpu_state(device: Any) -> dict[str, str | None]:
    """Driver, clocks, temperature and power as nvidia-smi says now; values None where it cannot be asked."""
    import torch

    names = CLOCKS.split(",")
    index = device.index if device.index is not None else torch.cuda.current_device()
    # nvidia-smi counts all devices of the machine, torch those that it may see.
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    which = f"GPU-{uuid}" if uuid is not None else str(index)
    line = _output("nvidia-smi", f"--id={which}", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
    values = [value.strip() for value in line.split(",")] if line else []
    found = dict(zip(names, values, strict=True)) if len(values) == len(names) else dict.fromkeys(names)
    return {"driver" if name == "driver_version" else name: value for name, value in found.items()}


def commit() -> str | None:
    """The commit that hybridgen is run from, with `+` behind it where files were changed since.

    `HYBRIDGEN_COMMIT` says it where a copy without its history runs.
    """
    told = os.environ.get("HYBRIDGEN_COMMIT")
    if told:
        return told
    folder = str(Path(__file__).resolve().parents[3])
    if not (Path(folder) / ".git").exists():
        return None
    found = _output("git", "-C", folder, "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return found + "+" if found and changed else found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    """Its name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
