"""The command line: one file a command; `main` has the parser and the commands that are short."""

from hybridgen.cli.main import main

__all__ = ["main"]
