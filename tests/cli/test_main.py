"""The command, run in this process and as one of its own."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest

from hybridgen.cli.main import main
from hybridgen.demo import model_path
from hybridgen.params import choice_seed

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
    assert streamed == plain
    assert "[6 tokens in" in err
    _, out, _ = run(capsys, "import os", "--stream", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert len(events) == 6
    assert "".join(event["text"] for event in events) == events[-1]["completion"]["text"]


def test_streams_one_prompt_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for output in ([], ["--output", tmp_path / "out.jsonl"]):
        code, out, err = run(capsys, "import os", "class A:", "--stream", *output, "--model", "/no/such/model")
        assert (code, out) == (2, "")
        assert "--stream prints the text of one prompt and there are 2; add --json" in err
    code, out, _ = run(capsys, "import os", "class A:", "--stream", "--json")
    assert code == 0
    assert {json.loads(line)["id"] for line in out.splitlines()} == {0, 1}


@pytest.mark.parametrize("how", [["--json"], ["--stream"], ["--stream", "--json"], []])
def test_prints_and_writes_an_output(capsys: pytest.CaptureFixture[str], tmp_path: Path, how: list[str]) -> None:
    output = tmp_path / "out.jsonl"
    code, out, _ = run(capsys, "import os", *how, "--output", output)
    assert code == 0
    (record,) = map(json.loads, output.read_text().splitlines())
    lines = [json.loads(line) for line in out.splitlines()] if "--json" in how else []
    if how == ["--json"]:
        assert lines == [record]
    elif how == ["--stream"]:
        assert out == f"import os{record['text']}\n"
    elif how:
        assert lines[-1]["completion"] == record
    else:
        assert out == ""


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
        (["x", "--output", "no/such/dir/o.jsonl", "--model", "/no/such/model"], "no/such/dir/o.jsonl cannot be used"),
        (["x", "--output", ".", "--model", "/no/such/model"], "Is a directory"),
        (["x", "abc\udcff"], "prompt 1 is not text"),
        (["x", "--stop", "\udcff"], "--stop is not text"),
        (["--input", os.devnull], "no prompts in /dev/null"),
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


def test_notes_without_a_newline_are_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs, output = write_jobs(tmp_path / "in.jsonl"), tmp_path / "notes.txt"
    for content in (b"my notes", b"caf\xe9\n"):
        output.write_bytes(content)
        code, _, err = run(capsys, "--input", jobs, "--output", output)
        assert code == 2
        assert "notes.txt:1 is not a result of this command; name another --output" in err
        assert output.read_bytes() == content


@pytest.mark.parametrize("name", ["in.jsonl", "link.jsonl"])
def test_the_input_is_no_output(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    jobs = tmp_path / "in.jsonl"
    jobs.write_text('{"id": "a", "prompt": "x"}')
    (tmp_path / "link.jsonl").symlink_to(jobs)
    code, _, err = run(capsys, "--input", jobs, "--output", tmp_path / name)
    assert code == 2
    assert "is the --input file" in err
    assert jobs.read_text() == '{"id": "a", "prompt": "x"}'


def test_a_result_without_its_newline_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    jobs.write_text('{"id": "a", "prompt": "x = \'\\u2028\'"}\n{"id": "b", "prompt": "import"}\n', encoding="utf-8")
    assert run(capsys, "--input", jobs, "--output", output)[0] == 0
    kept = output.read_bytes().split(b"\n")[0]
    output.write_bytes(kept)
    code, _, err = run(capsys, "--input", jobs, "--output", output)
    assert code == 0
    assert "1 of 2 prompts are already in" in err
    lines = output.read_bytes().split(b"\n")
    assert lines[0] == kept
    assert [json.loads(line)["id"] for line in lines[:-1]] in (["a", "b"], ["b", "a"])


def test_repeated_ids_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs = tmp_path / "in.jsonl"
    jobs.write_text('"x"\n{"id": 1, "prompt": "y"}\n')
    code, _, err = run(capsys, "--input", jobs, "--model", "/no/such/model")
    assert code == 2
    assert "in.jsonl:2 has the id 1, as line 1 has" in err


@pytest.mark.parametrize(
    ("encoding", "errors", "words"), [("utf-8", "strict", "not utf-8 text"), ("ascii", "surrogateescape", "not text")]
)
def test_standard_input_that_is_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, words: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff"), encoding=encoding, errors=errors))
    code, out, err = run(capsys, "--model", "/no/such/model")
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("how", [[], ["--json"], ["--stream"]])
def test_an_output_encoding_that_lacks_characters(monkeypatch: pytest.MonkeyPatch, how: list[str]) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["generate", "é = ", *how, *FAST]) == 0
    out = raw.getvalue().decode("ascii")
    if how == ["--json"]:
        assert json.loads(out)["prompt"] == "é = "
    else:
        assert out.startswith("\\xe9 = ")


def test_closed_streams(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    output = ["--output", str(tmp_path / "out.jsonl")]
    for more, words in [([], "name an --output"), ([*output, "--json"], "leave it open")]:
        assert main(["generate", "x", *more, "--model", "/no/such/model"]) == 2
        assert words in capsys.readouterr().err
    assert main(["doctor"]) == 2
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["generate", "import", *output, *FAST]) == 0
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["generate", "x", "--model", "/no/such/model"]) == 2
    assert sys.stdout.getvalue() == "", "no message takes the place of output"


@pytest.mark.parametrize(("target", "words"), [("| head -c 1", ""), ("> /dev/full", "cannot be written: No space")])
def test_output_that_goes_nowhere(target: str, words: str) -> None:
    command = shlex.join([*forks.command(), "-m", "hybridgen", "generate", "import os", "--stream", *FAST])
    shell = ["bash", "-c", f"set -o pipefail; {command} {target}"]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_python_m_hybridgen_in_a_pipe(tmp_path: Path) -> None:
    """Away from the checkout, whose package `-m` would take: its demo model is another than the installed one."""
    command = [sys.executable, "-m", "hybridgen", "generate", "import os", "--model", str(model_path()), *FAST]
    done = forks.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("import os")
    assert len(done.stderr.splitlines()) == 1, "no progress bars and no warnings in a pipe"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["ok"]
    assert findings["mode eager"]["ok"]
    assert {"hybridgen", "cuda", "compiler", "compile cache", "mode jit", "triton"} <= set(findings)
    assert all(finding["detail"] for finding in findings.values())


def test_lines_have_sampling_of_their_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs = tmp_path / "in.jsonl"
    lines = [{"prompt": "import os", "id": "a"}, {"prompt": "import os", "max_new_tokens": 2, "n": 2, "seed": 5}]
    lines[1]["temperature"] = 0.9
    jobs.write_text("\ufeff" + "\n".join(map(json.dumps, lines)))
    code, out, _ = run(capsys, "--input", jobs, "--json")
    assert code == 0
    found = {(record["id"], record.get("choice")): record for record in map(json.loads, out.splitlines())}
    assert {key: len(record["token_ids"]) for key, record in found.items()} == {("a", None): 6, (2, 0): 2, (2, 1): 2}
    assert [found[2, choice]["seed"] for choice in (0, 1)] == [5, choice_seed(5, 1)]


def test_a_prompt_that_cannot_run_is_an_error_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = ["import os", {"prompt": [5] * 5000, "id": "long"}, {"prompt": "x", "typo": 1}, {"prompt": [10**6]}, "y ="]
    jobs.write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    code, _, err = run(capsys, "--input", jobs, "--output", output)
    assert (code, output.exists()) == (2, False)
    assert "in.jsonl:3" in err
    code, _, _ = run(capsys, "--input", jobs, "--output", output, "--on-error", "skip")
    assert code == 1
    errors = {record["id"]: record["error"] for record in map(json.loads, output.read_text().splitlines())}
    assert {id: None if error is None else error.split(";")[0][:30] for id, error in errors.items()} == {
        1: None,
        "long": "prompt long has 5000 tokens an",
        3: f"{jobs}:3: sampling: unknown keyword"[:30],
        4: "prompt 4 holds token id 100000",
        5: None,
        6: f"{jobs}:6 is not JSON"[:30],
    }
    lines[1] = {"prompt": [5] * 5, "id": "long"}
    jobs.write_text("\n".join(json.dumps(lines[index]) if index in (0, 1, 4) else "" for index in range(5)))
    code, _, err = run(capsys, "--input", jobs, "--output", output, "--on-error", "skip")
    assert code == 0
    assert "2 of 3 prompts are already in" in err


def test_another_model_or_sampling_is_not_mixed_in(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert run(capsys, "import os", "--output", output)[0] == 0
    before = output.read_bytes()
    for more, words in ([["--top-k", "5"], "top_k: not set there, 5 here"], [["--model", "a/b"], "here"]):
        code, _, err = run(capsys, "import os", "--output", output, *more)
        assert code == 2
        assert words in err
        assert output.read_bytes() == before


FRESH = """
import gc, json, subprocess, sys, threading
from hybridgen.cli.imports import import_engine
import_engine()
found = {"enabled": gc.isenabled(), "frozen": gc.get_freeze_count()}
import hybridgen
from hybridgen.compilation import behind

