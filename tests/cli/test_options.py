"""Options that are made from fields, models given in either way, and errors that show the right usage."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import hybridgen
from hybridgen.cli.main import main
from hybridgen.cli.options import Parser, add_sampling, given
from hybridgen.demo import model_path
from hybridgen.params import SamplingParams
from hybridgen.serving.unix.messages import sampling_from_wire

FAST = ["--mode", "eager", "--dtype", "float32", "--max-batch", "4", "--kv-memory", "16MiB", "--max-new-tokens", "4"]

VALUES: dict[str, tuple[list[str], Any]] = {
    "min_new_tokens": (["2"], 2),
    "temperature": (["0.5"], 0.5),
    "logit_bias": (['{"5": -1.5, "6": "-inf"}'], {5: -1.5, 6: -float("inf")}),
    "sequence_bias": (["[[[1, 2], 0.5]]"], (((1, 2), 0.5),)),
    "bad_words_ids": (["[[1, 2], [3]]"], ((1, 2), (3,))),
    "suppress_tokens": (["[1, 2]"], (1, 2)),
    "forced_bos_token_id": (["7"], (7,)),
    "n": (["3"], 3),
    "stop": (["x", "y"], ("x", "y")),
    "stop_token_ids": (["[4]"], (4,)),
    "ignore_eos": ([], True),
    "logprobs": (["2"], 2),
    "logprobs_of": (["sampled"], "sampled"),
    "prompt_logprobs": (["2"], 2),
    "skip_special_tokens": ([], False),
    "cache_salt": (["a"], "a"),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    try:
        code = main([*map(str, arguments)])
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_each_sampling_field_is_an_option_with_its_description() -> None:
    parser = Parser(prog="x")
    add_sampling(parser)
    text = " ".join(parser.format_help().split())
    for field in dataclasses.fields(SamplingParams):
        if field.metadata.get("functions"):
            assert field.name.replace("_", "-") not in text
            continue
        assert re.search(rf"--(no-)?{field.name.replace('_', '-')}\b", text), field.name
        assert " ".join(field.metadata["about"].split())[:40].replace("%%", "%") in text, field.name


@pytest.mark.parametrize("name", VALUES)
def test_an_option_sets_its_field(name: str) -> None:
    parser = Parser(prog="x")
    add_sampling(parser)
    texts, value = VALUES[name]
    option = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
    arguments = [part for text in texts for part in (option, text)] or [option]
    found = sampling_from_wire(given(parser.parse_args(arguments), [name]))
    assert getattr(found, name) == value


def test_json_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "generate", "x", "--stop-token-ids", "1,2")
    assert code == 2
    assert "--stop-token-ids: '1,2' is not JSON" in err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"hybridgen {hybridgen.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "usage", "words"),
    [
        (["generate", "x", "--typo"], "hybridgen generate [options] [PROMPT ...]", "unknown: --typo"),
        (["generate", "--top-k", "many"], "hybridgen generate [options] [PROMPT ...]", "--top-k"),
        (["cache", "warm", "a", "b"], "hybridgen cache warm [options] [MODEL]", "unknown: b"),
        (["cache"], "hybridgen cache [options] ACTION ...", "ACTION"),
        (["doctor", "--typo"], "hybridgen doctor [options] [MODEL]", "unknown: --typo"),
        ([], "hybridgen [options] COMMAND ...", "COMMAND"),
    ],
)
def test_errors_show_the_usage_of_their_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str], usage: str, words: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == f"usage: {usage}"
    assert err.splitlines()[1].startswith("hybridgen: ")
    assert words in err
    assert len(err.splitlines()) == 2


def test_prompts_and_options_come_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "generate", "import os", *FAST, "--json", "import re")
    assert code == 0
    assert {json.loads(line)["prompt"] for line in out.splitlines()} == {"import os", "import re"}


def test_several_completions_of_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    sampled = ["--temperature", "0.9", "--seed", "3", "--n", "2"]
    code, out, _ = run(capsys, "generate", "import os", *FAST, *sampled)
    assert code == 0
    assert re.findall(r"^--- .*", out, re.MULTILINE) == ["--- 0, choice 0", "--- 0, choice 1"]
    code, out, _ = run(capsys, "generate", "import os", *FAST, *sampled, "--json", "--logprobs", "1", "--ignore-eos")
    records = [json.loads(line) for line in out.splitlines()]
    assert sorted(record["choice"] for record in records) == [0, 1]
    assert all(len(record["logprobs"]) == 4 for record in records)
    code, _, err = run(capsys, "generate", "import os", "--model", "/no/such", *sampled, "--stream")
    assert (code, "one completion and there are 2" in err) == (2, True)


def test_log_probabilities_are_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "generate", "x", "--model", "/no/such", "--logprobs", "1")
    assert (code, "add --json or --output" in err) == (2, True)


@pytest.mark.parametrize("command", [["doctor"], ["serve"], ["compare", "--smoke"], ["cache", "explain"]])
def test_a_model_is_given_in_either_way(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    for model in (["/no/such/model"], ["--model", "/no/such/model"]) if command != ["doctor"] else ():
        code, _, err = run(capsys, *command, *model)
        assert (code, "/no/such/model" in err) == (2, True)
    code, _, err = run(capsys, *command, "a", "--model", "b")
    assert (code, err) == (2, "hybridgen: two models are given: a and --model b; give one\n")


def test_a_prompt_that_names_something_else_is_warned_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"x"')
    for prompt, words in (
        (model_path(), "is a model's directory; a model is given as --model PATH"),
        (file, "is a file's name; prompts are read with --input FILE"),
        ("meta-llama/Llama-3.2-1B", "looks like a hub id; a model is given as --model ID"),
    ):
        _, _, err = run(capsys, "generate", prompt, "--mode", "none")
        assert words in err.splitlines()[0]
    for prompt in ("import os", "and/or", "x" * 5000, "a\0b"):
        _, _, err = run(capsys, "generate", prompt, "--mode", "none")
        assert "warning" not in err
