"""Shards: every prompt in one of them, the tokens of no matter which, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest

from hybridgen.cli import main
from hybridgen.cli.jsonl import Job, read_jobs
from hybridgen.cli.shards import Shard, seeded

MODEL = ["--mode", "eager", "--dtype", "float32", "--device", "cpu", "--kv-memory", "32MiB"]
HOW = ["--max-new-tokens", "4", "--temperature", "0.9", "--seed", "3"]


def prompts(path: Path, count: int = 6) -> Path:
    file = path / "in.jsonl"
    file.write_text("".join(json.dumps({"id": f"row {i}", "prompt": f"def f{i}():"}) + "\n" for i in range(count)))
    return file


def results(path: Path) -> dict[Any, list[int]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {record["id"]: record["token_ids"] for record in records}
    assert len(found) == len(records)
    return found


def test_shards_merged_are_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, two, one = prompts(tmp_path), tmp_path / "two", tmp_path / "one"
    assert main(["generate", "--input", str(file), "--output", str(one), "--shard", "0/1", *MODEL, *HOW]) == 0
    assert main(["generate", "--input", str(file), "--output", str(two), "--shard", "0/2", *MODEL, *HOW]) == 0
    assert main(["merge", str(two), "--output", str(tmp_path / "all.jsonl")]) == 2
    assert "lacks shards that are done: 1/2" in capsys.readouterr().err
    assert main(["generate", "--input", str(file), "--output", str(two), "--shard", "1/2", *MODEL, *HOW]) == 0
    assert main(["merge", str(two), "--output", str(tmp_path / "all.jsonl")]) == 0
    found = results(tmp_path / "all.jsonl")
    assert len(found) == 6
    assert found == results(one / "shard-00000-of-00001.jsonl")
    assert not list(two.glob("*.part"))
    assert main(["merge", str(two), "--output", str(tmp_path / "all.jsonl")]) == 2  # it is there


KILLED = """
import os, signal, sys
import hybridgen.cli.jobs as jobs
from hybridgen.cli import main
jobs.finish = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
"""The command, killed before it gives the file its name."""


def test_a_killed_shard_goes_on(tmp_path: Path) -> None:
    file, directory = prompts(tmp_path, 12), tmp_path / "out"
    command = ["generate", "--input", str(file), "--output", str(directory), "--shard", "0/1", *MODEL, *HOW]
    # Not from the checkout, whose demo model would be another one than that of the installed package.
    done = forks.run([sys.executable, "-c", KILLED, *command], cwd=tmp_path, stderr=subprocess.DEVNULL, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (directory / "shard-00000-of-00001.jsonl").exists()
    part = directory / "shard-00000-of-00001.part"
    all_lines = part.read_bytes().splitlines(keepends=True)
    kept = b"".join(all_lines[:5])
    part.write_bytes(kept + all_lines[5][:20])  # as if it had been killed while it wrote the sixth
    assert main(command) == 0
    whole = (directory / "shard-00000-of-00001.jsonl").read_bytes()
    assert whole.startswith(kept)
    assert results(directory / "shard-00000-of-00001.jsonl") == {
        record["id"]: record["token_ids"] for record in map(json.loads, all_lines)
    }


@pytest.mark.parametrize("shard", ["2/2", "0/0", "1", "-1/2", "a/b", ""])
def test_a_shard_that_is_none(shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--input", str(prompts(tmp_path)), "--output", str(tmp_path / "out"), f"--shard={shard}"]
    assert main(command) == 2
    assert "--shard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    command = ["generate", "--input", str(prompts(tmp_path)), "--output", str(tmp_path / "out"), "--shard", "0/2"]
    assert main(command) == 2
    assert "cannot be a directory" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_somebody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    command = ["generate", "--input", str(prompts(tmp_path)), "--output", str(tmp_path / "out"), "--shard", "0/2"]
    assert main(command) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_every_prompt_is_in_one_shard_and_keeps_its_seed() -> None:
    jobs = [Job(number, "a") for number in range(500)]
    shares = [sum(Shard(index, 4).has(job) for job in jobs) for index in range(4)]
    assert sum(shares) == 500
    assert min(shares) > 80
    seeds = [seeded(job, 1).sampling.seed for job in jobs]
    assert len(set(seeds)) == 500
    assert seeds == [seeded(job, 1).sampling.seed for job in jobs]
    assert seeds[0] != seeded(jobs[0], 2).sampling.seed


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")
    table = pyarrow.table({"id": ["a", "b"], "prompt": ["x", "y"], "max_new_tokens": [3, None]})
    parquet.write_table(table, tmp_path / "in.parquet")
    first, second = read_jobs(tmp_path / "in.parquet")
    assert (first.id, first.prompt, first.sampling.max_new_tokens) == ("a", "x", 3)
    assert (second.id, second.prompt, second.sampling.max_new_tokens) == ("b", "y", None)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["generate", "--input", str(tmp_path / "in.parquet")]) == 2
    assert "hybridgen[data]" in capsys.readouterr().err