started = []
Popen, Thread = subprocess.Popen.__init__, threading.Thread.start
subprocess.Popen.__init__ = lambda self, args, *more, **rest: started.append(args) or Popen(self, args, *more, **rest)
threading.Thread.start = lambda self: started.append(self.name.strip("0123456789-_")) or Thread(self)
for mode in ("eager", "hybrid"):
    modules, before = set(sys.modules), len(started)
    with hybridgen.Engine.load(mode=mode, device="cpu", max_batch=4, kv_memory="16MiB") as engine:
        for token in engine.stream("import os", max_new_tokens=40):
            found[mode] = sorted(set(sys.modules) - modules), started[before:], engine.stats().compiled
            break
found["hybrid compiles"] = behind.__name__ in sys.modules
parts = ("compile_fx", "codegen.cpp", "lowering", "scheduler")
found["compilers"] = [part for part in parts if f"torch._inductor.{part}" in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process says of its imports, and of what each mode does before its first token with nothing kept."""
    kept = {name: value for name, value in os.environ.items() if name != "HYBRIDGEN_COMPILE_CACHE"}
    environment = {**kept, "HYBRIDGEN_CACHE_DIR": str(tmp_path_factory.mktemp("cold"))}
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_collector_goes_on_after_imports_and_passes_over_what_they_made(fresh: dict[str, Any]) -> None:
    assert fresh["enabled"] is True
    assert fresh["frozen"] > 100_000


def test_before_its_first_token_a_cold_hybrid_on_a_cpu_does_as_eager_does(fresh: dict[str, Any]) -> None:
    """What compiles is neither imported nor started, though nothing is kept that could be loaded."""
    modules, started, compiled = fresh["hybrid"]
    assert modules == []
    assert started == fresh["eager"][1]
    assert compiled == 0
    assert fresh["hybrid compiles"]
    assert fresh["compilers"] == []
