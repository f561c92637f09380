"""The command line: one file a command.

main      the parser and the call of a command
generate, client, serve, compare, cache, doctor
          the commands: `add_command` adds one to the parser, with its options and the function that runs it
options   options that several commands share
jobs      what `generate` and `client` share: prompts are read, run and reported
chat      prompts that are chats
report    what they print and write of a run
jsonl     their files
output    printing
imports   what an engine needs, for those that load a model
"""

from hybridgen.cli.main import main

__all__ = ["main"]
