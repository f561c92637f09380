"""Workers on a store, and what they printed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks

WORKER = Path(__file__).with_name("worker.py")
CONFIG: dict[str, Any] = {
    "mode": "hybrid",
    "device": "cpu",
    "max_batch": 4,
    "page_size": 16,
    "token_budget": 64,
    "kv_memory": "16MiB",
    "decode_buckets": [1, 2, 4],
    "prefill_buckets": [16, 64],
    "max_padding_ratio": 64,
}


def start(model: Path, store: Path, *, layers: bool = True, **changes: Any) -> subprocess.Popen[str]:
    """A worker on this store.

    Args:
        layers: compile the layers, as mode hybrid does on CUDA; else whole steps.
    """
    given = {"model": str(model), "config": CONFIG | changes, "layers": layers}
    environment = os.environ | {
        "HYBRIDGEN_CACHE_DIR": str(store),
        "HYBRIDGEN_COMPILE_CACHE": "1",
        forks.INSIDE: "1",
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), *sys.path]),
    }
    return forks.Popen(
        [sys.executable, str(WORKER), json.dumps(given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a worker printed."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@dataclass(frozen=True)
class Warmed:
    """A store with one entry, and what filled it."""

    model: Path
    store: Path
    results: tuple[dict[str, Any], ...]

    @property
    def tokens(self) -> list[list[int]]:
        return self.results[0]["tokens"]

    def copy(self, to: Path) -> Path:
        """The store elsewhere."""
        shutil.copytree(self.store, to, symlinks=True)
        to.chmod(0o700)
        return to
