"""Checks of Triton kernels in Triton's interpreter; `Interpreter` starts it, and this file is also its script.

TRITON_INTERPRET is read when Triton is imported, so that checks run in a process of their own: one for all checks of
a test run, because importing torch takes longer than most checks.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class Interpreter:
    """A process that runs checks one after the other. It starts with the first; `close()` ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115

    def run(self, module: Path, check: str, *arguments: int) -> None:
        """Call a function of a module; AssertionError, with the traceback, where it raises.

        The module has to run in the interpreter alone: its directory and the tests' are on the path, and what an
        earlier check has changed stays changed.
        """
        if self._process is None:
            path = os.pathsep.join(map(os.path.abspath, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([str(module), check, *arguments]), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BaseException:  # a timeout: the answer that still comes must not be taken for the next check's
            self.close()
            raise
        if not answer:
            status = self._process.wait()
            self._process = None
            self._log.seek(0)
            raise AssertionError(f"the interpreter's process ended with {status}: {self._log.read()[-3000:]}")
        failure = json.loads(answer)
        if failure is not None:
            raise AssertionError(failure)

    def close(self) -> None:
        """End the process; another check would start a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main() -> None:
    """Answer each line of stdin, [module, check, arguments...], with one of stdout: null, or a traceback."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what checks print goes to the log
    import quick_interpreter
    import torch

    quick_interpreter.install()
    torch.set_num_threads(1)
    for line in sys.stdin:
        module, check, *arguments = json.loads(line)
        path = Path(module)
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        failure = None
        try:
            getattr(importlib.import_module(path.stem), check)(*arguments)
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps(failure), file=answers, flush=True)


if __name__ == "__main__":
    main()
