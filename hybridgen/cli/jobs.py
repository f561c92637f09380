"""What `hybridgen generate` and `hybridgen client` share: prompts are read, run and reported."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from hybridgen.cli.chat import chat_of, is_chat
from hybridgen.cli.jsonl import Job, ResultFile, is_unicode, jobs_of, read_jobs, same_file, settings_of
from hybridgen.cli.options import SAMPLING, add_sampling, given
from hybridgen.cli.output import check_output_is_open, note
from hybridgen.cli.report import Report
from hybridgen.cli.shards import Shard, finish, open_directory, seeded
from hybridgen.errors import PromptError, SamplingError, shown
from hybridgen.serving.unix.messages import sampling_from_wire

if TYPE_CHECKING:
    from hybridgen.engine import Engine
    from hybridgen.serving.client import Client
    from hybridgen.serving.replicas.replicas import Replicas

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[0-9][\w.-]*")
"""What an owner and a model's name look like; nearly all names have a number."""
Generator: TypeAlias = "Engine | Client | Replicas"


class Source(NamedTuple):
    """Where tokens come from."""

    open: Callable[[list[Job], argparse.Namespace], Generator]
    describe: Callable[[argparse.Namespace], dict[str, Any]]
    """What a result file says of the model."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `generate` and `client` share: prompts, sampling, files, what is printed."""
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="prompts; without any (and without --input), standard input is one"
    )
    parser.add_argument(
        "--input",
        type=Path,
        help="JSONL or Parquet file: strings, or objects with prompt or messages, and sampling fields",
    )
    chat = parser.add_argument_group("chat")
    chat.add_argument("--chat", action="store_true", help="each prompt is what the user says in a chat")
    chat.add_argument("--system", metavar="TEXT", help="the system message of the chats; prompts are chats then")
    chat.add_argument(
        "--messages",
        type=Path,
        metavar="FILE",
        help="JSON file with the messages so far, or an object with messages and tools; a prompt is what the user says "
        "next; prompts are chats then",
    )
    parser.add_argument("--output", type=Path, help="JSONL file for the results; finished lines are not redone")
    parser.add_argument(
        "--on-error",
        choices=("skip", "stop"),
        default="stop",
        help="a prompt that cannot be run: skip makes it a result with an error (default: stop)",
    )
    parser.add_argument("--json", action="store_true", help="print results as JSON lines, also with --output")
    parser.add_argument(
        "--stream", action="store_true", help="print the text of one prompt as it comes; with --json, events"
    )
    parser.add_argument("--stats", action="store_true", help="print the engine's statistics to standard error")
    add_sampling(parser)


def run_jobs(arguments: argparse.Namespace, source: Source) -> int:
    """Generate for all prompts; returns the exit status.

    Raises:
        HybridgenError: input or files cannot be used, or what the source raises.
    """
    if arguments.output is None or arguments.json or arguments.stream:
        check_output_is_open("leave it open" if arguments.output else "name an --output")
    if not is_unicode(arguments.stop):
        raise PromptError("--stop is not text in this locale's encoding")
    jobs = _read_jobs(arguments)
    if arguments.logprobs is not None and not arguments.json and arguments.output is None:
        raise SamplingError("--logprobs are in results as JSON, not in plain text; add --json or --output FILE")
    if arguments.stream and not arguments.json and len(jobs) > 1:
        what = "prompt" if jobs[0].choice is None else "completion"
        raise PromptError(f"--stream prints the text of one {what} and there are {len(jobs)}; add --json for events")
    if getattr(arguments, "shard", None) is not None:
        return _run_shard(jobs, arguments, source)
    if arguments.output is None:
        return _complete(jobs, None, {}, arguments, source)
    return _resume(jobs, arguments.output, arguments, source)


def _run_shard(jobs: list[Job], arguments: argparse.Namespace, source: Source) -> int:
    """Generate a shard's share of the prompts into its file; returns the exit status."""
    shard, directory = Shard.parse(arguments.shard), arguments.output
    if arguments.input is None or directory is None:
        raise PromptError("--shard is for a file of prompts: give --input FILE and --output DIR")
    open_directory(directory)
    if shard.finished(directory).exists():
        note(f"{shard.finished(directory)} is there already")
        return 0
    own = [seeded(job, arguments.seed) for job in jobs if shard.has(job)]
    status = _resume(own, shard.part(directory), arguments, source)
    if status == 0 or arguments.on_error == "skip":  # an error is then a result, and the shard is done with it
        finish(shard, directory)
    return status


