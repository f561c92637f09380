"""`hybridgen serve`: a process that loads a model, listens, and ends in an orderly way."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridgen.errors import ConfigError, ServerError, shown
from hybridgen.serving.adapter import EngineModel, Model
from hybridgen.serving.address import Lease, socket_path
from hybridgen.serving.limits import Limits
from hybridgen.serving.metrics import Metrics
from hybridgen.serving.server import Server

logger = logging.getLogger(__name__)

JOIN_SECONDS = 10.0
"""How long the generator thread has to close the engine before the process ends without it."""
SWITCH_SECONDS = 0.0005
"""How long one thread may keep Python's lock while the other wants it (Python's own default is ten times as much)."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server runs.

    Raises:
        ConfigError: a value is out of its range.
    """

    socket: str | os.PathLike[str] | None = None
    """Path of the socket; None: `default_path()`."""
    idle_exit: float | None = None
    """End after this many seconds without a request."""
    ready_file: Path | None = None
    """Written when the server listens, removed when it ends."""
    metrics: int | None = None
    """Port on localhost for Prometheus; 0: any free one."""
    drain_seconds: float = 120.0
    """How long requests in flight may go on after the server was told to end."""
    step_seconds: float = 300.0
    """A step that takes longer hangs. A step may compile something."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("idle_exit", "drain_seconds", "step_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**31:
                raise ConfigError(f"{name}={shown(value)}; give a positive number of seconds")
        if self.metrics is not None and not 0 <= self.metrics < 2**16:
            raise ConfigError(f"metrics={shown(self.metrics)} is no port; give 0 to 65535 (0: any free one)")


def serve(load: Callable[[], Any], options: ServeOptions, note: Callable[[str], None]) -> int:
    """Serve until told to end; returns the exit status: 0, or 1 after an abort or a fatal error.

    Args:
        load: makes the engine.
        note: told, in a line each, when the server listens and when it ends.

    Raises:
        HybridgenError: the socket cannot be used or the model cannot be loaded.
    """
    return serve_model(lambda: EngineModel(load), options, note)


def serve_model(load: Callable[[], Model], options: ServeOptions, note: Callable[[str], None]) -> int:
    """`serve()` with any `Model`."""
    metrics = None if options.metrics is None else Metrics()
    metrics_port = None
    handlers: dict[int, Any] = {}
    lease = Lease(socket_path(options.socket))  # before the model is loaded: what is wrong here should not cost that
    try:
        if options.ready_file is not None:
            _remove_file(options.ready_file)
            _check_file(options.ready_file)
        server = Server(
            lease,
            load,
            limits=options.limits,
            step_seconds=options.step_seconds,
            drain_seconds=options.drain_seconds,
            idle_exit=options.idle_exit,
            on_ready=lambda server: _announce(server, lease, options, metrics_port, note),
            on_done=(lambda done: None) if metrics is None else metrics.completed,
        )
        if metrics is not None and options.metrics is not None:
            metrics_port = metrics.listen(options.metrics, server)
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not the loop's handlers, which go with it: another signal must not stop the cleaning up below.
            handlers[number] = signal.signal(number, lambda number, frame: server.signalled())
        sys.setswitchinterval(SWITCH_SECONDS)
        error = asyncio.run(server.run())
        server.generator.join(JOIN_SECONDS if server.description else 0.1)
    finally:
        if metrics is not None:
            metrics.close()
        if options.ready_file is not None:
            with suppress(ServerError):
                _remove_file(options.ready_file)
        lease.release()
        for handled, handler in handlers.items():
            signal.signal(handled, signal.SIG_DFL if handler is None else handler)
    if error is not None and not server.description and not server.generator.is_alive():
        raise error  # it could not be loaded
    note("hybridgen: ended" if error is None else f"hybridgen: ended: {error}")
    status = 0 if error is None else 1
    if server.generator.is_alive():
        # It loads, compiles or hangs, and the interpreter would wait for it or crash under it.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


def _announce(
    server: Server, lease: Lease, options: ServeOptions, metrics_port: int | None, note: Callable[[str], None]
) -> None:
    facts: dict[str, Any] = {"socket": str(lease.path), "pid": os.getpid()}
    if metrics_port is not None:
        facts["metrics_port"] = metrics_port
        note(f"hybridgen: metrics at http://127.0.0.1:{metrics_port}/metrics")
    if options.ready_file is not None:
        _write_file(options.ready_file, json.dumps(facts) + "\n")
    note(f"hybridgen: serving {server.description['model']} at {lease.path}")


def _check_file(path: Path) -> None:
    """Check that a file can be written there, before the model is loaded."""
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise ServerError(f"--ready-file {path} cannot be written: {error.strerror}") from error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _write_file(path: Path, text: str) -> None:
    """Write a file so that whoever sees it sees all of it."""
    part = _part(path)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise ServerError(f"--ready-file {path} cannot be written: {error.strerror}") from error


def _remove_file(path: Path) -> None:
    """Remove what a server before this one left."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ServerError(f"--ready-file {path} is there and is no file; name another")
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ServerError(f"--ready-file {path} cannot be removed: {error.strerror}") from error
