"""JSON lines: the prompts that the command reads, and the results that it writes and resumes."""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from hybridgen.cli.parquet import read_rows
from hybridgen.errors import HybridgenError, PromptError, SamplingError, shown
from hybridgen.params import SamplingParams, choice_seed
from hybridgen.serving.unix.messages import sampling_from_wire, sampling_to_wire
from hybridgen.text.chats import CHAT_KEYS

if TYPE_CHECKING:
    from hybridgen.core import Completion

_FIELDS = {"id", "prompt", "text", "token_ids", "finish_reason", "error"}
_START, _NEXT = '{"id": ', ', "prompt": '
"""How the lines of `result` begin: what tells a cut one from a file of something else."""
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
"""Byte order marks that editors put before a text, and what it is then."""


_DECISIVE = ("config.json", "generation_config.json", "tokenizer")
"""Files of a model, besides its weights, on which its results depend."""


class Job(NamedTuple):
    """One completion of a run."""

    id: Any
    prompt: Any
    sampling: SamplingParams = SamplingParams()
    """With n=1."""
    choice: int | None = None
    """Which of its line's completions, where the line asks for several (`n`)."""
    problem: str | None = None
    """Why it cannot be run."""

    @property
    def key(self) -> str:
        """The id and choice as text, equal for equal ones."""
        return _key(self.id) if self.choice is None else f"{_key(self.id)} choice {self.choice}"


def read_jobs(path: Path, fields: Mapping[str, Any] | None = None, *, skip: bool = False) -> list[Job]:
    """The prompts of an input file.

    Args:
        fields: of `SamplingParams`, for lines that do not set them.
        skip: a line that is no prompt becomes a job with a `problem`.

    Raises:
        PromptError: the file cannot be read, has no prompts, or (without `skip`) has a line that is no prompt or
            repeats an id.
        SamplingError: `fields` has a wrong value.
    """
    shared = sampling_from_wire(dict(fields or {}))
    jobs: list[Job] = []
    lines: dict[str, int] = {}
    parquet = path.suffix == ".parquet"
    for number, line in read_rows(path) if parquet else read_lines(path):
        try:
            where = f"{path}:{number}"
            value = line if not isinstance(line, str) else _decoded(where, line)
            found = _parse(where, number, value, fields or {}, shared)
            first = lines.setdefault(_key(found[0].id), number)
            if first != number:
                raise PromptError(
                    f"{path}:{number} has the id {_key(found[0].id)}, as line {first} has; give each its own (without "
                    "one, a prompt's id is the number of its line)"
                )
        except PromptError as error:
            if not skip:
                raise
            found = [Job(number, None, problem=str(error))]
        jobs += found
    if not jobs:
        raise PromptError(f"no prompts in {path}")
    return jobs


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of an input file that hold something, with their numbers from 1.

    Raises:
        PromptError: the file cannot be read, or is not text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PromptError(f"--input {path} cannot be read: {error.strerror}") from error
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise PromptError(f"--input {path} is not {error.encoding.upper()} text: {error}") from error
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # files with marks that were joined
        if line.strip():
            yield number, line


def _decoded(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON: {error}") from error


def _parse(where: str, number: int, value: Any, fields: Mapping[str, Any], shared: SamplingParams) -> list[Job]:
    """The jobs of a line: one for each of its completions.

    Args:
        shared: what `fields` are, as one object for all lines that set none: a client sends it once.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise PromptError(f"{where} must be a string, or an object with either 'prompt' or 'messages'")
    name = "prompt" if "prompt" in value else "messages"
    if not isinstance(value[name], (str, list) if name == "prompt" else list):
        kinds = "a string or a list of token ids" if name == "prompt" else "a list"
        raise PromptError(f"{where}: {name!r} must be {kinds}")
    chat = {key: value[key] for key in value if key in CHAT_KEYS} if name == "messages" else {}
    prompt = chat if len(chat) > 1 else value[name]
    if not is_unicode(value):
        raise PromptError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff), which is not text")
    given = {key: value[key] for key in value if key not in ("id", name, *chat)}
    try:
        params = sampling_from_wire({**fields, **given}) if given else shared
    except SamplingError as error:
        raise PromptError(f"{where}: {error}; besides 'id' and {name!r}, a line has sampling fields") from error
    return jobs_of(value.get("id", number), prompt, params)


def jobs_of(id: Any, prompt: Any, params: SamplingParams) -> list[Job]:
    """A job for each completion of a prompt."""
    if params.n == 1:
        return [Job(id, prompt, params)]
    seeds = [None if params.seed is None else choice_seed(params.seed, i) for i in range(params.n)]  # as the engine's
    return [Job(id, prompt, replace(params, n=1, seed=seed), choice) for choice, seed in enumerate(seeds)]


def is_unicode(value: Any) -> bool:
    """Whether the strings in a JSON value can be written as UTF-8: JSON's escapes allow lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def model_settings(model: str | None, **fields: Any) -> dict[str, Any]:
    """What tells results of one model from those of another.

    Args:
        model: a directory or hub id; None for the demo model.
        fields: options that change what it computes; None where one was not given.
    """
    from hybridgen.demo import model_path

    path = Path(model).expanduser() if model is not None else model_path()
    found: dict[str, Any] = {"model": model or "the demo model"}
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path.iterdir()):
            if file.name.startswith(_DECISIVE) or file.suffix in (".safetensors", ".bin"):
                info = file.stat()
                digest.update(f"{file.name} {info.st_size} {info.st_mtime_ns}\n".encode())
        found |= {"model": os.path.realpath(path) if model else "the demo model", "files": digest.hexdigest()[:12]}
    return found | {name: value for name, value in fields.items() if value is not None}


