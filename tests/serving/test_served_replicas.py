"""`hybridgen serve --replicas 2` on a CPU: one door, two generator processes behind it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from places import short_directory
from waiting import until
from wire import Process

import hybridgen
from hybridgen import FinishReason, PromptError

PROMPTS = [f"def f{number}(x):" for number in range(8)]
DRAWN = {"max_new_tokens": 12, "temperature": 0.9, "seed": 5, "n": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def two() -> Iterator[Process]:
    process = Process(short_directory(), "--replicas", "2", "--max-batch", "4")
    try:
        yield process
        pids = replicas(process)
    finally:
        status = process.end()
    assert len(pids) == 2
    assert status == 0, process.log()
    assert "Traceback" not in process.log()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def replicas(process: Process) -> list[int]:
    """Process ids of the generator processes behind the door."""
    listed = subprocess.run(
        ["ps", "-ww", "--ppid", str(process.facts["pid"]), "-o", "pid=,args="], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "replicas.child" in line]


def ids(completions: list[hybridgen.Completion]) -> list[list[int]]:
    return [list(choice.token_ids) for completion in completions for choice in completion.choices]


def test_the_tokens_are_those_of_one_engine(two: Process, engine: hybridgen.Engine) -> None:
    expected = ids(engine.generate(PROMPTS, **DRAWN))
    with two.client() as client:
        assert client.server["max_batch"] == 8
        assert ids(client.generate(PROMPTS, **DRAWN)) == expected
        found: dict[tuple[int, int], list[int]] = {}
        for event in client.stream(PROMPTS, **DRAWN):
            if event.token_id is not None:
                found.setdefault((event.index, event.choice), []).append(event.token_id)
        assert [found[key] for key in sorted(found)] == expected
        one = client.generate(PROMPTS[0], max_new_tokens=3)
        assert one.prompt_token_ids == engine.generate(PROMPTS[0], max_new_tokens=3).prompt_token_ids
        until(lambda: client.stats()["engine"]["requests"]["submitted"] == 4 * len(PROMPTS) + 1)
        assert client.stats()["engine"]["replicas"] == 2


def test_a_prompt_that_cannot_be_run_is_refused_before_any_runs(two: Process) -> None:
    with two.client() as client:
        with pytest.raises(PromptError, match="prompt 1 "):
            client.generate(["a", ""], max_new_tokens=2)
        good, bad = client.generate(["a", ""], max_new_tokens=2, errors="return")
    assert len(good.token_ids) == 2
    assert isinstance(bad.error, PromptError)


def test_what_is_not_wanted_any_more_is_cancelled(two: Process) -> None:
    with two.client() as client:
        stream = client.stream(PROMPTS * 4, max_new_tokens=500, ignore_eos=True)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        until(lambda: client.stats()["engine"]["running"] == 0 and client.stats()["server"]["in_flight"] == 0)
        assert client.generate("x", max_new_tokens=2).finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_a_killed_replica_loses_and_doubles_nothing(two: Process, engine: hybridgen.Engine) -> None:
    how = DRAWN | {"max_new_tokens": 40, "n": 1}
    expected = ids(engine.generate(PROMPTS, **how))
    found: dict[int, list[int]] = {}
    with two.client() as client:
        for count, event in enumerate(client.stream(PROMPTS, **how)):
            if count == 20:
                os.kill(replicas(two)[0], signal.SIGKILL)
            if event.token_id is not None:
                found.setdefault(event.index, []).append(event.token_id)
        until(lambda: client.stats()["engine"]["restarts"] == 1)
        until(lambda: len(replicas(two)) == 2)
    assert [found[index] for index in range(len(PROMPTS))] == expected


def test_a_replica_that_dies_with_nothing_to_do_is_started_again(two: Process) -> None:
    with two.client() as client:
        before = client.stats()["engine"]["restarts"]
        until(lambda: client.stats()["server"]["in_flight"] == 0)
        os.kill(replicas(two)[0], signal.SIGKILL)
        until(lambda: client.stats()["engine"]["restarts"] == before + 1 and len(replicas(two)) == 2)
