"""`hybridgen lm-eval`: lm-evaluation-harness with a model that this library runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hybridgen.cli.options import ENGINE, add_engine, add_model, given, model_of
from hybridgen.errors import ConfigError, shown


def add_command(commands: Any) -> None:
    """Add `lm-eval`."""
    parser = commands.add_parser(
        "lm-eval",
        help="evaluate with lm-evaluation-harness",
        description="Options below are of the model; all others, such as --tasks, go to lm-evaluation-harness.",
        allow_abbrev=False,
    )
    parser.passes_on = True
    parser.set_defaults(run=run)
    add_model(parser, positional=False)
    add_engine(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; returns the exit status."""
    from hybridgen.integrations.lm_eval import NAME

    options = given(arguments, ENGINE)
    device = options.pop("device", "auto")  # the harness has one of its own, which is the first GPU where none is given
    model = model_of(arguments)
    if model is not None:
        options = {"pretrained": model, **options}
    for name, value in options.items():
        if isinstance(value, str) and set(value) & set(",="):
            raise ConfigError(f"{name}={shown(value)} has a comma or an equals sign, which the harness cannot take")
    from lm_eval.__main__ import cli_evaluate

    named = ",".join(f"{name}={value}" for name, value in options.items())
    before = sys.argv
    sys.argv = ["lm-eval", "run", "--model", NAME, "--device", device]
    sys.argv += [*(["--model_args", named] if named else []), *arguments.rest]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
