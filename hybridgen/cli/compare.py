"""`hybridgen compare`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hybridgen.cli.options import add_engine, add_model, given, model_of
from hybridgen.cli.output import check_output_is_open, say
from hybridgen.comparison.data.config import BASELINES, SMOKE, CompareConfig
from hybridgen.config import EngineConfig
from hybridgen.errors import ConfigError

_LISTS = ("modes", "prompt_lengths", "batch_sizes", "baselines")
_NUMBERS = ("new_tokens", "temperature", "budget", "tolerance", "repeats", "min_repeats", "warm_up", "seed")
_ENGINE = ("dtype", "device", "revision", "trust_remote_code")


def add_command(commands: Any) -> None:
    """Add `compare`. What is not given has the default of `CompareConfig`, or of the config that is run again."""
    defaults = CompareConfig()
    parser = commands.add_parser("compare", help="run the same prompts in every mode, and report")
    parser.set_defaults(run=run)
    add_model(parser)
    parser.add_argument("--modes", nargs="+", metavar="MODE", help=f"default: {' '.join(defaults.modes)}")
    parser.add_argument("--prompt-lengths", nargs="+", type=int, metavar="N", help="tokens of a prompt")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="prompts of a call")
    parser.add_argument("--new-tokens", type=int, metavar="N", help=f"default: {defaults.new_tokens}")
    parser.add_argument("--temperature", type=float, help="default: 0, greedy")
    parser.add_argument("--baselines", nargs="*", metavar="NAME", help=f"also run: {', '.join(BASELINES)}")
    parser.add_argument("--ablate", action="store_true", default=None, help="also hybrid with each switch off alone")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help=f"of measured calls (default: {defaults.budget:g})"
    )
    parser.add_argument("--tolerance", type=float, metavar="SHARE", help="of the medians' confidence intervals (0.02)")
    parser.add_argument("--repeats", type=int, metavar="N", help="measured calls of a cell at most")
    parser.add_argument("--min-repeats", type=int, metavar="N", help="measured calls of a cell at least")
    parser.add_argument("--warm-up", type=int, metavar="N", help="calls of a cell before them")
    parser.add_argument("--seed", type=int, help="of prompts, order and draws")
    parser.add_argument("--in-turn", action="store_true", help="one engine after the other: less memory")
    parser.add_argument("--shared-compile", action="store_true", help="do not compile each mode from an empty cache")
    parser.add_argument("--no-utilisation", action="store_true", help="do not profile how busy the GPU is")
    parser.add_argument(
        "--engine", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of EngineConfig, for every engine"
    )
    add_engine(parser, _ENGINE)
    parser.add_argument("--config", type=Path, metavar="JSON", help="run a comparison.json's config and model again")
    parser.add_argument("--smoke", action="store_true", help="a small run: all modes in under two minutes on two cores")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for comparison.{json,csv,md,html} and plots")


def config_of(arguments: argparse.Namespace) -> tuple[str | None, CompareConfig]:
    """The model and the config that the options ask for.

    Raises:
        ConfigError: options contradict each other, or a value is wrong.
    """
    model, config = model_of(arguments), CompareConfig()
    if arguments.smoke and arguments.config is not None:
        raise ConfigError("--smoke and --config each say what to run; give one of them")
    if arguments.smoke:
        config = SMOKE
    if arguments.config is not None:
        from hybridgen.comparison.results import read

        earlier = read(arguments.config)
        config = earlier.config
        if model is None and earlier.live:
            raise ConfigError(f"{arguments.config} compared a module in memory ({earlier.model}); name a MODEL")
        model = earlier.source if model is None else model
    changes = given(arguments, (*_LISTS, *_NUMBERS, "ablate"))
    for option, name in (
        ("in_turn", "together"),
        ("shared_compile", "fresh_compile"),
        ("no_utilisation", "utilisation"),
    ):
        if getattr(arguments, option):
            changes[name] = False
    fields = given(arguments, _ENGINE) | dict(_field(text) for text in arguments.engine)
    if fields:
        changes["engine"] = {**config.engine, **fields}
    return model, config.replace(**changes)


def _field(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is some, else as text."""
    name, sign, value = text.partition("=")
    if not sign or name not in EngineConfig.field_names():
        raise ConfigError(f"--engine {text!r} is no FIELD=VALUE with a field of EngineConfig; try page_size=32")
    try:
        return name, json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
    except ValueError:
        return name, value


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison and print its tables; returns the exit status: 1 when a cell failed.

    Raises:
        HybridgenError: as `hybridgen.compare` does.
    """
    check_output_is_open()
    from hybridgen.comparison.render.report import check_tabulate
    from hybridgen.comparison.run import run_comparison

    check_tabulate()
    model, config = config_of(arguments)
    if arguments.smoke:
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # the demo model is small: threads would only wait for each other
    comparison = run_comparison(model, config, output=arguments.output)
    failed = any(cell.status in ("failed", "out of memory") for cell in comparison.cells)
    text = str(comparison)
    if arguments.output is not None:
        text += f"\nWritten to {arguments.output}."
    say(text)
    return int(failed)
