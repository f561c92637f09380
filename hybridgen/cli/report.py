"""What is printed and written of a run of prompts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hybridgen.cli.jsonl import Job, ResultFile, failure, result, settings_of
from hybridgen.cli.output import note, say, say_json

if TYPE_CHECKING:
    from hybridgen.core import Completion, TokenEvent


class Report:
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
        completion = event.completion
        if completion is not None and completion.error is not None and not completion.prompt_token_ids:
            # It did not run. The error's number is that in the call; here it has an id.
            self.failed(job, str(completion.error).replace(f"prompt {event.index} ", f"prompt {job.id} ", 1))
            return
        if self._live:
            say(event.text if self._started else _opening(job) + event.text, end="")
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
            note(f"hybridgen: prompt {job.id} failed: {problem}")

    def _settings(self, job: Job) -> dict[str, Any] | None:
        return None if self._results is None else settings_of(job, self._model)

    def _write(self, record: dict[str, Any]) -> None:
        if self._results is not None:
            self._results.append(record)
        if self._json and (not self._stream or record["seed"] is None):
            say_json(record)


def _print_event(job: Job, event: TokenEvent, record: dict[str, Any] | None) -> None:
    line: dict[str, Any] = {"id": job.id, "token_id": event.token_id, "text": event.text}
    if record is not None:
        line["completion"] = record
    say_json(line)


def _opening(job: Job) -> str:
    """What stands before the generated text: the prompt, if it is text."""
    return job.prompt if isinstance(job.prompt, str) else ""


def _show(job: Job, completion: Completion, *, text: bool, many: bool) -> None:
    """The text on standard output and a line about it on standard error."""
    if text:
        if many:
            say(f"--- {job.id}" if job.choice is None else f"--- {job.id}, choice {job.choice}")
        say(_opening(job) + completion.text)
    else:
        say("")
    if completion.error is not None:
        note(f"hybridgen: prompt {job.id} failed: {completion.error}")
        return
    timing, count = completion.timing, len(completion.token_ids)
    first = "" if timing.ttft is None else f", first after {timing.ttft * 1e3:.0f} ms"
    note(
        f"[{count} tokens in {timing.total:.2f} s, {count / timing.total:.1f} tok/s{first}, "
        f"finish: {completion.finish_reason}]"
    )
