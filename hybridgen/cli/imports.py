"""Imports what an engine needs, for commands that load a model."""

from __future__ import annotations

import gc
import sys

from hybridgen.telemetry import import_time


def import_engine() -> None:
    """Import torch, transformers and the engine, and keep the garbage collector from looking at what they made.

    That is hundreds of thousands of objects that live as long as the process. Collections that run while they are made,
    later ones and the one at the process's end would go through all of them, which takes about as long as our own
    imports. Only here, where the process is ours.
    """
    if "hybridgen.engine" in sys.modules:
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        with import_time.timed():
            import hybridgen.engine  # noqa: F401
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
