"""The `hybridgen` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from hybridgen.errors import HybridgenError, PromptError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 (some requests failed), 2 (bad input) or 130 (Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe went away; nobody is left to tell
        return EXIT_ERROR
    except HybridgenError as error:
        print(f"hybridgen: {error}", file=sys.stderr)
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hybridgen", description="Generate text from Hugging Face causal models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="generate text")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", nargs="*", help="prompts; without any (and without --input), standard input is one")
    generate.add_argument("--model", help="local path or hub id (default: the demo model)")
    generate.add_argument("--mode", help="eager or jit")
    generate.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    generate.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    generate.add_argument("--revision", help="branch, tag or commit of a hub model")
    generate.add_argument("--trust-remote-code", action="store_true", default=None)
    generate.add_argument("--max-batch", type=int, help="requests that run at once")
    generate.add_argument("--max-context", type=int, help="longest prompt plus output, in tokens")
    generate.add_argument("--kv-memory", help='bytes for the KV cache, such as "4GiB"')
    generate.add_argument("--max-new-tokens", type=int)
    generate.add_argument("--temperature", type=float, help="0 is greedy")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--min-p", type=float)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--stop", action="append", help="a string that ends the text; may be given again")
    generate.add_argument("--input", type=Path, help="JSONL file: strings, or objects with prompt or messages")
    generate.add_argument("--output", type=Path, help="JSONL file for the results; finished lines are not redone")
    generate.add_argument("--json", action="store_true", help="print results as JSON lines")
    generate.add_argument("--stream", action="store_true", help="print text as it comes")
    generate.add_argument("--stats", action="store_true", help="print the engine's statistics to standard error")
    doctor = commands.add_parser("doctor", help="say what this machine can do, and why not")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


class Job(NamedTuple):
    """One prompt of a run."""

    id: Any
    prompt: Any


def _generate(arguments: argparse.Namespace) -> int:
    jobs = _read_jobs(arguments)
    done = _finished_ids(arguments.output) if arguments.output else set()
    todo = [job for job in jobs if json.dumps(job.id) not in done]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} prompts are already in {arguments.output}", file=sys.stderr)
    if not todo:
        return 0
    from hybridgen.api import prepare

    prompts = [job.prompt for job in todo]
    engine, sampling = prepare(arguments.model, prompts, None, None, None, _given(arguments))
    with engine:
        failed = _run(engine, todo, sampling, arguments)
        if arguments.stats:
            print(engine.stats(), file=sys.stderr)
    return int(failed > 0)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as fields of `EngineConfig` and `SamplingParams`."""
    names = (
        "mode", "dtype", "device", "revision", "trust_remote_code", "max_batch", "max_context", "kv_memory",
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop",
    )  # fmt: skip
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _run(engine: Any, jobs: list[Job], sampling: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Generate and write each completion when it ends; returns how many failed."""
    from tqdm.auto import tqdm

    output = arguments.output.open("a", encoding="utf-8") if arguments.output else None
    failed = 0
    live = arguments.stream and not arguments.json and len(jobs) == 1
    try:
        with tqdm(total=len(jobs), desc="generate", unit="request", delay=1, disable=True if live else None) as bar:
            for event in engine.stream([job.prompt for job in jobs], **sampling):
                if live:
                    print(event.text, end="", flush=True)
                elif arguments.stream and arguments.json:
                    _print_event(jobs[event.index], event)
                if event.completion is None:
                    continue
                bar.update()
                failed += event.completion.error is not None
                job = jobs[event.index]
                if output is not None:
                    _write_line(output, _record(job, event.completion))
                elif not arguments.json:
                    _show(job, event.completion, text=not live, many=len(jobs) > 1)
                elif not arguments.stream:
                    print(json.dumps(_record(job, event.completion), ensure_ascii=False), flush=True)
    finally:
        if output is not None:
            output.close()
    return failed


def _read_jobs(arguments: argparse.Namespace) -> list[Job]:
    if arguments.input is not None:
        if arguments.prompt:
            raise PromptError("give prompts as arguments or with --input, not both")
        return list(_read_jsonl(arguments.input))
    if arguments.prompt:
        return [Job(index, prompt) for index, prompt in enumerate(arguments.prompt)]
    if sys.stdin is None or sys.stdin.isatty():
        raise PromptError('no prompt; try: hybridgen generate "def fibonacci(n):"')
    text = sys.stdin.read()
    if not text:
        raise PromptError("standard input is empty; give a prompt")
    return [Job(0, text)]


def _read_jsonl(path: Path) -> Iterator[Job]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"--input {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}:{number} is not JSON: {error}") from error
        if isinstance(value, str):
            yield Job(number, value)
        elif isinstance(value, dict) and ("prompt" in value) != ("messages" in value):
            yield Job(value.get("id", number), value["prompt"] if "prompt" in value else value["messages"])
        else:
            raise PromptError(f"{path}:{number} must be a string, or an object with either 'prompt' or 'messages'")


def _finished_ids(path: Path) -> set[str]:
    """Ids of the results in an output file, as JSON. Failed ones are run again.

    A last line without its end is what a killed run leaves; it is cut off so that the next line starts clean.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    done = set()
    for number, line in enumerate(content[:whole].decode("utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            if record["error"] is None:
                done.add(json.dumps(record["id"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PromptError(f"{path}:{number} is not a result of this command; name another --output") from error
    return done


def _record(job: Job, completion: Any) -> dict[str, Any]:
    """A result as one JSON object."""
    timing = completion.timing
    record: dict[str, Any] = {
        "id": job.id,
        "prompt": job.prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": str(completion.finish_reason),
        "seed": completion.seed,
        "error": None if completion.error is None else str(completion.error),
        "timing": {"queue_s": timing.queue, "ttft_s": timing.ttft, "total_s": timing.total},
        "steps": [asdict(step) for step in completion.steps],
    }
    if len(timing.token_times) > 1:
        record["timing"] |= {
            "tpot_p50_s": timing.tpot_p50,
            "tpot_p95_s": timing.tpot_p95,
            "tpot_p99_s": timing.tpot_p99,
        }
    record["timing"] = {name: value for name, value in record["timing"].items() if value == value}  # JSON has no NaN
    return record


def _write_line(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _print_event(job: Job, event: Any) -> None:
    line: dict[str, Any] = {"id": job.id, "token_id": event.token_id, "text": event.text}
    if event.completion is not None:
        line["completion"] = _record(job, event.completion)
    print(json.dumps(line, ensure_ascii=False), flush=True)


def _show(job: Job, completion: Any, *, text: bool, many: bool) -> None:
    """The text on standard output and a line about it on standard error."""
    if text:
        if many:
            print(f"--- {job.id}")
        print(f"{job.prompt}{completion.text}" if isinstance(job.prompt, str) else completion.text)
    else:
        print()
    sys.stdout.flush()
    if completion.error is not None:
        print(f"hybridgen: prompt {job.id} failed: {completion.error}", file=sys.stderr)
        return
    timing, count = completion.timing, len(completion.token_ids)
    print(
        f"[{count} tokens in {timing.total:.2f} s, {count / timing.total:.1f} tok/s, first after "
        f"{timing.ttft * 1e3:.0f} ms, finish: {completion.finish_reason}]",
        file=sys.stderr,
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from hybridgen.doctor import examine

    findings = examine()
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        for finding in findings:
            print(f"{'ok' if finding.ok else 'no':<3} {finding.name:<13} {finding.detail}")
    return 0
