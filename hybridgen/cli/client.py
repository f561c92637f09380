"""`hybridgen client`: text of a server's model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hybridgen.cli.jobs import Source, add_options, run_jobs
from hybridgen.cli.jsonl import Job
from hybridgen.cli.output import say_json
from hybridgen.errors import PromptError

if TYPE_CHECKING:
    from hybridgen.serving.client import Client


def add_command(commands: Any) -> None:
    """Add `client`."""
    parser = commands.add_parser("client", help="generate text in a server (hybridgen serve)")
    parser.set_defaults(run=run)
    parser.add_argument("--socket", metavar="PATH", help="where the server listens (default: as hybridgen serve)")
    parser.add_argument("--ping", action="store_true", help="print whether the server is alive; status 1 if it hangs")
    parser.add_argument("--shutdown", action="store_true", help="end the server when what is in flight has ended")
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="try again for so long while no server listens, such as one that is just being started (default: 0)",
    )
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate, ask how the server is, or end it; returns the exit status."""
    if not (arguments.ping or arguments.shutdown):
        return run_jobs(arguments, Source(_connect, _describe))
    if arguments.prompt or arguments.input or arguments.messages:
        raise PromptError("--ping and --shutdown take no prompts")
    with _connect([], arguments) as client:
        health = client.ping() if arguments.ping else {"healthy": True}
        if arguments.ping:
            say_json(health)
        if arguments.shutdown:
            client.shutdown()
    return int(not health["healthy"])


def _connect(jobs: list[Job], arguments: argparse.Namespace) -> Client:
    from hybridgen.serving.client import Client

    return Client(arguments.socket, patience=arguments.wait)


def _describe(arguments: argparse.Namespace) -> dict[str, Any]:
    with _connect([], arguments) as client:
        return {"model": client.server["model"]}
