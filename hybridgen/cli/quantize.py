"""`hybridgen quantize`: writes a checkpoint whose projections are quantised."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hybridgen.cli.options import add_engine, given
from hybridgen.cli.output import note, say
from hybridgen.config import EngineConfig

_FORMATS = ("ct-w4a16", "ct-fp8")
"""As in `hybridgen.loading.export`, which imports torch."""
_ENGINE = ("device", "revision", "trust_remote_code", "local_files_only")


def add_command(commands: Any) -> None:
    """Add `quantize`."""
    parser = commands.add_parser("quantize", help="write a checkpoint with quantised weights (compressed-tensors)")
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="local path or hub id of a checkpoint that is not quantised")
    parser.add_argument("output", type=Path, metavar="OUT", help="directory to write; must not be there, or be empty")
    parser.add_argument(
        "--format",
        required=True,
        choices=_FORMATS,
        help="ct-w4a16: four bits with a scale for a group of inputs; ct-fp8: FP8 with a scale for each output",
    )
    add_engine(parser, _ENGINE)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from hybridgen.loading.export import write_quantised

    config = EngineConfig(**given(arguments, _ENGINE))
    if arguments.format == "ct-w4a16":
        note("weights are rounded to the nearest code; for better texts calibrate them (AWQ, GPTQ)")
    written = write_quantised(arguments.model, arguments.output, arguments.format, config, note)
    if written.experts:
        note(f"{written.experts} weights of experts stay as they are; the other projections are quantised")
    say(
        f"{arguments.output}: {written.projections} projections in {arguments.format}, {written.bytes / 1e9:.2f} GB in "
        f"{written.files} file{'s' * (written.files > 1)}"
    )
    return 0
