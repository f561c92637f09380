"""`hybridgen score`: how likely a model finds the completions of a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridgen.cli.imports import import_engine
from hybridgen.cli.jsonl import is_unicode, read_lines, same_file
from hybridgen.cli.options import ENGINE, add_engine, add_model, given, model_of
from hybridgen.cli.output import check_output_is_open, note, say_json
from hybridgen.errors import HybridgenError, PromptError
from hybridgen.serving.unix.messages import number

if TYPE_CHECKING:
    from hybridgen.core import Score


def add_command(commands: Any) -> None:
    """Add `score`."""
    parser = commands.add_parser("score", help="log-probabilities of given texts")
    parser.set_defaults(run=run)
    add_model(parser)
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help="JSONL file: objects with prompt and completion (text or token ids); a string, or a prompt alone, is "
        "scored from its second token on",
    )
    parser.add_argument("--output", type=Path, help="JSONL file for the results (default: standard output)")
    add_engine(parser)


def run(arguments: argparse.Namespace) -> int:
    """Score; returns the exit status."""
    from hybridgen import api

    if arguments.output is None:
        check_output_is_open("name an --output")
    elif same_file(arguments.input, arguments.output):
        raise PromptError(f"--output {arguments.output} is the --input file; name another")
    rows = [_parse(f"{arguments.input}:{number}", number, line) for number, line in read_lines(arguments.input)]
    if not rows:
        raise PromptError(f"no prompts in {arguments.input}")
    pairs = [pair for _, pair in rows]
    import_engine()
    scores = api.score(model_of(arguments), pairs, **given(arguments, ENGINE))
    records = [_record(id, score) for (id, _), score in zip(rows, scores, strict=True)]
    if arguments.output is None:
        for record in records:
            say_json(record)
    else:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        try:
            arguments.output.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise HybridgenError(f"--output {arguments.output} cannot be written: {error.strerror}") from error
    failed = [score for score in scores if score.error is not None]
    if failed:
        note(f"{len(failed)} of {len(scores)} failed: {failed[0].error}")
    return int(bool(failed))


def _parse(where: str, number: int, line: str) -> tuple[Any, Any]:
    """The id of a line, and what it has to score."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON: {error}") from error
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict) or "prompt" not in value or not value.keys() <= {"id", "prompt", "completion"}:
        raise PromptError(f"{where} must be a string, or an object with 'prompt', 'completion' and 'id' alone")
    if not is_unicode(value):
        raise PromptError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff), which is not text")
    id = value.pop("id", number)
    return id, value if "completion" in value else value["prompt"]


def _record(id: Any, score: Score) -> dict[str, Any]:
    return {
        "id": id,
        "sum": number(score.sum),
        "perplexity": number(score.perplexity),
        "token_ids": list(score.token_ids),
        "logprobs": [number(value) for value in score.logprobs],
        "is_greedy": list(score.is_greedy),
        "prompt_tokens": len(score.prompt_token_ids),
        "cached_tokens": score.cached_tokens,
        "error": None if score.error is None else str(score.error),
    }
