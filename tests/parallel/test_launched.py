"""Programs that a launcher runs on every rank: all make the same calls, and get the same results."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import families
import forks
import pytest
from waiting import HANGS

from hybridgen import Completion, ConfigError, DeviceError, Engine
from hybridgen.core import FinishReason, Timing
from hybridgen.engine.launched import _error_made, _error_value
from hybridgen.errors import Interrupted
from hybridgen.loading.checkpoint import CannotQuantise
from hybridgen.parallel import launched

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "tensor_parallel": 2,
    "mode": "graph",
    "max_context": 64,
    "kv_memory": "8MiB",
    "max_batch": 2,
    "decode_buckets": [1, 2],
    "prefill_buckets": [],
    "token_budget": 32,
}
PROMPTS = [[5, 6, 7], [9, 8]]
WANTED: dict[str, Any] = {"max_new_tokens": 5, "logprobs": 2, "temperature": 0.8, "seed": 3, "n": 2}
BEGIN = f"""
import json, os, sys, time
import hybridgen
rank, path, config, prompts = int(os.environ["RANK"]), sys.argv[1], {CONFIG!r}, {PROMPTS!r}
def told(completion):
    choices = [[each.token_ids, each.logprobs, str(each.finish_reason), each.text] for each in completion.choices]
    return [choices, completion.prompt_token_ids, completion.seed]
def show(value):
    print(json.dumps(value, default=lambda each: list(each) if isinstance(each, tuple) else str(each)), flush=True)
"""
SAME = """
with hybridgen.Engine.load(path, **config) as engine:
    for _ in range(2):
        show([told(each) for each in engine.generate(prompts, **WANTED)])
    show(engine.score([5, 6, 7, 8]).logprobs)
    try:
        engine.generate([[10**9]])
    except hybridgen.PromptError as error:
        show(str(error))
    if rank:
        engine.follow()
        try:
            engine.generate(prompts)
        except hybridgen.EngineError as error:
            assert "it has closed the engine" in str(error)
    else:
        assert len(list(engine.stream(prompts, max_new_tokens=3))) == 6
show(engine.rank)
""".replace("WANTED", repr(WANTED))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("launched"))


def start(path: Path, code: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """A program on every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(count):
        place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        variables = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        command = [sys.executable, "-c", BEGIN + code, str(path)]
        pipe = subprocess.PIPE
        found.append(forks.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    return found


def ends(processes: list[subprocess.Popen[str]], seconds: float = HANGS) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    until = time.monotonic() + seconds
    try:
        said = [process.communicate(timeout=max(0.1, until - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


def test_all_ranks_get_what_one_process_gives(path: Path) -> None:
    (status, first, errors), (other, second, more) = ends(start(path, SAME))
    assert (status, other) == (0, 0), errors + more
    lines, others = ([json.loads(line) for line in said.splitlines()] for said in (first, second))
    assert lines[:-1] == others[:-1]
    assert (lines[-1], others[-1]) == (0, 1)
    with Engine.load(path, **CONFIG | {"tensor_parallel": 1, "mode": "eager"}) as engine:
        done = engine.generate(PROMPTS, **WANTED)
    assert [[choice[0] for choice in each[0]] for each in lines[0]] == [
        [list(choice.token_ids) for choice in each.choices] for each in done
    ]


LOST = """
engine = hybridgen.Engine.load(path, **config)
try:
    while True:
        engine.generate(prompts, max_new_tokens=20)
        show(os.getpid())
except hybridgen.EngineError as error:
    show(str(error))
    engine.close()
"""


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_is_an_error_of_the_others(lost: int, path: Path) -> None:
    processes = start(path, LOST)
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str(process.pid)
    began = time.monotonic()
    processes[lost].send_signal(signal.SIGKILL)
    status, said, errors = ends(processes)[1 - lost]
    assert time.monotonic() - began < HANGS / 2  # and not an hour, as long as a collective may take
    assert status == 0, errors
    assert ("rank 0 has closed the engine, or is gone" if lost == 0 else "rank 1 has left the group") in said


def test_ranks_that_ask_for_something_else(path: Path) -> None:
    code = """
try:
    hybridgen.Engine.load(path, **config | {"max_context": 32 + rank})
except hybridgen.ConfigError as error:
    show(str(error))
"""
    for status, said, errors in ends(start(path, code)):
        assert status == 0, errors
        assert "with max_context=33, and rank 0 with 32; all ranks must ask for the same" in said


def test_what_rank_zero_raises_comes_whole() -> None:
    timing = Timing(queue=None, ttft=None, total=1.0)
    cut = Completion(
        text="a", token_ids=(5,), prompt_token_ids=(6, 7), finish_reason=FinishReason.CANCELLED, seed=1, timing=timing
    )
    sent = json.loads(json.dumps(_error_value(Interrupted("stopped", [cut]))))
    made = _error_made(sent)
    assert isinstance(made, Interrupted)
    assert (str(made), made.completions[0].token_ids) == ("stopped", (5,))
    assert type(_error_made(_error_value(CannotQuantise("a", "b")))) is ConfigError


@pytest.fixture
def rank_one(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is rank 1 of two."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    return monkeypatch


def test_places(rank_one: pytest.MonkeyPatch) -> None:
    assert launched.find_place(1) is None
    assert launched.find_place(2) == (1, 2, 1, 0)
    for name, value in {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        rank_one.setenv(name, value)
    assert launched.find_place(2) == (0, 2, 2, 6)
    for size, match in ((3, "both must be multiples of 3"), (8, "4 of them on this host")):
        with pytest.raises(ConfigError, match=match):
            launched.find_place(size)
    rank_one.setenv("RANK", "two")
    with pytest.raises(ConfigError, match="are not numbers"):
        launched.find_place(2)


def test_a_port_where_nobody_is(path: Path, rank_one: pytest.MonkeyPatch) -> None:
    rank_one.setattr(launched, "_JOIN_SECONDS", 1.0)
    with pytest.raises(DeviceError, match=r"do not find each other through 127\.0\.0\.1:1"):
        Engine.load(path, **CONFIG)


@pytest.mark.slow
def test_torchrun(path: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(BEGIN + SAME)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == 10
    assert sum(lines.count(line) == 1 for line in lines) == 2