def settings_of(job: Job, model: Mapping[str, Any]) -> dict[str, Any]:
    """What a result depends on besides its prompt.

    Args:
        model: see `model_settings`.
    """
    return {**model, "sampling": sampling_to_wire(job.sampling)}


def failure(job: Job, problem: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The line of a job that cannot be run."""
    return _record(job, settings) | {
        "text": "",
        "token_ids": [],
        "finish_reason": "error",
        "seed": None,
        "error": problem,
        "timing": {},
        "steps": [],
    }


def _record(job: Job, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The beginning of a line."""
    choice = {} if job.choice is None else {"choice": job.choice}
    return {"id": job.id, "prompt": job.prompt, **choice, **({} if settings is None else {"settings": settings})}


def result(job: Job, completion: Completion, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A result as one JSON object.

    Args:
        settings: what a later run must have to take it as done, see `settings_of`.
    """
    timing = completion.timing
    times = {"queue_s": timing.queue, "ttft_s": timing.ttft, "total_s": timing.total}
    if len(timing.token_times) > 1:
        times |= {"tpot_p50_s": timing.tpot_p50, "tpot_p95_s": timing.tpot_p95, "tpot_p99_s": timing.tpot_p99}
    logprobs, scored = getattr(completion, "logprobs", None), getattr(completion, "prompt_logprobs", None)
    return _record(job, settings) | {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        **({} if logprobs is None else {"logprobs": [asdict(token) for token in logprobs]}),
        **({} if scored is None else {"prompt_logprobs": [token and asdict(token) for token in scored]}),
        "finish_reason": str(completion.finish_reason),
        "seed": completion.seed,
        "error": None if completion.error is None else str(completion.error),
        "timing": {name: value for name, value in times.items() if value is not None},
        "steps": [asdict(step) for step in completion.steps],
    }


class ResultFile:
    """An output file: what it holds already, and where new results are appended."""

    def __init__(self, path: Path) -> None:
        """Read, repair and open the file; it is made if there is none.

        What a killed run leaves at its end is put right, so that the next line starts clean: a whole result lacks
        only its newline, and a part of one is cut off. A file of anything else is left as it is.

        Raises:
            PromptError: it holds something else than results of this command, cannot be read or written, or another
                process is writing it.
        """
        self.path = path
        self._done: dict[str, tuple[str, Any]] = {}
        try:
            self._file: TextIO = path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._unusable(error) from error
        try:
            # There is nothing to read again in a device or a pipe.
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._lock()
                self._resume()
        except OSError as error:
            self._file.close()
            raise self._unusable(error) from error
        except BaseException:
            self._file.close()
            raise

    def _unusable(self, error: OSError) -> PromptError:
        return PromptError(f"--output {self.path} cannot be used: {error.strerror}")

    def _lock(self) -> None:
        """Let nobody else write results to the file until it is closed. Some file systems have no locks; then nothing
        is locked."""
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PromptError(
                f"--output {self.path} is being written by another process; let it end, or name another file"
            ) from None
        except OSError:
            return

    def _resume(self) -> None:
        """Take in what is there, and repair its end."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            self._add(line, number)
        tail = content[whole:]
        if tail and self._is_cut(tail, content.count(b"\n") + 1):
            os.truncate(self.path, whole)
        elif tail:
            self._file.write("\n")
            self._file.flush()

    def _add(self, line: bytes, number: int) -> None:
        """Take in a whole line. Failed results are not done: they are run again."""
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise self._foreign(number) from error
        if not isinstance(record, dict) or not record.keys() >= _FIELDS:
            raise self._foreign(number)
        if record["error"] is None:
            job = Job(record["id"], record["prompt"], choice=record.get("choice"))
            self._done[job.key] = _key(record["prompt"]), record.get("settings")

    def _is_cut(self, tail: bytes, number: int) -> bool:
        """Whether a last line without a newline is the beginning of a result; if it is a whole one, take it in.

        Raises:
            PromptError: it is neither.
        """
        # The cut may go through a character.
        text = tail.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")
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

    def has(self, job: Job, settings: Mapping[str, Any] | None = None) -> bool:
        """Whether a job has a result without error.

        Args:
            settings: what its result must be of, see `settings_of`; None: anything.

        Raises:
            PromptError: its id has one for another prompt, or of other settings.
        """
        prompt, found = self._done.get(job.key, (None, None))
        if prompt is None:
            return False
        if prompt != _key(job.prompt):
            raise PromptError(
                f"{self.path} has a result with the id {job.key} for another prompt; name another --output, or give "
                "the prompts ids of their own"
            )
        if settings is not None:
            differing = _differing(found, settings)
            if differing:
                raise PromptError(
                    f"{self.path} has a result with the id {job.key} of other settings ({differing}); give the same, "
                    "or name another --output"
                )
        return True

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


def _differing(found: Any, wanted: Mapping[str, Any]) -> str:
    """In words, how settings in a file differ from those of this run; empty where they do not."""
    if not isinstance(found, dict) or not isinstance(found.get("sampling"), dict):
        return "it does not say of which model and sampling it is"
    there, here = ({**side, **side["sampling"]} for side in (found, wanted))
    names = sorted((there.keys() | here.keys()) - {"sampling"})
    return "; ".join(
        f"{name}: {_shown(there.get(name))} there, {_shown(here.get(name))} here"
        for name in names
        if _key(there.get(name)) != _key(here.get(name))
    )


def _shown(value: Any) -> str:
    return "not set" if value is None else shown(value)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
