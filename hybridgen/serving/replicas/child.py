"""The process of one replica: a generator process that says when it is ready, and ends with the one that started it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridgen.config import EngineConfig
from hybridgen.errors import HybridgenError
from hybridgen.serving.process import ServeOptions, serve
from hybridgen.serving.service.limits import Limits
from hybridgen.serving.unix.messages import CODES

if TYPE_CHECKING:
    from hybridgen.engine import Engine

END_SECONDS = 5.0
"""For an orderly end once the parent is gone; then the process ends without one."""

_orphaned = threading.Event()
"""Set when standard input has ended."""


def main() -> int:
    """Serve as the first line of standard input says, until standard input ends; returns the exit status.

    Standard output gets one line of JSON: `{"ready": true}`, or the error for which the model could not be loaded.
    """
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is not an answer
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_follow, daemon=True, name="hybridgen-parent").start()

    def load() -> Engine:
        from hybridgen.engine import Engine

        return Engine.load(order["model"], EngineConfig.of(None, order["fields"]))

    serving = logging.getLogger("hybridgen.serving")
    serving.setLevel(logging.CRITICAL)  # the parent tells why a model cannot be loaded; once is enough

    def note(line: str) -> None:
        serving.setLevel(logging.NOTSET)
        if line.startswith("hybridgen: serving "):
            _answer(answers, {"ready": True})

    # The parent keeps as many requests here as fit; it is the only client that asks for much.
    options = ServeOptions(socket=order["socket"], drain_seconds=END_SECONDS, limits=Limits(queue=order["queue"]))
    try:
        return serve(load, options, note)
    except HybridgenError as error:
        kind = next((code for code, kind in CODES.items() if isinstance(error, kind)), type(error).__name__)
        _answer(answers, {"error": {"kind": kind, "message": str(error)}})
        return 2
    finally:
        if _orphaned.is_set():  # nobody else removes it
            shutil.rmtree(Path(order["socket"]).parent, ignore_errors=True)


def _follow() -> None:
    """End this process when its parent closes standard input, or dies."""
    while sys.stdin.readline():
        pass
    _orphaned.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)  # it loads, compiles or hangs


def _answer(descriptor: int, value: Mapping[str, Any]) -> None:
    os.write(descriptor, (json.dumps(value) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
