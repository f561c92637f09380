"""`hybridgen serve`: a process that keeps a model loaded."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridgen.cli import http
from hybridgen.cli.imports import import_engine
from hybridgen.cli.options import ENGINE, add_engine, add_model, given, model_of
from hybridgen.cli.output import note
from hybridgen.config import EngineConfig

if TYPE_CHECKING:
    from hybridgen.engine import Engine
    from hybridgen.serving.process import ServeOptions

_LIMITS = {
    "frame": "bytes of one message to the server",
    "prompt_chars": "characters of one prompt",
    "n": "completions of one prompt",
    "batch": "prompts of one request",
    "queue": "completions that run or wait",
    "clients": "connections",
}
"""Fields of `hybridgen.serving.service.limits.Limits` that are options."""


def add_command(commands: Any) -> None:
    """Add `serve`."""
    parser = commands.add_parser("serve", help="keep a model loaded for clients on a Unix socket")
    parser.set_defaults(run=run)
    add_model(parser)
    parser.add_argument("--socket", metavar="PATH", help="where to listen (default: in $XDG_RUNTIME_DIR/hybridgen)")
    parser.add_argument("--idle-exit", type=float, metavar="SECONDS", help="end after this long without a request")
    parser.add_argument("--ready-file", type=Path, metavar="PATH", help="written when it listens, removed when it ends")
    parser.add_argument(
        "--metrics", type=int, metavar="PORT", help="Prometheus metrics on localhost (0: any free port)"
    )
    parser.add_argument("--drain-timeout", type=float, metavar="SECONDS", help="for requests in flight when it ends")
    parser.add_argument("--step-timeout", type=float, metavar="SECONDS", help="a step that takes longer hangs")
    parser.add_argument("--http", metavar="HOST:PORT", help="speak OpenAI's protocol there too (port 0: any free one)")
    http.add_options(parser)
    for name, what in _LIMITS.items():
        parser.add_argument(f"--limit-{name.replace('_', '-')}", type=int, metavar="N", help=what)
    parser.add_argument(
        "--replicas", metavar="N", help="serve with N processes, one for each GPU (all: as many as there are GPUs)"
    )
    add_engine(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until it ends; returns the exit status."""
    from hybridgen.serving.process import ServeOptions, serve
    from hybridgen.serving.service.limits import Limits

    model, config = model_of(arguments), EngineConfig.of(None, given(arguments, ENGINE))
    limits = {name: getattr(arguments, f"limit_{name}") for name in _LIMITS}
    seconds = {"drain_seconds": arguments.drain_timeout, "step_seconds": arguments.step_timeout}
    options = ServeOptions(
        socket=arguments.socket,
        idle_exit=arguments.idle_exit,
        ready_file=arguments.ready_file,
        metrics=arguments.metrics,
        http=None if arguments.http is None else http.options_of(arguments, arguments.http),
        model=model,
        limits=Limits(**{name: value for name, value in limits.items() if value is not None}),
        **{name: value for name, value in seconds.items() if value is not None},
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("hybridgen").setLevel(logging.INFO)

    if arguments.replicas is not None:
        return _serve_replicas(arguments, model, config, options)

    def load() -> Engine:
        import_engine()
        from hybridgen.engine import Engine

        return Engine.load(model, config)

    return serve(load, options, note)


def _serve_replicas(
    arguments: argparse.Namespace, model: str | None, config: EngineConfig, options: ServeOptions
) -> int:
    from hybridgen.serving.process import serve_model
    from hybridgen.serving.replicas.model import ReplicasModel
    from hybridgen.serving.replicas.replicas import Replicas, replicas_of

    count = replicas_of(arguments.replicas)
    return serve_model(lambda: ReplicasModel(lambda: Replicas(model, count, config)), options, note)
