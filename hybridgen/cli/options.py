"""The parser of commands, and options that several of them share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from hybridgen.config import EngineConfig
from hybridgen.errors import ConfigError
from hybridgen.hints import HINTS
from hybridgen.params import SamplingParams

ENGINE = (
    "mode",
    "dtype",
    "quantization",
    "quantize_head",
    "device",
    "revision",
    "trust_remote_code",
    "max_batch",
    "max_context",
    "kv_memory",
    "kv_dtype",
    "speculation",
    "tensor_parallel",
    "drafter",
)
"""Fields of `EngineConfig` that are options of every command that loads a model."""
SAMPLING = tuple(each.name for each in dataclasses.fields(SamplingParams) if not each.metadata.get("functions"))
"""Fields of `SamplingParams` that are options: all but those that hold functions."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors show its own usage, and which takes prompts and options in any order.

    argparse leaves what a command does not know to the parser above it, which then shows the usage of all commands.
    """

    passes_on = False
    """Whether what is not known is left for another command, as `rest`."""
    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; none are left."""
        if self._inside or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            found, left = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False
        if self.passes_on:
            found.rest = left
        elif left:
            hint = HINTS.get(left[0].removeprefix("--").partition("=")[0].replace("-", "_"))
            if hint is not None:
                hint = re.sub(r"\b([a-z_]+)=", lambda found: f"--{found[1].replace('_', '-')} ", hint).strip()
            self.error(f"unknown: {' '.join(left)}; {hint or f'{self.prog} --help lists all options'}")
        return found, []

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error; status 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"hybridgen: {message}\n")

    def format_usage(self) -> str:
        """One line: the options are many, and the help below it has them."""
        self.usage = self.usage or self._usage()
        return super().format_usage()

    def format_help(self) -> str:
        """The usage in one line, and all arguments."""
        self.usage = self.usage or self._usage()
        return super().format_help()

    def _usage(self) -> str:
        forms = {"?": "[{}]", "*": "[{} ...]", argparse.PARSER: "{} ..."}
        names = [
            forms.get(str(action.nargs), "{}").format(action.metavar or action.dest)
            for action in self._actions
            if not action.option_strings
        ]
        return " ".join([self.prog, "[options]", *names])


def add_model(parser: argparse.ArgumentParser, *, positional: bool = True, default: str = "the demo model") -> None:
    """Add the model: `--model`, and as the first argument where there are no prompts.

    Args:
        default: what is taken when none is given, in words.
    """
    about = f"local path or hub id (default: {default})"
    if positional:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=about)
    parser.add_argument("--model", dest="named_model", metavar="MODEL", help=f"{about}{', as above' * positional}")


def model_of(arguments: argparse.Namespace) -> str | None:
    """The model that was given.

    Raises:
        ConfigError: two were.
    """
    first, named = getattr(arguments, "model", None), arguments.named_model
    if first is not None and named is not None:
        raise ConfigError(f"two models are given: {first} and --model {named}; give one")
    return first if named is None else named


def add_fields(parser: argparse.ArgumentParser, owner: type, names: Iterable[str], title: str | None = None) -> None:
    """Add options for fields of a dataclass, as their types and descriptions say.

    Numbers and texts are taken as they are, a switch that is off has `--name` and one that is on `--no-name`, a list of
    texts is given text by text, and any other list or object as JSON.

    Args:
        owner: the dataclass; its fields have `metadata=about(...)`.
        title: of the group that they stand in.
    """
    group = parser if title is None else parser.add_argument_group(title)
    fields = {each.name: each for each in dataclasses.fields(owner)}
    hints = typing.get_type_hints(owner)
    for name in names:
        field, option = fields[name], name.replace("_", "-")
        text = field.metadata["about"].replace("%", "%%")
        kinds = _kinds(hints[name])
        if kinds == [bool]:
            on = bool(field.default)
            group.add_argument(
                f"--no-{option}" if on else f"--{option}", dest=name, action="store_const", const=not on, help=text
            )
        elif kinds in ([int], [float]):
            group.add_argument(f"--{option}", type=kinds[0], metavar="N" if kinds == [int] else "X", help=text)
        elif str in kinds:
            group.add_argument(f"--{option}", metavar="TEXT", help=text)
        elif kinds == [Sequence[str]]:
            group.add_argument(f"--{option}", action="append", metavar="TEXT", help=f"{text} May be given again.")
        else:
            group.add_argument(f"--{option}", type=_json, metavar="JSON", help=text)


def _kinds(hint: Any) -> list[Any]:
    """The members of a union but for None, or the one type."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [kind for kind in members if kind is not type(None)]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}; write a list as [1, 2]") from None


def add_engine(parser: argparse.ArgumentParser, names: Iterable[str] = ENGINE) -> None:
    """Add options for fields of `EngineConfig`."""
    add_fields(parser, EngineConfig, names, "how the model is loaded and run")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of `SamplingParams` that holds no functions."""
    add_fields(parser, SamplingParams, SAMPLING, "sampling")


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options that were given, by the names of their fields."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
