"""Shards: many processes or machines, each with its share of one input and a file of its own in one directory."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hybridgen.cli.jsonl import Job
from hybridgen.cli.output import note
from hybridgen.errors import PromptError, shown
from hybridgen.params import choice_seed, row_seed

_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})", re.A)
_FINISHED = re.compile(r"shard-([0-9]+)-of-([0-9]+)\.jsonl", re.A)


class Shard(NamedTuple):
    """One share of an input."""

    place: int
    """From 0."""
    of_all: int
    """How many there are."""

    @classmethod
    def parse(cls, text: str) -> Shard:
        """What `--shard i/n` stands for.

        Raises:
            PromptError: it is not two numbers, or `i` is not from 0 to `n - 1`.
        """
        found = _SHARD.fullmatch(text)
        if found is None:
            raise PromptError(f"--shard {shown(text)} is not i/n; give 0/4 for the first of four")
        index, count = int(found[1]), int(found[2])
        if not index < count:
            raise PromptError(f"--shard {text}: there is no such shard; i is from 0 to n - 1, so n is at least 1")
        return cls(index, count)

    def has(self, job: Job) -> bool:
        """Whether a prompt is in this share. It goes by the id alone, so that all shards agree without talking."""
        return _hash("shard", job.id) % self.of_all == self.place

    def finished(self, directory: Path) -> Path:
        """The file of a shard that is done."""
        return directory / f"shard-{self.place:05d}-of-{self.of_all:05d}.jsonl"

    def part(self, directory: Path) -> Path:
        """The file of a shard that is not done: a run that is begun again goes on with it."""
        return self.finished(directory).with_suffix(".part")


def seeded(job: Job, seed: int | None) -> Job:
    """A job whose draws depend on the run's seed and its own id, not on which shard or try runs it.

    A seed of its line is left as it is.
    """
    if job.sampling.seed is not None or job.problem is not None:
        return job
    own = choice_seed(row_seed(seed, job.id), job.choice or 0)
    return job._replace(sampling=replace(job.sampling, seed=own))


def _hash(what: Any, id: Any) -> int:
    """64 bits that are the same on every machine."""
    text = json.dumps([what, id], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def open_directory(path: Path) -> None:
    """Make the directory of the shards, if it is not there.

    Raises:
        PromptError: it cannot be made or written to, or is no directory.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PromptError(f"--output {path} cannot be a directory of shards: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PromptError(f"--output {path} cannot be written to; choose a directory of yours")


def finish(shard: Shard, directory: Path) -> None:
    """Give the file of a shard that is done its name, whole or not at all.

    Raises:
        PromptError: it cannot be renamed.
    """
    part = shard.part(directory)
    try:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, shard.finished(directory))
    except OSError as error:
        raise PromptError(f"{part} cannot be renamed: {error.strerror}") from error


def add_command(commands: Any) -> None:
    """Add `merge`."""
    parser = commands.add_parser("merge", help="make one file of finished shards")
    parser.set_defaults(run=run)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the --output of `generate --shard`")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file for all results; must not be there")


def run(arguments: argparse.Namespace) -> int:
    """Merge; returns the exit status.

    Raises:
        PromptError: a shard is missing, two have one result, or a file cannot be used.
    """
    directory, output = arguments.directory, arguments.output
    if output.exists():
        raise PromptError(f"--output {output} is there already; name another")
    files = _files(directory)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as target:
            for line in _lines(files):
                target.write(line)
                count += 1
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, output)
    except OSError as error:
        raise PromptError(f"{error.filename or output} cannot be used: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    note(f"hybridgen: {count} results of {len(files)} shards in {output}")
    return 0


def _files(directory: Path) -> list[Path]:
    """The shards' files, in order; all of them must be there."""
    try:
        found = {path: _FINISHED.fullmatch(path.name) for path in sorted(directory.iterdir())}
    except OSError as error:
        raise PromptError(f"{directory} cannot be read: {error.strerror}") from error
    shards = {path: Shard(int(match[1]), int(match[2])) for path, match in found.items() if match is not None}
    counts = {shard.of_all for shard in shards.values()}
    if len(counts) != 1:
        raise PromptError(
            f"{directory} has {'shards of different numbers' if counts else 'no finished shard'}; give the --output of "
            "`hybridgen generate --shard`, with one n"
        )
    (count,) = counts
    missing = sorted(set(range(count)) - {shard.place for shard in shards.values()})
    if missing:
        some = ", ".join(f"{index}/{count}" for index in missing[:8]) + (" and more" if len(missing) > 8 else "")
        raise PromptError(
            f"{directory} lacks shards that are done: {some}; run them (again), they go on where they were"
        )
    return list(shards)


def _lines(files: list[Path]) -> Iterator[str]:
    """All results. Of a result that was tried again, the last line counts."""
    for path in files:
        last: dict[str, str] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line:
                continue
            try:
                record = json.loads(line)
                key = Job(record["id"], None, choice=record.get("choice")).key
            except (ValueError, KeyError, TypeError) as error:
                raise PromptError(f"{path}:{number} is not a result of this command") from error
            last[key] = line
        yield from (line + "\n" for line in last.values())
