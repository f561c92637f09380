"""Two replicas on a CPU: the tokens of one engine, whatever becomes of the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import forks
import pytest
from waiting import until

import hybridgen
from hybridgen import ConfigError, DeviceError, ModelNotFoundError, PromptError, Replicas, RequestError, SamplingParams
from hybridgen.serving.client.exchange import Call
from hybridgen.serving.replicas import replicas as module
from hybridgen.serving.replicas.jobs import Job, dealt
from hybridgen.serving.replicas.work import Work

CONFIG = {"mode": "eager", "dtype": "float32", "device": "cpu", "kv_memory": "32MiB", "max_batch": 4}
PROMPTS = [f"def f{number}(x):" for number in range(12)]


@pytest.fixture(scope="module", autouse=True)
def _forks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", forks.Popen)
        yield


@pytest.fixture(scope="module")
def two() -> Iterator[Replicas]:
    with Replicas(None, 2, **CONFIG) as replicas:
        yield replicas
    assert not any(alive(pid) for pid in replicas.pids)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ids(completions: list[hybridgen.Completion]) -> list[tuple[int, ...]]:
    return [tuple(choice.token_ids) for completion in completions for choice in completion.choices]


def test_the_tokens_are_those_of_one_engine(two: Replicas, engine: hybridgen.Engine) -> None:
    how = {"max_new_tokens": 6, "temperature": 0.9, "seed": 5, "n": 2}
    assert ids(two.generate(PROMPTS, **how)) == ids(engine.generate(PROMPTS, **how))
    stats = two.stats()
    assert stats["engine"]["requests"]["submitted"] == 2 * len(PROMPTS)
    assert [each["engine"]["requests"]["submitted"] > 0 for each in stats["replicas"]] == [True, True]


def test_scores_are_those_of_one_engine(two: Replicas, engine: hybridgen.Engine) -> None:
    there, here = two.score(PROMPTS[:3], ["\n"] * 3), engine.score(PROMPTS[:3], ["\n"] * 3)
    assert [score.sum for score in there] == pytest.approx([score.sum for score in here], abs=1e-4)


def test_a_killed_replica_loses_and_doubles_nothing(two: Replicas, engine: hybridgen.Engine) -> None:
    how = {"max_new_tokens": 24, "temperature": 0.9, "seed": 7, "ignore_eos": True}
    expected = ids(engine.generate(PROMPTS, **how))
    victim, restarts = two.pids[0], two.stats()["restarts"]
    before = two.stats()["engine"]["requests"].get("submitted", 0)  # none before the first
    tokens: dict[int, list[int]] = {}
    ended = []
    for count, event in enumerate(two.stream(PROMPTS, **how)):
        if count == 20:
            os.kill(victim, signal.SIGKILL)
        if event.token_id is not None:
            tokens.setdefault(event.index, []).append(event.token_id)
        if event.completion is not None:
            ended.append((event.index, tuple(event.completion.token_ids)))
    assert [found for _, found in sorted(ended)] == expected
    assert [tuple(tokens[index]) for index in range(len(PROMPTS))] == expected
    assert len(two.generate(PROMPTS, max_new_tokens=1)) == len(PROMPTS)
    stats = two.stats()
    assert stats["restarts"] == restarts + 1
    # What the process that died had reported still counts.
    assert stats["engine"]["requests"]["submitted"] >= before + len(PROMPTS) * 2


def test_a_prompt_that_cannot_be_run(two: Replicas) -> None:
    submitted = two.stats()["engine"]["requests"]["submitted"]
    with pytest.raises(PromptError, match="prompt 1 "):
        two.generate(["a", ""], max_new_tokens=2)
    assert two.stats()["engine"]["requests"]["submitted"] == submitted  # nothing ran
    good, bad = two.generate(["a", ""], max_new_tokens=2, errors="return")
    assert len(good.token_ids) == 2
    assert isinstance(bad.error, PromptError)
    assert str(bad.error).startswith("prompt 1 ")


def test_a_closed_stream_cancels(two: Replicas) -> None:
    stream = two.stream(PROMPTS, max_new_tokens=200, ignore_eos=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    until(lambda: two.stats()["engine"]["running"] == 0)


def test_a_prompt_under_which_replicas_die_is_run_alone_and_then_named() -> None:
    work = Work(Call(["aaa", "bb", "c"], None, {"max_new_tokens": 2}), [], 4, 8, stream=False)
    jobs = [work.pull(0, []) for _ in range(3)]
    assert [job and job.prompt for job in jobs] == ["aaa", "bb", "c"]
    bad, *others = [job for job in jobs if job is not None]
    work.give_back([bad, *others], "it died")
    assert work.pull(0, []) is bad
    work.give_back([bad], "it died")
    assert work.pull(0, [others[0]]) is None  # it has one chance left, and must not take others with it
    assert work.pull(0, []) is bad
    assert work.pull(0, [bad]) is None
    work.give_back([bad], "it died")
    assert [work.pull(0, []), work.pull(0, [others[0]])] == others
    for job in others:
        work.done(job)
    event = next(work.events())
    assert event.index == 0
    assert event.completion is not None
    assert isinstance(event.completion.error, RequestError)
    assert "prompt 0 ran on 3 replicas" in str(event.completion.error)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "some"])
def test_a_number_that_is_none(count: object) -> None:
    with pytest.raises(ConfigError, match="from 1"):
        Replicas(None, count)  # type: ignore[arg-type]


def test_all_without_gpus() -> None:
    with pytest.raises(ConfigError, match="give a number"):
        Replicas(None, "all", device="cpu")


def test_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_gpus", lambda: ["3", "5"])
    with pytest.raises(DeviceError, match="there are 2 GPUs"):
        Replicas(None, 3)
    assert module._environments("all", "auto") == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]


def test_what_cannot_go_to_another_process() -> None:
    with pytest.raises(ConfigError, match="on_graph_event"):
        Replicas(None, 1, device="cpu", on_graph_event=print)


def test_a_model_that_is_not_there_leaves_no_process() -> None:
    with pytest.raises(ModelNotFoundError):
        Replicas("/no/such/model", 1, device="cpu")
    found = subprocess.run(
        ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True
    ).stdout
    assert "/no/such/model" not in found


def test_the_end_of_the_parent_is_the_end_of_the_replicas() -> None:
    code = (
        "import hybridgen, time\n"
        f"r = hybridgen.Replicas(None, 1, **{CONFIG!r})\n"
        "print(*r.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, forks.INSIDE: "1"}
    parent = forks.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert pids
    until(lambda: not any(alive(pid) for pid in pids))


def jobs_of(*tokens: int, n: int = 1) -> list[Job]:
    return [Job(index, "a", SamplingParams(max_new_tokens=count, n=n)) for index, count in enumerate(tokens)]


def lengths(shares: list[deque[Job]]) -> list[list[int | None]]:
    return [[job.sampling.max_new_tokens for job in share] for share in shares]


def test_a_list_is_dealt_by_tokens_as_far_as_there_are_rows() -> None:
    assert lengths(dealt(jobs_of(9, 8, 7, 6, 5, 4), 2, 3)) == [[9, 6, 5], [8, 7, 4]]
    assert lengths(dealt(jobs_of(9, 1, 1, 1, 1), 2, 3)) == [[9, 1], [1, 1, 1]]
    assert lengths(dealt(jobs_of(9, 8, 7, 6, 5), 2, 2)) == [[9, 6], [8, 7]]
    assert lengths(dealt(jobs_of(9, 8, 7, n=3), 2, 4)) == [[9], [8]]
    assert lengths(dealt(jobs_of(3, 2), 0, 4)) == []


def test_the_first_replica_that_looks_takes_no_more_than_its_part() -> None:
    members: Any = [SimpleNamespace(number=0), SimpleNamespace(number=1)]
    call = Call(["a"] * 10, [SamplingParams(max_new_tokens=10 + index) for index in range(10)], {})
    work = Work(call, members, 2, 16, stream=False)
    running: dict[int, list[Job]] = {0: [], 1: []}

    def take(number: int) -> list[int]:
        while (job := work.pull(number, running[number])) is not None:
            running[number].append(job)
        return [job.index for job in running[number]]

    assert take(0) == [9, 6, 5, 4, 3]  # two that it was dealt, and then half of all
    assert take(1) == [8, 7, 2, 1, 0]
    for number in (0, 1):
        for job in running[number]:
            work.done(job)
    assert work.pull(0, []) is None


def test_what_comes_one_by_one_goes_to_whoever_has_less() -> None:
    members: Any = [SimpleNamespace(number=0), SimpleNamespace(number=1)]
    work = Work(None, members, 4, 8)
    first, second, third = jobs_of(5, 5, 5)
    work.add([first])
    assert work.pull(0, []) is first
    work.add([second])
    assert work.pull(0, [first]) is None
    assert work.pull(1, []) is second
    work.add([third])
    assert work.pull(1, [second]) is third


def test_an_idle_replica_takes_what_another_has_not_begun() -> None:
    members: Any = [SimpleNamespace(number=0), SimpleNamespace(number=1)]
    work = Work(Call(["a", "b"], None, {"max_new_tokens": 2}), members, 2, 4, stream=False)
    mine = work.pull(0, [])
    assert mine is not None
    assert work.pull(0, [mine]) is None
    work.done(mine)
    other = work.pull(0, [])  # replica 1 never came
    assert other is not None
    assert {mine.prompt, other.prompt} == {"a", "b"}
