"""`hybridgen score`: files in, JSON lines out, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hybridgen
from hybridgen.cli import main

OPTIONS = ["--mode", "eager", "--dtype", "float32", "--device", "cpu", "--kv-memory", "32MiB", "--max-batch", "4"]


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_it_scores_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "def f(a, b):\n    return"
    source = write(
        tmp_path / "in.jsonl",
        {"id": "sum", "prompt": prompt, "completion": " a + b"},
        "",
        {"prompt": [4, 5, 6], "completion": [7]},
        '"import os"',
    )
    assert main(["score", *OPTIONS, "--input", source]) == 0
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in printed.splitlines()]
    assert [record["id"] for record in records] == ["sum", 3, 4]
    fields = {"mode": "eager", "dtype": "float32", "device": "cpu", "kv_memory": "32MiB", "max_batch": 4}
    score = hybridgen.score(None, prompt, " a + b", **fields)
    assert records[0]["logprobs"] == pytest.approx(list(score.logprobs), abs=1e-5)
    assert records[0]["sum"] == pytest.approx(score.sum, abs=1e-4)
    assert records[0]["perplexity"] == pytest.approx(score.perplexity, rel=1e-4)
    assert records[0]["is_greedy"] == list(score.is_greedy)
    assert records[0]["token_ids"] == list(score.token_ids)
    assert (records[1]["token_ids"], records[1]["prompt_tokens"], records[1]["error"]) == ([7], 3, None)
    assert records[2]["prompt_tokens"] == 1
    output = tmp_path / "out.jsonl"
    assert main(["score", *OPTIONS, "--input", source, "--output", str(output)]) == 0
    assert capsys.readouterr().out == ""
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["token_ids"] for record in again] == [record["token_ids"] for record in records]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no prompts"),
        (["{"], "in.jsonl:1 is not JSON"),
        ([{"completion": "x"}], "in.jsonl:1 must be a string"),
        ([{"prompt": "x", "temperature": 1}], "in.jsonl:1 must be a string"),
        ([{"prompt": "x y", "completion": ""}], "empty completion"),
        ([{"prompt": [1], "completion": "x"}], "both as ids"),
    ],
)
def test_a_wrong_file_is_refused(
    lines: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", *OPTIONS, "--input", write(tmp_path / "in.jsonl", *lines)]) == 2
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", '"import os"')
    assert main(["score", *OPTIONS, "--input", source, "--output", source]) == 2
    assert "is the --input file" in capsys.readouterr().err
    assert main(["score", *OPTIONS, "--input", source, "--output", str(tmp_path / "no" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["score", *OPTIONS, "--input", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
