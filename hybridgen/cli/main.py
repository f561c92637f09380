"""The `hybridgen` command: its parser, and the call of what was asked for."""

from __future__ import annotations

import io
import os
import sys

from hybridgen._version import __version__
from hybridgen.cli import cache, client, compare, doctor, generate, http, lm_eval, quantize, score, serve, shards
from hybridgen.cli.options import Parser
from hybridgen.cli.output import abandon, note
from hybridgen.errors import HybridgenError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_COMMANDS = (generate, score, serve, http, client, compare, lm_eval, quantize, cache, shards, doctor)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 (some requests failed), 2 (bad input) or 130 (Ctrl-C)."""
    if sys.stderr is None:  # closed: libraries ask it whether it is a terminal, and print() would take standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the encoding lacks is no reason to stop
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        note("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        abandon(sys.stdout)  # the reader of a pipe went away; nobody is left to tell
        abandon(sys.stderr)
        return EXIT_ERROR
    except HybridgenError as error:
        note(f"hybridgen: {error}")
        return EXIT_ERROR


def _parser() -> Parser:
    parser = Parser(prog="hybridgen", description="Generate text from Hugging Face causal models.")
    parser.add_argument("--version", action="version", version=f"hybridgen {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_command(commands)
    return parser
