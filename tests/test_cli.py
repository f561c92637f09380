"""The command, run in this process and as one of its own."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybridgen.cli import main
from hybridgen.demo import model_path

FAST = ["--mode", "eager", "--max-new-tokens", "6", "--dtype", "float32", "--max-batch", "4", "--kv-memory", "16MiB"]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(["generate", *map(str, arguments), *FAST])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prints_the_prompt_with_its_text_and_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "def read(path):", "--stats")
    assert code == 0
    assert out.startswith("def read(path):")
    assert len(out.strip()) > len("def read(path):")
    assert "[6 tokens in" in err
    assert "finish: length]" in err
    assert "KV cache" in err


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "import os", "class A:", "--json", "--seed", "3", "--temperature", "0.9")
    records = {record["id"]: record for record in map(json.loads, out.splitlines())}
    assert code == 0
    assert {record["prompt"] for record in records.values()} == {"import os", "class A:"}
    assert all(record["seed"] == 3 and len(record["token_ids"]) == 6 for record in records.values())
    assert records[0]["timing"]["ttft_s"] > 0
    assert records[0]["steps"][0]["phase"] == "prefill"


def test_streams_text_and_events(capsys: pytest.CaptureFixture[str]) -> None:
    _, plain, _ = run(capsys, "import os")
    _, streamed, err = run(capsys, "import os", "--stream")
    assert streamed.strip() == plain.removeprefix("import os").strip()
    assert "[6 tokens in" in err
    _, out, _ = run(capsys, "import os", "--stream", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert len(events) == 6
    assert "".join(event["text"] for event in events) == events[-1]["completion"]["text"]


def test_reads_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f(x):\n"))
    code, out, _ = run(capsys)
    assert code == 0
    assert out.startswith("def f(x):\n")


def write_jobs(path: Path, count: int = 5) -> Path:
    lines: list[Any] = ["import os", {"prompt": "class A:", "id": "a"}, {"prompt": [5, 6, 7]}]
    lines += [{"prompt": f"x = {i}\n", "id": {"n": i}} for i in range(count - 3)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_resumes_where_it_stopped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs, output = write_jobs(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert run(capsys, "--input", jobs, "--output", output)[0] == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(json.dumps(record["id"]) for record in records) == ['"a"', "1", "3", '{"n": 0}', '{"n": 1}']
    # As a killed run leaves it: two results and half a line.
    kept = output.read_text().splitlines()[:2]
    output.write_text("\n".join(kept) + '\n{"id": 3, "pro')
    code, _, err = run(capsys, "--input", jobs, "--output", output)
    assert code == 0
    assert "2 of 5 prompts are already in" in err
    resumed = output.read_text().splitlines()
    assert resumed[:2] == kept
    by_id = {json.dumps(record["id"]): record["token_ids"] for record in map(json.loads, resumed)}
    assert by_id == {json.dumps(record["id"]): record["token_ids"] for record in records}
    assert len(resumed) == 5
    assert run(capsys, "--input", jobs, "--output", output)[1] == ""
    assert output.read_text().splitlines() == resumed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--model", "/no/such/model"], "/no/such/model"),
        (["x", "--mode", "fast"], "mode='fast'"),
        (["x", "--temperature", "-1"], "temperature=-1.0"),
        (["x", "--device", "cuda:99"], "cuda:99"),
        (["x", "--input", "jobs.jsonl"], "not both"),
        (["--input", "missing.jsonl"], "missing.jsonl"),
        ([""], "empty"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code = main(["generate", *arguments])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert words in captured.err


@pytest.mark.parametrize("line", ["{", "5", '{"text": "x"}', '{"prompt": "x", "messages": []}'])
def test_a_bad_line_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str) -> None:
    jobs = tmp_path / "in.jsonl"
    jobs.write_text(f'"fine"\n{line}\n')
    code, _, err = run(capsys, "--input", jobs)
    assert code == 2
    assert "in.jsonl:2" in err


def test_an_output_of_something_else_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs, output = write_jobs(tmp_path / "in.jsonl"), tmp_path / "notes.txt"
    output.write_text("my notes\n")
    code, _, err = run(capsys, "--input", jobs, "--output", output)
    assert code == 2
    assert "name another --output" in err
    assert output.read_text() == "my notes\n"


def test_python_m_hybridgen_in_a_pipe() -> None:
    command = [sys.executable, "-m", "hybridgen", "generate", "import os", "--model", str(model_path()), *FAST]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0
    assert done.stdout.startswith("import os")
    assert len(done.stderr.splitlines()) == 1, "no progress bars and no warnings in a pipe"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["ok"]
    assert findings["mode eager"]["ok"]
    assert {"cuda", "compiler", "cache", "mode jit", "triton"} <= set(findings)
    assert all(finding["detail"] for finding in findings.values())
