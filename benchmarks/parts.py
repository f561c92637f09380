"""Parts of a benchmark that run in processes of their own, each with so many seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import this_device


class Part:
    """What a part is given, and where it leaves its rows."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.folder = Path(order["folder"])
        self.smoke: bool = order["smoke"]
        self.modes: list[str] = order["modes"]
        self.rank: int = order["rank"]
        self.ranks: int = order["ranks"]
        self.name: str = order["part"]
        self.device = this_device()
        self.end = time.monotonic() + order["seconds"]
        self._rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Keep a row, whatever becomes of this process."""
        if self.rank:
            return
        self._rows.append({"part": self.name, **row})
        place = self.folder / f"{self.name}.json"
        place.with_suffix(".new").write_text(json.dumps(self._rows))
        place.with_suffix(".new").replace(place)
        shown = {key: value for key, value in self._rows[-1].items() if key != "ran"}
        print(f"{time.strftime('%X')} {json.dumps(shown)}", flush=True)

    @property
    def whole(self) -> Path:
        """The checkpoint that has values."""
        memory = Path("/dev/shm")
        has_room = os.access(memory, os.W_OK) and (self.smoke or shutil.disk_usage(memory).total > 40e9)
        return (memory if has_room else self.folder) / f"whole-{self.folder.name}"


class Process:
    """A part's processes: they import at once, and begin when they are told to."""

    def __init__(self, order: dict[str, Any], ranks: int) -> None:
        """`order` is given to this script again, as its option `--order`, with the rank of each."""
        self.seconds = order["seconds"]
        self._all = []
        for rank in range(ranks):
            command = [sys.executable, sys.argv[0], "--order", json.dumps({**order, "rank": rank})]
            self._all.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True))

    def begin(self) -> None:
        for process in self._all:
            if process.stdin is not None:
                process.stdin.write("now\n")
                process.stdin.flush()

    def finish(self, until: float) -> str:
        """Wait; what went wrong, or nothing."""
        wrong = ""
        for process in self._all:
            try:
                status = process.wait(max(0.1, until - time.monotonic()))
                wrong = wrong or (f"ended with status {status}" if status else "")
            except subprocess.TimeoutExpired:
                wrong = "took too long"
        self.kill()
        return wrong

    def kill(self) -> None:
        for process in self._all:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
