"""`hybridgen serve`: a process that loads a model, listens, and ends in an orderly way."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridgen.errors import ConfigError, ServerError, shown
from hybridgen.serving.http.child import HttpChild
from hybridgen.serving.http.options import HttpOptions
from hybridgen.serving.lifecycle.descriptors import require_descriptors
from hybridgen.serving.lifecycle.endpoint import DESCRIPTORS as ENDPOINT_DESCRIPTORS
from hybridgen.serving.lifecycle.endpoint import Endpoint
from hybridgen.serving.lifecycle.lifecycle import Lifecycle
from hybridgen.serving.lifecycle.ready_file import check_ready_file, remove_ready_file, write_ready_file
from hybridgen.serving.service.adapter import EngineModel, Model
from hybridgen.serving.service.limits import Limits
from hybridgen.serving.service.metrics import Metrics
from hybridgen.serving.service.service import Service
from hybridgen.serving.unix.address import Lease, socket_path
from hybridgen.serving.unix.server import DESCRIPTORS as SOCKET_DESCRIPTORS

logger = logging.getLogger(__name__)

JOIN_SECONDS = 10.0
"""How long the generator thread has to close the engine before the process ends without it."""
SWITCH_SECONDS = 0.0005
"""How long one thread may keep Python's lock while the other wants it (Python's own default is ten times as much)."""

SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""Each of them drains; the second aborts."""


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
    http: HttpOptions | None = None
    """How OpenAI's HTTP is spoken, by a process beside this one; None: it is not."""
    model: str | None = None
    """Whose tokenizer the HTTP door reads; None: the demo model's."""

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
    http: HttpChild | None = None
    endpoint: Endpoint | None = None
    handlers: dict[int, Any] = {}
    more = 0 if metrics is None else ENDPOINT_DESCRIPTORS
    require_descriptors(options.limits.clients + SOCKET_DESCRIPTORS + more)
    lease = Lease(socket_path(options.socket))  # before the model is loaded: what is wrong here should not cost that
    try:
        if options.ready_file is not None:
            check_ready_file(options.ready_file)
        if options.http is not None:
            http = HttpChild(options.model, options.http, lease.path)
        service = Service(
            load,
            limits=options.limits,
            step_seconds=options.step_seconds,
            on_done=(lambda done: None) if metrics is None else metrics.completed,
        )
        if metrics is not None and options.metrics is not None:
            endpoint = Endpoint(options.metrics, metrics)
            metrics.watch(service)
        life = Lifecycle(
            lease,
            service,
            step_seconds=options.step_seconds,
            drain_seconds=options.drain_seconds,
            idle_exit=options.idle_exit,
            endpoint=endpoint,
            on_ready=lambda: _announce(service, lease, options, endpoint, http, note),
        )
        if http is not None:
            http.watch(life.drain_soon, life.fail_soon)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, which is then meant
                # Not the loop's handlers, which go with it: another signal must not stop the cleaning up below.
                handlers[number] = signal.signal(number, lambda number, frame: life.signalled())
        sys.setswitchinterval(SWITCH_SECONDS)
        error = asyncio.run(life.run())
        service.generator.join(JOIN_SECONDS if service.description else 0.1)
    finally:
        if http is not None:
            http.close()
        if endpoint is not None:
            endpoint.close()
        if options.ready_file is not None:
            with suppress(ServerError):
                remove_ready_file(options.ready_file)
        lease.release()
        for handled, handler in handlers.items():
            signal.signal(handled, signal.SIG_DFL if handler is None else handler)
    if error is not None and not service.description and not service.generator.is_alive():
        raise error  # it could not be loaded
    note("hybridgen: ended" if error is None else f"hybridgen: ended: {error}")
    status = 0 if error is None else 1
    if service.generator.is_alive():
        # It loads, compiles or hangs, and the interpreter would wait for it or crash under it.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


def _announce(
    service: Service,
    lease: Lease,
    options: ServeOptions,
    endpoint: Endpoint | None,
    http: HttpChild | None,
    note: Callable[[str], None],
) -> None:
    # A full collection goes through all that imports and loading made: 0.3 s, in which no step is launched.
    gc.collect()
    gc.freeze()
    facts: dict[str, Any] = {"socket": str(lease.path), "pid": os.getpid()}
    if endpoint is not None:
        facts["metrics_port"] = endpoint.port
        note(f"hybridgen: metrics at http://127.0.0.1:{endpoint.port}/metrics")
    if http is not None:
        http.wait()  # it imports while the model loads
        facts["http"] = http.url
        note(f"hybridgen: OpenAI's protocol at {http.url}/v1")
    if options.ready_file is not None:
        write_ready_file(options.ready_file, json.dumps(facts) + "\n")
    note(f"hybridgen: serving {service.description['model']} at {lease.path}")
