"""The `hybridgen` command."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hybridgen.cli.cache import add_cache_commands
from hybridgen.cli.compare import add_options as add_compare_options
from hybridgen.cli.jsonl import (
    Job,
    ResultFile,
    failure,
    is_unicode,
    model_settings,
    read_jobs,
    result,
    same_file,
    settings_of,
)
from hybridgen.config import Mode
from hybridgen.errors import HybridgenError, PromptError, SamplingError, TokenizerError
from hybridgen.serving.unix.messages import sampling_from_wire

if TYPE_CHECKING:
    from hybridgen.core import Completion, TokenEvent
    from hybridgen.engine import Engine
    from hybridgen.serving.client import Client

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_LIMITS = {
    "frame": "bytes of one message to the server",
    "prompt_chars": "characters of one prompt",
    "n": "completions of one prompt",
    "batch": "prompts of one request",
    "queue": "completions that run or wait",
    "clients": "connections",
}
"""Fields of `hybridgen.serving.service.limits.Limits` that are options."""
_ENGINE_OPTIONS = (
    "mode", "dtype", "device", "revision", "trust_remote_code", "max_batch", "max_context", "kv_memory",
)  # fmt: skip
_SAMPLING_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
_REFUSED = (PromptError, SamplingError, TokenizerError)
"""What a prompt is refused with before it runs."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 (some requests failed), 2 (bad input) or 130 (Ctrl-C)."""
    if sys.stderr is None:  # closed: libraries ask it whether it is a terminal, and print() would take standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the encoding lacks is no reason to stop
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        _note("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _abandon(sys.stdout)  # the reader of a pipe went away; nobody is left to tell
        _abandon(sys.stderr)
        return EXIT_ERROR
    except HybridgenError as error:
        _note(f"hybridgen: {error}")
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hybridgen", description="Generate text from Hugging Face causal models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="generate text")
    generate.set_defaults(run=_generate, open=_load, describe=_local_model)
    generate.add_argument("--model", help="local path or hub id (default: the demo model)")
    _add_engine_options(generate)
    _add_generate_options(generate)
    serve = commands.add_parser("serve", help="keep a model loaded for clients on a Unix socket")
    serve.set_defaults(run=_serve)
    serve.add_argument("model", nargs="?", metavar="MODEL", help="local path or hub id (default: the demo model)")
    _add_engine_options(serve)
    serve.add_argument("--socket", metavar="PATH", help="where to listen (default: in $XDG_RUNTIME_DIR/hybridgen)")
    serve.add_argument("--idle-exit", type=float, metavar="SECONDS", help="end after this long without a request")
    serve.add_argument("--ready-file", type=Path, metavar="PATH", help="written when it listens, removed when it ends")
    serve.add_argument("--metrics", type=int, metavar="PORT", help="Prometheus metrics on localhost (0: any free port)")
    serve.add_argument("--drain-timeout", type=float, metavar="SECONDS", help="for requests in flight when it ends")
    serve.add_argument("--step-timeout", type=float, metavar="SECONDS", help="a step that takes longer hangs")
    for name, what in _LIMITS.items():
        serve.add_argument(f"--limit-{name.replace('_', '-')}", type=int, metavar="N", help=what)
    client = commands.add_parser("client", help="generate text in a server (hybridgen serve)")
    client.set_defaults(run=_client, open=_connect, describe=_server_model)
    client.add_argument("--socket", metavar="PATH", help="where the server listens (default: as hybridgen serve)")
    client.add_argument("--ping", action="store_true", help="print whether the server is alive; status 1 if it hangs")
    client.add_argument("--shutdown", action="store_true", help="end the server when what is in flight has ended")
    _add_generate_options(client)
    compare = commands.add_parser("compare", help="run the same prompts in every mode, and report")
    compare.set_defaults(run=_compare)
    add_compare_options(compare)
    add_cache_commands(commands, _add_engine_options)
    doctor = commands.add_parser("doctor", help="say what this machine can do, and why not")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--model", help="also load this model (path or hub id) and go through docs/production.md")
    _add_engine_options(doctor)
    return parser


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", help=", ".join(Mode))
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--trust-remote-code", action="store_true", default=None)
    parser.add_argument("--max-batch", type=int, help="requests that run at once")
    parser.add_argument("--max-context", type=int, help="longest prompt plus output, in tokens")
    parser.add_argument("--kv-memory", help='bytes for the KV cache, such as "4GiB"')


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="prompts; without any (and without --input), standard input is one")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", help="a string that ends the text; may be given again")
    parser.add_argument(
        "--input", type=Path, help="JSONL file: strings, or objects with prompt or messages, and sampling fields"
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


def _generate(arguments: argparse.Namespace) -> int:
    if sys.stdout is None and (arguments.output is None or arguments.json or arguments.stream):
        raise HybridgenError(
            f"standard output is closed; {'leave it open' if arguments.output else 'name an --output'}"
        )
    if not is_unicode(arguments.stop):
        raise PromptError("--stop is not text in this locale's encoding")
    jobs = _read_jobs(arguments)
    if arguments.stream and not arguments.json and len(jobs) > 1:
        raise PromptError(f"--stream prints the text of one prompt and there are {len(jobs)}; add --json for events")
    if arguments.output is None:
        return _complete(jobs, None, {}, arguments)
    # Before a model is loaded: what is wrong with the file should not cost that.
    with closing(ResultFile(arguments.output)) as results:
        model = arguments.describe(arguments)
        todo = [job for job in jobs if not results.has(job, settings_of(job, model))]
        if len(todo) < len(jobs):
            _note(f"{len(jobs) - len(todo)} of {len(jobs)} prompts are already in {arguments.output}")
        return _complete(todo, results, model, arguments) if todo else 0


def _complete(jobs: list[Job], results: ResultFile | None, model: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Open an engine or a client and generate; returns the exit status."""
    report = _Report(results, model, arguments, many=len(jobs) > 1)
    for job in jobs:
        if job.problem is not None:
            report.failed(job, job.problem)
    jobs = [job for job in jobs if job.problem is None]
    if not jobs:
        return 1
    engine = arguments.open(jobs, arguments)
    with engine:
        _run(engine, jobs, report, arguments)
        if arguments.stats:
            stats = engine.stats()
            _note(json.dumps(stats) if isinstance(stats, dict) else str(stats))
    return int(report.failures > 0)


def _load(jobs: list[Job], arguments: argparse.Namespace) -> Engine:
    fields = _given(arguments, _ENGINE_OPTIONS)
    if arguments.on_error == "skip":  # prompts are checked one by one, once it is loaded
        from hybridgen.telemetry import import_time as importing

        importing.engine()
        from hybridgen.engine import Engine

        return Engine.load(arguments.model, **fields)
    from hybridgen.api import prepare

    prompts, sampling = [job.prompt for job in jobs], [job.sampling for job in jobs]
    return prepare(arguments.model, prompts, sampling, None, None, fields)[0]


def _connect(jobs: list[Job], arguments: argparse.Namespace) -> Client:
    from hybridgen.serving.client import Client

    return Client(arguments.socket)


def _local_model(arguments: argparse.Namespace) -> dict[str, Any]:
    return model_settings(arguments.model, **{name: getattr(arguments, name) for name in ("revision", "dtype")})


def _server_model(arguments: argparse.Namespace) -> dict[str, Any]:
    with _connect([], arguments) as client:
        return {"model": client.server["model"]}


def _client(arguments: argparse.Namespace) -> int:
    if not (arguments.ping or arguments.shutdown):
        return _generate(arguments)
    if arguments.prompt or arguments.input:
        raise PromptError("--ping and --shutdown take no prompts")
    with _connect([], arguments) as client:
        health = client.ping() if arguments.ping else {"healthy": True}
        if arguments.ping:
            _print_json(health)
        if arguments.shutdown:
            client.shutdown()
    return int(not health["healthy"])


def _serve(arguments: argparse.Namespace) -> int:
    from hybridgen.config import EngineConfig
    from hybridgen.serving.process import ServeOptions, serve
    from hybridgen.serving.service.limits import Limits

    config = EngineConfig.of(None, _given(arguments, _ENGINE_OPTIONS))
    limits = {name: getattr(arguments, f"limit_{name}") for name in _LIMITS}
    seconds = {"drain_seconds": arguments.drain_timeout, "step_seconds": arguments.step_timeout}
    options = ServeOptions(
        socket=arguments.socket,
        idle_exit=arguments.idle_exit,
        ready_file=arguments.ready_file,
        metrics=arguments.metrics,
        limits=Limits(**{name: value for name, value in limits.items() if value is not None}),
        **{name: value for name, value in seconds.items() if value is not None},
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("hybridgen").setLevel(logging.INFO)

    def load() -> Engine:
        from hybridgen.engine import Engine

        return Engine.load(arguments.model, config)

    return serve(load, options, _note)


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """The options that were given, by their names in `EngineConfig` or `SamplingParams`."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}


def _run(engine: Engine | Client, jobs: list[Job], report: _Report, arguments: argparse.Namespace) -> None:
    """Generate and report each completion when it ends."""
    from tqdm.auto import tqdm

    disable = True if arguments.stream and not arguments.json else None
    with tqdm(total=len(jobs), desc="generate", unit="request", delay=1, disable=disable) as bar:
        waiting = [jobs if arguments.on_error == "stop" else _runnable(engine, jobs, report)]
        while waiting:
            some = waiting.pop()
            ended: set[int] = set()
            try:
                for event in engine.stream([job.prompt for job in some], [job.sampling for job in some]):
                    report.event(some[event.index], event)
                    if event.completion is not None:
                        ended.add(event.index)
                        bar.update()
            except _REFUSED as error:
                if arguments.on_error == "stop":
                    raise
                left = [job for index, job in enumerate(some) if index not in ended]
                if len(left) == 1:
                    report.failed(left[0], _about(left[0], error))
                else:  # a server refuses a request as a whole: look for the prompt
                    waiting += [left[len(left) // 2 :], left[: len(left) // 2]]


def _runnable(engine: Engine | Client, jobs: list[Job], report: _Report) -> list[Job]:
    """The jobs that an engine takes; the others are reported. A server is asked by running them."""
    plan = getattr(engine, "plan", None)
    if plan is None:
        return jobs
    found = []
    for job in jobs:
        try:
            plan([job.prompt], [job.sampling], {})
        except _REFUSED as error:
            report.failed(job, _about(job, error))
        else:
            found.append(job)
    return found


def _about(job: Job, error: HybridgenError) -> str:
    """An error's message; a prompt that was asked for alone is the first there, and has its id here."""
    text = str(error)
    return f"prompt {job.id} {text.removeprefix('prompt 0 ')}" if text.startswith("prompt 0 ") else text


class _Report:
    """What is printed and written of a run."""

    def __init__(
        self, results: ResultFile | None, model: dict[str, Any], arguments: argparse.Namespace, *, many: bool
    ) -> None:
        self.failures = 0
        self._results, self._model, self._many = results, model, many
        self._json, self._stream = arguments.json, arguments.stream
        self._live = arguments.stream and not arguments.json
        self._started = False

    def event(self, job: Job, event: TokenEvent) -> None:
        """A token, and with the last one the completion."""
        if self._live:
            _print(event.text if self._started else _opening(job) + event.text, end="")
            self._started = True
        record = None if event.completion is None else result(job, event.completion, self._settings(job))
        if self._stream and self._json:
            _print_event(job, event, record)
        if event.completion is None or record is None:
            return
        self.failures += event.completion.error is not None
        self._write(record)
        if not self._json and (self._live or self._results is None):
            _show(job, event.completion, text=not self._live, many=self._many)

    def failed(self, job: Job, problem: str) -> None:
        """A prompt that cannot be run."""
        self.failures += 1
        self._write(failure(job, problem, self._settings(job)))
        if not self._json and self._results is None:
            _note(f"hybridgen: prompt {job.id} failed: {problem}")

    def _settings(self, job: Job) -> dict[str, Any] | None:
        return None if self._results is None else settings_of(job, self._model)

    def _write(self, record: dict[str, Any]) -> None:
        if self._results is not None:
            self._results.append(record)
        if self._json and (not self._stream or record["seed"] is None):
            _print_json(record)


def _read_jobs(arguments: argparse.Namespace) -> list[Job]:
    fields = _given(arguments, _SAMPLING_OPTIONS)
    if arguments.input is not None:
        if arguments.prompt:
            raise PromptError("give prompts as arguments or with --input, not both")
        if arguments.output is not None and same_file(arguments.input, arguments.output):
            raise PromptError(f"--output {arguments.output} is the --input file; name another")
        return read_jobs(arguments.input, fields, skip=arguments.on_error == "skip")
    params = sampling_from_wire(fields)
    if arguments.prompt:
        for index, prompt in enumerate(arguments.prompt):
            if not is_unicode(prompt):
                raise PromptError(f"prompt {index} is not text in this locale's encoding")
        return [Job(index, prompt, params) for index, prompt in enumerate(arguments.prompt)]
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
    return [Job(0, text, params)]


def _print_event(job: Job, event: TokenEvent, record: dict[str, Any] | None) -> None:
    line: dict[str, Any] = {"id": job.id, "token_id": event.token_id, "text": event.text}
    if record is not None:
        line["completion"] = record
    _print_json(line)


def _opening(job: Job) -> str:
    """What stands before the generated text: the prompt, if it is text."""
    return job.prompt if isinstance(job.prompt, str) else ""


def _show(job: Job, completion: Completion, *, text: bool, many: bool) -> None:
    """The text on standard output and a line about it on standard error."""
    if text:
        if many:
            _print(f"--- {job.id}")
        _print(_opening(job) + completion.text)
    else:
        _print("")
    if completion.error is not None:
        _note(f"hybridgen: prompt {job.id} failed: {completion.error}")
        return
    timing, count = completion.timing, len(completion.token_ids)
    _note(
        f"[{count} tokens in {timing.total:.2f} s, {count / timing.total:.1f} tok/s, first after "
        f"{timing.ttft * 1e3:.0f} ms, finish: {completion.finish_reason}]"
    )


def _compare(arguments: argparse.Namespace) -> int:
    from hybridgen.cli.compare import run

    if sys.stdout is None:
        raise HybridgenError("standard output is closed; leave it open")
    text, status = run(arguments)
    _print(text)
    return status


def _doctor(arguments: argparse.Namespace) -> int:
    from hybridgen.cli.doctor import examine, examine_model

    if sys.stdout is None:
        raise HybridgenError("standard output is closed; leave it open")
    findings = examine()
    if arguments.model is not None:
        findings += examine_model(arguments.model, _given(arguments, _ENGINE_OPTIONS))
    if arguments.json:
        _print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            _print(f"{'ok' if finding.ok else 'no':<3} {finding.name:<13} {finding.detail}")
    return 0


def _print_json(value: Any) -> None:
    """Print one line of JSON, with escapes for what standard output's encoding lacks."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    _print(line)


def _print(text: str, end: str = "\n") -> None:
    """Print on standard output, at once."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _abandon(sys.stdout)
        raise HybridgenError(f"standard output cannot be written: {error.strerror}") from error


def _note(text: str) -> None:
    """Print on standard error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it: no reason to stop
        _abandon(sys.stderr)


def _abandon(stream: TextIO | None) -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not fail on it when it exits."""
    with suppress(AttributeError, OSError, ValueError):  # None, or no file underneath
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)
