"""JSON lines: the prompts that the command reads, and the results that it writes and resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from hybridgen.errors import HybridgenError, PromptError

if TYPE_CHECKING:
    from hybridgen.core import Completion

_FIELDS = {"id", "prompt", "text", "token_ids", "finish_reason", "error"}
_START, _NEXT = '{"id": ', ', "prompt": '
"""How the lines of `result` begin: what tells a cut one from a file of something else."""


class Job(NamedTuple):
    """One prompt of a run."""

    id: Any
    prompt: Any

    @property
    def key(self) -> str:
        """The id as text, equal for equal ids."""
        return _key(self.id)


def read_jobs(path: Path) -> list[Job]:
    """The prompts of an input file.

    Raises:
        PromptError: the file cannot be read, has no prompts, or has a line that is no prompt or repeats an id.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise PromptError(f"--input {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"--input {path} is not UTF-8 text: {error}") from error
    jobs: list[Job] = []
    lines: dict[str, int] = {}
    for number, job in _parse(path, text):
        first = lines.setdefault(job.key, number)
        if first != number:
            raise PromptError(
                f"{path}:{number} has the id {job.key}, as line {first} has; give each its own (without one, a "
                "prompt's id is the number of its line)"
            )
        jobs.append(job)
    if not jobs:
        raise PromptError(f"no prompts in {path}")
    return jobs


def _parse(path: Path, text: str) -> Iterator[tuple[int, Job]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}:{number} is not JSON: {error}") from error
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
            raise PromptError(f"{path}:{number} must be a string, or an object with either 'prompt' or 'messages'")
        name = "prompt" if "prompt" in value else "messages"
        if not isinstance(value[name], (str, list) if name == "prompt" else list):
            kinds = "a string or a list of token ids" if name == "prompt" else "a list"
            raise PromptError(f"{path}:{number}: {name!r} must be {kinds}")
        job = Job(value.get("id", number), value[name])
        if not is_unicode(job):
            raise PromptError(f"{path}:{number} has half of a surrogate pair (\\ud800 to \\udfff), which is not text")
        yield number, job


def is_unicode(value: Any) -> bool:
    """Whether the strings in a JSON value can be written as UTF-8: JSON's escapes allow lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def result(job: Job, completion: Completion) -> dict[str, Any]:
    """A result as one JSON object."""
    timing = completion.timing
    times = {"queue_s": timing.queue, "ttft_s": timing.ttft, "total_s": timing.total}
    if len(timing.token_times) > 1:
        times |= {"tpot_p50_s": timing.tpot_p50, "tpot_p95_s": timing.tpot_p95, "tpot_p99_s": timing.tpot_p99}
    return {
        "id": job.id,
        "prompt": job.prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": str(completion.finish_reason),
        "seed": completion.seed,
        "error": None if completion.error is None else str(completion.error),
        "timing": {name: value for name, value in times.items() if value == value},  # JSON has no NaN
        "steps": [asdict(step) for step in completion.steps],
    }


class ResultFile:
    """An output file: what it holds already, and where new results are appended."""

    def __init__(self, path: Path) -> None:
        """Read, repair and open the file; it is made if there is none.

        What a killed run leaves at its end is put right, so that the next line starts clean: a whole result lacks
        only its newline, and a part of one is cut off. A file of anything else is left as it is.

        Raises:
            PromptError: it holds something else than results of this command, or cannot be read or written.
        """
        self.path = path
        self._done: dict[str, str] = {}
        try:
            # There is nothing to read again in a device or a pipe.
            content = path.read_bytes() if path.is_file() else b""
            whole = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
                self._add(line, number)
            tail = content[whole:]
            cut = bool(tail) and self._is_cut(tail, content.count(b"\n") + 1)
            self._file: TextIO = path.open("a", encoding="utf-8", newline="\n")
            if cut:
                os.truncate(path, whole)
            elif tail:
                self._file.write("\n")
                self._file.flush()
        except OSError as error:
            raise PromptError(f"--output {path} cannot be used: {error.strerror}") from error

    def _add(self, line: bytes, number: int) -> None:
        """Take in a whole line. Failed results are not done: they are run again."""
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise self._foreign(number) from error
        if not isinstance(record, dict) or not record.keys() >= _FIELDS:
            raise self._foreign(number)
        if record["error"] is None:
            self._done[_key(record["id"])] = _key(record["prompt"])

    def _is_cut(self, tail: bytes, number: int) -> bool:
        """Whether a last line without a newline is the beginning of a result; if it is a whole one, take it in.

        Raises:
            PromptError: it is neither.
        """
        text = tail.decode("utf-8", errors="replace")  # the cut may go through a character
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            if _begins_result(text):
                return True
            raise self._foreign(number) from None
        self._add(tail, number)
        return False

    def _foreign(self, number: int) -> PromptError:
        return PromptError(f"{self.path}:{number} is not a result of this command; name another --output")

    def has(self, job: Job) -> bool:
        """Whether a job has a result without error.

        Raises:
            PromptError: its id has one, for another prompt.
        """
        prompt = self._done.get(job.key)
        if prompt is not None and prompt != _key(job.prompt):
            raise PromptError(
                f"{self.path} has a result with the id {job.key} for another prompt; name another --output, or give "
                "the prompts ids of their own"
            )
        return prompt is not None

    def append(self, record: dict[str, Any]) -> None:
        """Write a result, at once.

        Raises:
            HybridgenError: the disk is full, or the like.
        """
        try:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise HybridgenError(f"--output {self.path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:  # what could not be written above
            raise HybridgenError(f"--output {self.path} cannot be written: {error.strerror}") from error


def _begins_result(text: str) -> bool:
    """Whether text without an end is how a line of `result` begins."""
    if not text.startswith(_START):
        return _START.startswith(text)
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(_START))
    except (ValueError, RecursionError):  # cut in the id: long if it is one of these, else a word or number
        return text[len(_START) :][:1] in ('"', "{", "[") or len(text) < len(_START) + len("-Infinity")
    rest = text[end:]
    return rest.startswith(_NEXT) or _NEXT.startswith(rest)


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file, which need not exist."""
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
