"""The door's process as `hybridgen serve --http` keeps it: it starts while the model loads, and ends after it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridgen.errors import ConfigError
from hybridgen.serving.http.options import HttpOptions

logger = logging.getLogger(__name__)

END_SECONDS = 10.0
"""For the process to end once nothing is in flight any more."""


class HttpChild:
    """The process of `hybridgen http` beside a server."""

    def __init__(self, model: str | None, options: HttpOptions, path: Path) -> None:
        """Start it, and wait until it has its address.

        Raises:
            ConfigError: it has none, with what it said.
        """
        command = [sys.executable, "-m", "hybridgen", "http", *([model] if model else []), "--child"]
        command += ["--socket", str(path), "--listen", options.listen, "--default-tokens", str(options.default_tokens)]
        for name, value in (
            ("api-key-file", options.api_key_file),
            ("name", options.name),
            ("chat-template", options.chat_template),
        ):
            command += [] if value is None else [f"--{name}", str(value)]
        for origin in options.origins:
            command += ["--origin", origin]
        command += [] if options.page else ["--no-page"]
        self._ending = False
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.url: str = self._line()["url"]
        self._ready = False

    def _line(self) -> Any:
        """The next thing that it tells of itself.

        Raises:
            ConfigError: it ended instead.
        """
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise self._not_started(self._process.wait())
        return json.loads(line)

    def _not_started(self, status: int) -> ConfigError:
        return ConfigError(f"the HTTP door did not start (exit status {status}); see the lines above")

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            ConfigError: it ended before.
        """
        self._line()
        self._ready = True

    def watch(self, ended: Callable[[str], None], failed: Callable[[ConfigError], None]) -> None:
        """Call one of these, in another thread, when it ends without being told to: `failed` before it answered."""

        def wait() -> None:
            status = self._process.wait()
            if self._ending:
                return
            if self._ready:
                ended(f"the HTTP door ended with status {status}")
            else:
                failed(self._not_started(status))

        threading.Thread(target=wait, daemon=True, name="hybridgen-http").start()

    def close(self) -> None:
        """End it. Twice is fine."""
        self._ending = True
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("the HTTP door did not end within %g s and is killed", END_SECONDS)
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
