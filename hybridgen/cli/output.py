"""Printing: results on standard output, notes on standard error, whatever became of the two."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from hybridgen.errors import HybridgenError


def check_output_is_open(hint: str = "leave it open") -> None:
    """Raise if there is no standard output.

    Args:
        hint: what to do about it.

    Raises:
        HybridgenError: it is closed.
    """
    if sys.stdout is None:
        raise HybridgenError(f"standard output is closed; {hint}")


def say_json(value: Any) -> None:
    """Print one line of JSON, with escapes for what standard output's encoding lacks."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    say(line)


def say(text: str, end: str = "\n") -> None:
    """Print on standard output, at once."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon(sys.stdout)
        raise HybridgenError(f"standard output cannot be written: {error.strerror}") from error


def note(text: str) -> None:
    """Print on standard error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it: no reason to stop
        abandon(sys.stderr)


def abandon(stream: TextIO | None) -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not fail on it when it exits."""
    with suppress(AttributeError, OSError, ValueError):  # None, or no file underneath
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)