def _resume(jobs: list[Job], output: Path, arguments: argparse.Namespace, source: Source) -> int:
    """Generate what a file of results lacks; returns the exit status."""
    # Before a model is loaded: what is wrong with the file should not cost that.
    with closing(ResultFile(output)) as results:
        model = source.describe(arguments)
        todo = [job for job in jobs if not results.has(job, settings_of(job, model))]
        if len(todo) < len(jobs):
            note(f"{len(jobs) - len(todo)} of {len(jobs)} prompts are already in {output}")
        return _complete(todo, results, model, arguments, source) if todo else 0


def _complete(
    jobs: list[Job],
    results: ResultFile | None,
    model: dict[str, Any],
    arguments: argparse.Namespace,
    source: Source,
) -> int:
    """Open an engine or a client and generate; returns the exit status."""
    report = Report(results, model, arguments, many=len(jobs) > 1)
    for job in jobs:
        if job.problem is not None:
            report.failed(job, job.problem)
    jobs = [job for job in jobs if job.problem is None]
    if not jobs:
        return 1
    engine = source.open(jobs, arguments)
    with engine:
        _run(engine, jobs, report, arguments)
        if arguments.stats:
            stats = engine.stats()
            note(json.dumps(stats) if isinstance(stats, dict) else str(stats))
    return int(report.failures > 0)


def _run(engine: Generator, jobs: list[Job], report: Report, arguments: argparse.Namespace) -> None:
    """Generate and report each completion when it ends."""
    from tqdm.auto import tqdm

    disable = True if arguments.stream and not arguments.json else None
    with tqdm(total=len(jobs), desc="generate", unit="request", delay=1, disable=disable) as bar:
        errors = "return" if arguments.on_error == "skip" else "raise"
        prompts, sampling = [job.prompt for job in jobs], [job.sampling for job in jobs]
        for event in engine.stream(prompts, sampling, errors=errors):
            report.event(jobs[event.index], event)
            if event.completion is not None:
                bar.update()


def _prompts(arguments: argparse.Namespace) -> list[Any]:
    """The prompts that were given as arguments, as texts or chats."""
    if not is_chat(arguments):
        return list(arguments.prompt)
    return [chat_of(prompt, arguments) for prompt in arguments.prompt or [None]]


def _warn_of_a_path(prompt: str, model: str | None) -> None:
    """Say it where a prompt names a model or a file: other commands take those without a name."""
    try:
        path = Path(prompt)
        is_model, is_file = (path / "config.json").is_file(), path.is_file()
    except (OSError, ValueError):  # too long for a path, or no path at all
        return
    if is_model:
        note(f"hybridgen: warning: the prompt {shown(prompt)} is a model's directory; a model is given as --model PATH")
    elif is_file:
        note(f"hybridgen: warning: the prompt {shown(prompt)} is a file's name; prompts are read with --input FILE")
    elif model is None and _HUB_ID.fullmatch(prompt):
        note(f"hybridgen: warning: the prompt {shown(prompt)} looks like a hub id; a model is given as --model ID")


def _read_jobs(arguments: argparse.Namespace) -> list[Job]:
    fields = given(arguments, SAMPLING)
    if getattr(arguments, "shard", None) is not None:
        Shard.parse(arguments.shard)  # what is wrong with it should not cost reading a large file
        fields.pop("seed", None)  # each prompt gets one made of it
    if arguments.input is not None:
        if is_chat(arguments):
            raise PromptError("--chat, --system and --messages are for prompts; lines of --input have messages")
        if arguments.prompt:
            raise PromptError("give prompts as arguments or with --input, not both")
        if arguments.output is not None and same_file(arguments.input, arguments.output):
            raise PromptError(f"--output {arguments.output} is the --input file; name another")
        return read_jobs(arguments.input, fields, skip=arguments.on_error == "skip")
    params = sampling_from_wire(fields)
    if arguments.prompt or arguments.messages is not None:
        for index, prompt in enumerate(arguments.prompt):
            _warn_of_a_path(prompt, getattr(arguments, "named_model", None))
            if not is_unicode(prompt):
                raise PromptError(f"prompt {index} is not text in this locale's encoding")
        return [job for index, prompt in enumerate(_prompts(arguments)) for job in jobs_of(index, prompt, params)]
    if sys.stdin is None or sys.stdin.isatty():
        raise PromptError('no prompt; try: hybridgen generate "def fibonacci(n):"')
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not {error.encoding} text: {error}") from error
    if not is_unicode(text):
        raise PromptError("standard input is not text in this locale's encoding")
    text = text.removeprefix("\ufeff")  # an editor's byte order mark
    if not text:
        raise PromptError("standard input is empty; give a prompt")
    return jobs_of(0, chat_of(text, arguments) if is_chat(arguments) else text, params)
