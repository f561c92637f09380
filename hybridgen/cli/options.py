"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from hybridgen.config import Mode

ENGINE: Mapping[str, Mapping[str, Any]] = {
    "mode": {"help": ", ".join(Mode)},
    "dtype": {"help": "auto, float32, bfloat16 or float16"},
    "device": {"help": "auto, cpu, cuda or cuda:N"},
    "revision": {"help": "branch, tag or commit of a hub model"},
    "trust_remote_code": {"action": "store_true", "default": None},
    "max_batch": {"type": int, "help": "requests that run at once"},
    "max_context": {"type": int, "help": "longest prompt plus output, in tokens"},
    "kv_memory": {"help": 'bytes for the KV cache, such as "4GiB"'},
}
"""Fields of `EngineConfig` that are options, and how argparse reads them."""
SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "max_new_tokens": {"type": int},
    "temperature": {"type": float, "help": "0 is greedy"},
    "top_k": {"type": int},
    "top_p": {"type": float},
    "min_p": {"type": float},
    "seed": {"type": int},
    "stop": {"action": "append", "help": "a string that ends the text; may be given again"},
}
"""Fields of `SamplingParams` that are options."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model as the first argument without a name."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="local path or hub id (default: the demo model)")


def add_fields(
    parser: argparse.ArgumentParser, table: Mapping[str, Mapping[str, Any]], names: Iterable[str] | None = None
) -> None:
    """Add options of a table: all, or these."""
    for name in table if names is None else names:
        parser.add_argument(f"--{name.replace('_', '-')}", **table[name])


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options that were given, by the names of their fields."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
