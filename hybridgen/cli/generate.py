"""`hybridgen generate`: text of a model that this process loads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hybridgen.cli.imports import import_engine
from hybridgen.cli.jobs import Source, add_options, run_jobs
from hybridgen.cli.jsonl import Job, model_settings
from hybridgen.cli.options import ENGINE, add_engine, add_model, given, model_of

if TYPE_CHECKING:
    from hybridgen.engine import Engine
    from hybridgen.serving.replicas.replicas import Replicas


def add_command(commands: Any) -> None:
    """Add `generate`."""
    parser = commands.add_parser("generate", help="generate text")
    parser.set_defaults(run=run)
    add_model(parser, positional=False)
    add_options(parser)
    parser.add_argument(
        "--replicas", metavar="N", help="generate with N processes, one for each GPU (all: as many as there are GPUs)"
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="only the prompts of one share of N, into a file of its own in the directory --output",
    )
    add_engine(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate; returns the exit status."""
    return run_jobs(arguments, Source(_load, _describe))


def _load(jobs: list[Job], arguments: argparse.Namespace) -> Engine | Replicas:
    fields = given(arguments, ENGINE)
    if arguments.replicas is not None:
        from hybridgen.serving.replicas.replicas import Replicas, replicas_of

        return Replicas(model_of(arguments), replicas_of(arguments.replicas), **fields)
    import_engine()
    from hybridgen.api import prepare

    errors = "return" if arguments.on_error == "skip" else "raise"
    prompts, sampling = [job.prompt for job in jobs], [job.sampling for job in jobs]
    return prepare(model_of(arguments), prompts, sampling, None, None, fields, errors)[0]


def _describe(arguments: argparse.Namespace) -> dict[str, Any]:
    return model_settings(model_of(arguments), **{name: getattr(arguments, name) for name in ("revision", "dtype")})
