"""JSON lines read, written and resumed, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hybridgen.cli.jsonl import Job, ResultFile, failure, model_settings, read_jobs, result, same_file, settings_of
from hybridgen.errors import HybridgenError, PromptError, SamplingError
from hybridgen.params import SamplingParams, choice_seed


def record(job: Job, error: str | None = None) -> dict[str, Any]:
    timing = SimpleNamespace(queue=0.1, ttft=None, total=1.0, token_times=[])
    completion: Any = SimpleNamespace(
        timing=timing, text="t\u2028é", token_ids=(1, 2), finish_reason="length", seed=0, error=error, steps=[]
    )
    return result(job, completion)


def line(job: Job, error: str | None = None) -> bytes:
    return json.dumps(record(job, error), ensure_ascii=False).encode()


def opened(path: Path, *jobs: Job) -> list[bool]:
    """Which jobs are done according to the file."""
    file = ResultFile(path)
    done = [file.has(job) for job in jobs]
    file.close()
    return done


A, B, C = Job("a", "x"), Job(2, [1, 2]), Job({"n": 1, "m": 2}, "é\u2028")


def test_reads_prompts(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    lines = ['"x"', "", json.dumps({"prompt": [1], "id": None}) + "\r", json.dumps({"messages": chat})]
    path.write_bytes("\n".join(lines).encode())
    assert read_jobs(path) == [Job(1, "x"), Job(None, [1]), Job(4, chat)]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_lines_end_only_at_newlines(tmp_path: Path, character: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"id": character, "prompt": f"a{character}b"}, ensure_ascii=False), encoding="utf-8")
    (job,) = read_jobs(path)
    assert job == Job(character, f"a{character}b")
    output = tmp_path / "out.jsonl"
    output.write_bytes(line(job) + b"\n")
    assert opened(output, job) == [True]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"id": 2, "prompt": "x"}\n"y"\n', "in.jsonl:2 has the id 2, as line 1 has"),
        (b'{"id": "z", "prompt": "x"}\n\n{"id": "z", "prompt": "y"}\n', 'in.jsonl:3 has the id "z", as line 1 has'),
        (
            b'{"id": {"n": 1, "m": 2}, "prompt": "x"}\n{"id": {"m": 2, "n": 1}, "prompt": "y"}\n',
            "in.jsonl:2 has the id",
        ),
        (b"", "no prompts in"),
        (b"\n \n", "no prompts in"),
        (b'"x\xff"\n', "is not UTF-8"),
        (b'{"id": "a", "prompt": "x \\ud800"}\n', "in.jsonl:1 has half of a surrogate pair"),
        (b'{"id": ["\\ud800"], "prompt": "x"}\n', "in.jsonl:1 has half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n', "in.jsonl:1 has half of a surrogate pair"),
        (b'{"prompt": 5}\n{"prompt": 6}\n', "in.jsonl:1: 'prompt' must be a string or a list"),
        (b'{"messages": "hi"}\n', "in.jsonl:1: 'messages' must be a list"),
        (b"[" * 100_000, "in.jsonl:1 is not JSON"),
        (b"1" * 5000, "in.jsonl:1 is not JSON"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(PromptError) as caught:
        read_jobs(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_surrogate_pair_is_text(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'"\\ud83d\\ude00"')
    assert read_jobs(path) == [Job(1, "\U0001f600")]


def test_appends_and_knows_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    file = ResultFile(path)
    assert not any(map(file.has, (A, B, C)))
    for job, error in [(A, None), (B, "NaN logits"), (C, None)]:
        file.append(record(job, error))
    file.close()
    assert path.read_bytes().split(b"\n")[:-1] == [line(A), line(B, "NaN logits"), line(C)]
    assert "ttft_s" not in json.loads(line(A))["timing"]
    assert opened(path, A, B, C) == [True, False, True]
    assert opened(path, Job({"m": 2, "n": 1}, C.prompt)) == [True]


def test_every_cut_of_a_result_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for first in (b"", line(A) + b"\n"):
        for job in (B, C, Job("é", "y"), Job(None, "y")):
            for length in range(len(line(job))):
                path.write_bytes(first + line(job)[:length])
                assert opened(path, A, job) == [bool(first), False]
                assert path.read_bytes() == first, line(job)[:length]


def test_a_whole_result_gets_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(line(A) + b"\n" + line(C))
    assert opened(path, A, C) == [True, True]
    assert path.read_bytes() == line(A) + b"\n" + line(C) + b"\n"


@pytest.mark.parametrize(
    ("content", "number"),
    [
        (b"my precious notes, without a newline", 1),
        (b"my notes\n", 1),
        (b'{"id": "a", "prompt": "x"}', 1),
        (b'{"id": "a", "prompt": "x"}\n', 1),
        (b'{"id": "a", "prompt": "caf\xe9"}', 1),
        (b'{"id": 1, "name": "cut sho', 1),
        (b'{"id": 1}, {"id": 2}', 1),
        (b'{"id": some notes', 1),
        (b'"import os"', 1),
        (b"\xff\xfe\n", 1),
        (b"\xff\xfe", 1),
        (b"\n", 1),
        (b"null\n", 1),
        (line(A) + b"\nnotes", 2),
        (line(A) + b'\nnotes\n{"id": 3, "pro', 2),
        (b"notes\n" + line(A)[:30], 1),
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, content: bytes, number: int) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=rf"notes\.txt:{number} is not a result .* name another --output"):
        ResultFile(path)
    assert path.read_bytes() == content


def test_an_id_with_a_result_for_another_prompt(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(line(A) + b"\n" + line(B, "failed") + b"\n")
    with pytest.raises(PromptError, match='the id "a" for another prompt'):
        opened(path, Job("a", "y"))
    assert opened(path, Job(B.id, "y")) == [False], "a failed result does not hold its id"


@pytest.mark.parametrize("name", ["no/such/dir/o.jsonl", ".", "file/o.jsonl", "n" * 300, "loop"])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(PromptError, match=r"--output .* cannot be used: "):
        ResultFile(tmp_path / name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk() -> None:
    file = ResultFile(Path("/dev/full"))
    with pytest.raises(HybridgenError, match="/dev/full cannot be written: No space left"):
        file.append(record(A))
    with pytest.raises(HybridgenError, match="cannot be written"):
        file.close()


def test_same_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "soft").symlink_to("a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    (tmp_path / "b").touch()
    for name in ("a", "soft", "hard", "../" + tmp_path.name + "/a"):
        assert same_file(tmp_path / "a", tmp_path / name)
    assert not same_file(tmp_path / "a", tmp_path / "b")
    assert not same_file(tmp_path / "a", tmp_path / "new")
    assert same_file(tmp_path / "new", tmp_path / "." / "new")


BOM = "\ufeff"


@pytest.mark.parametrize(
    "content",
    [
        f'{BOM}{{"prompt": "x"}}\r\n"y"\r\n'.encode(),
        f'{BOM}{{"prompt": "x"}}\r\n{BOM}"y"\r\n'.encode(),
        '{"prompt": "x"}\r\n"y"\r\n'.encode("utf-16"),
        f'{BOM}{{"prompt": "x"}}\r\n"y"\r\n'.encode("utf-16-le"),
        f'{BOM}{{"prompt": "x"}}\n"y"'.encode(),
        f'{BOM}{{"prompt": "x"}}\r\n"y"\r\n'.encode("utf-16-be"),
    ],
)
def test_byte_order_marks_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert read_jobs(tmp_path / "in.jsonl") == [Job(1, "x"), Job(2, "y")]


def test_results_with_a_byte_order_mark_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(BOM.encode() + line(A) + b"\n" + line(C) + b"\n")
    assert opened(path, A, C) == [True, True]
    path.write_bytes(BOM.encode() + line(A)[:20])
    assert opened(path, A) == [False]


def test_a_lines_sampling_fields_go_before_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [
        {"prompt": "x"},
        {"prompt": "y", "temperature": 0.5, "logit_bias": {"3": -1}, "stop": "z"},
        {"prompt": "z", "n": 2, "seed": 2**63 - 1},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second, third, fourth = read_jobs(path, {"temperature": 0.9, "seed": 1})
    assert first == Job(1, "x", SamplingParams(temperature=0.9, seed=1))
    assert second.sampling == SamplingParams(temperature=0.5, seed=1, logit_bias={3: -1.0}, stop=["z"])
    assert [third.choice, fourth.choice] == [0, 1]
    assert [third.sampling.seed, fourth.sampling.seed] == [2**63 - 1, choice_seed(2**63 - 1, 1)]
    assert third.key != fourth.key
    with pytest.raises(SamplingError, match="temperature=-1"):
        read_jobs(path, {"temperature": -1})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "x", "temprature": 1}, "in.jsonl:2: sampling: unknown keyword 'temprature'; did you mean"),
        ({"prompt": "x", "text": "y"}, "in.jsonl:2: sampling: unknown keyword 'text'"),
        ({"prompt": "x", "temperature": -1}, "in.jsonl:2: temperature=-1"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "in.jsonl:2: logit_bias has the key 'a'"),
        ({"prompt": "x", "stop": 5}, "in.jsonl:2: stop=5"),
        ({"prompt": "x", "model": "other"}, "in.jsonl:2: sampling: unknown keyword 'model'"),
    ],
)
def test_keys_that_are_no_sampling_fields_are_refused(tmp_path: Path, line: dict[str, Any], words: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('"fine"\n' + json.dumps(line))
    with pytest.raises(PromptError, match=words):
        read_jobs(path)
    fine, bad = read_jobs(path, skip=True)
    assert fine == Job(1, "fine")
    assert bad.problem is not None
    assert words in bad.problem
    assert (bad.id, failure(bad, bad.problem)["error"]) == (2, bad.problem)


def test_results_of_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    path, model = tmp_path / "out.jsonl", {"model": "a/b"}
    job = Job("a", "x", SamplingParams(temperature=0.5, seed=1))
    file = ResultFile(path)
    file.append(record(job) | {"settings": settings_of(job, model)})
    file.append(record(B))
    file.close()
    file = ResultFile(path)
    assert file.has(job, settings_of(job, model))
    with pytest.raises(PromptError, match=r"other settings \(model: 'a/b' there, 'c/d' here\)"):
        file.has(job, settings_of(job, {"model": "c/d"}))
    other = job._replace(sampling=SamplingParams(temperature=0.9))
    with pytest.raises(PromptError, match=r"\(seed: 1 there, not set here; temperature: 0.5 there, 0.9 here\)"):
        file.has(other, settings_of(other, model))
    with pytest.raises(PromptError, match="does not say of which model"):
        file.has(B, settings_of(B, model))
    file.close()


def test_another_models_files_are_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = model_settings(str(tmp_path))
    assert model_settings(str(tmp_path / ".")) == before
    (tmp_path / "trainer_state.json").write_text("{}")
    assert model_settings(str(tmp_path), dtype=None) == before
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert model_settings(str(tmp_path)) != before
    assert model_settings("owner/name", revision="main") == {"model": "owner/name", "revision": "main"}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = ResultFile(path)
    first.append(record(A))
    with pytest.raises(PromptError, match=r"out.jsonl is being written by another process"):
        ResultFile(path)
    first.close()
    assert opened(path, A) == [True]
    with pytest.raises(PromptError):
        opened(path, Job(A.id, "another prompt"))
    path.write_text("notes\n")
    with pytest.raises(PromptError, match="is not a result"):
        ResultFile(path)
    with pytest.raises(PromptError, match="is not a result"):  # not locked by the one that failed
        ResultFile(path)
