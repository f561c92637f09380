"""A rank that dies, stands still or cannot do its part: an error of ours within seconds, and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import forks
import pytest
from waiting import HANGS, until, with_longer

from hybridgen import DeviceError, Engine, EngineError, HybridgenError
from hybridgen.parallel import group, progress, ranks, start
from hybridgen.parallel.ranks import Ranks

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "tensor_parallel": 2,
    "max_context": 64,
    "kv_memory": "8MiB",
    "max_batch": 2,
    "decode_buckets": [1, 2],
    "prefill_buckets": [],
    "token_budget": 32,
}
PROMPTS = [[5, 6, 7], [9, 8]]
DIE = "os.kill(os.getpid(), 9)"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("lost"))


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Ranks]]:
    """The groups of a test, of which nothing is left at its end: neither processes nor files."""
    groups: list[Ranks] = []
    begin = Ranks.__init__

    def note(self: Ranks, *arguments: Any) -> None:
        begin(self, *arguments)
        groups.append(self)

    monkeypatch.setattr(Ranks, "__init__", note)
    yield groups
    for each in groups:
        assert not any(map(alive, each.pids))
        assert not each.directory.exists()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def errors_of(engine: Engine, tokens: int) -> list[str]:
    """Why each of the prompts failed."""
    try:
        done = engine.generate(PROMPTS, max_new_tokens=tokens)
    except EngineError as error:
        return [str(error)] * len(PROMPTS)
    assert all(isinstance(each.error, EngineError) for each in done)
    return [str(each.error) for each in done]


def on_rank_one(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Have rank 1 run these before anything else."""
    before = "\n".join(["import os, sys", *lines])
    monkeypatch.setattr(ranks, "COMMAND", f"{before}\n{ranks.COMMAND}")


def dies_in(place: str, name: str, when: str = "True") -> list[str]:
    """Lines with which a process dies in the first call of a method for which `when` holds, of its arguments `a`."""
    return [
        f"import {place.rpartition('.')[0]} as place",
        f"owner = place.{place.rpartition('.')[2]}",
        f"real = owner.{name}",
        f"owner.{name} = lambda *a: {DIE} if {when} else real(*a)",
    ]


BUILDING = {
    "before it is ready": ["sys.exit(3)"],
    "while weights are read": dies_in("hybridgen.loading.stored.TensorFiles", "lazy"),
    "while the model is bound": dies_in("hybridgen.parallel.group.Group", "reduce"),
    "while steps are recorded": dies_in("hybridgen.parallel.follow.Follower", "record"),
}


@pytest.mark.parametrize(
    "phase",
    [
        "while the model is bound",
        *(pytest.param(name, marks=pytest.mark.slow) for name in BUILDING if "model" not in name),
    ],
)
def test_a_rank_dies_while_the_engine_is_built(phase: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_rank_one(monkeypatch, *BUILDING[phase])
    with pytest.raises(EngineError, match=r"rank 1 (ended with status 3|was killed by signal 9)"):
        Engine.load(path, mode="graph", **CONFIG)


RUNNING = {
    "at an admission": dies_in("hybridgen.parallel.follow.Follower", "do", "a[1].kind == 2"),
    "in a prefill": dies_in("hybridgen.parallel.follow.Follower", "do", "a[1].kind == 3"),
    "in a decode step": dies_in("hybridgen.parallel.follow.Follower", "do", "a[1].kind == 4"),
}


@pytest.mark.parametrize(
    "phase",
    ["in a decode step", *(pytest.param(name, marks=pytest.mark.slow) for name in RUNNING if "decode" not in name)],
)
def test_a_rank_dies_while_requests_run(phase: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All who wait get an error, those in other threads too, and so does every later call."""
    on_rank_one(monkeypatch, *RUNNING[phase])
    with Engine.load(path, mode="eager", **CONFIG) as engine:
        failed: list[str] = []

        def call() -> None:
            failed.extend(errors_of(engine, 20))

        threads = [threading.Thread(target=call) for _ in range(2)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS)
        assert time.monotonic() - start < HANGS / 2
        assert len(failed) == 2 * len(PROMPTS)
        assert all("rank 1 was killed by signal 9" in error for error in failed)
        assert engine.closed
        with pytest.raises(EngineError, match="rank 1 was killed"):
            engine.generate(PROMPTS)


def test_a_rank_that_dies_or_stands_still_between_calls(
    path: Path, started: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "STILL_SECONDS", 2.0)
    with Engine.load(path, mode="eager", **CONFIG) as engine:
        assert len(engine.generate(PROMPTS, max_new_tokens=2)) == 2
        with monkeypatch.context() as patch:
            patch.setattr(started[0], "_pid", 1)  # as a fork of this process sees it
            assert all("belong to process 1, of which this one is a fork" in error for error in errors_of(engine, 2))
            started[0].close()
        assert alive(started[0].pids[0])
        os.kill(started[0].pids[0], signal.SIGSTOP)
        assert all("rank 1 has stood still" in error for error in errors_of(engine, 2))
        with pytest.raises(EngineError, match="rank 1 has stood still"):
            engine.generate(PROMPTS, max_new_tokens=2)


STUCK = {
    "asleep inside a layer": "time.sleep(600)",
    "before a sum": "group.reduce = lambda x: time.sleep(600)",
    "stopped": "os.kill(os.getpid(), 19)",
}


@pytest.mark.parametrize(
    "how",
    ["asleep inside a layer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("before a sum", "stopped"))],
)
def test_a_rank_whose_step_hangs_while_its_process_lives(how: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first steps take long, as where kernels are compiled, and harm nobody."""
    on_rank_one(
        monkeypatch,
        "import time",
        "from hybridgen.parallel.follow import Follower as owner",
        "real, count = owner.launch, 0",
        "def launch(self, told, scored):",
        "    global count",
        "    count += 1",
        "    if count == 2: time.sleep(2)",
        "    group = self._group",
        "    def hang(*_):",
        f"        {STUCK[how]}",
        "    if count == 8: self._runner.bound.layers[1].register_forward_pre_hook(hang)",
        "    return real(self, told, scored)",
        "owner.launch = launch",
    )
    monkeypatch.setattr(progress, "STEP_SECONDS", 1.0)
    monkeypatch.setattr(ranks, "STILL_SECONDS", 2.0)
    with Engine.load(path, mode="eager", **CONFIG) as engine:
        start = time.monotonic()
        assert all("rank 1 has stood still" in error for error in errors_of(engine, 20))
        assert time.monotonic() - start < HANGS / 2
        with pytest.raises(EngineError, match="rank 1 has stood still"):
            engine.generate(PROMPTS, max_new_tokens=2)


def test_a_step_that_one_rank_cannot_record_runs_without_a_recording(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_rank_one(
        monkeypatch,
        "from hybridgen.graphs.stand_in import StandInRecorder as owner",
        "real = owner.record",
        "def record(self, key, step, known):",
        "    if key.rows == 2 and key.sampler is not None: raise RuntimeError('no memory left')",
        "    if key.rows == 2: step(); raise RuntimeError('none left after a run')",
        "    return real(self, key, step, known)",
        "owner.record = record",
    )
    config = CONFIG | {"tensor_parallel": 1}
    with Engine.load(path, mode="eager", **config) as engine:
        expected = [each.token_ids for each in engine.generate(PROMPTS, max_new_tokens=6)]
        expected.append(engine.generate(PROMPTS[0], max_new_tokens=6).token_ids)
    with Engine.load(path, mode="graph", **CONFIG) as engine:
        found = [each.token_ids for each in engine.generate(PROMPTS, max_new_tokens=6)]
        found.append(engine.generate(PROMPTS[0], max_new_tokens=6).token_ids)
        stats = engine.stats()
    assert found == expected
    assert stats.graphs.capture_failures == 2
    assert all("rank 1 could not record it" in why for why in stats.graphs.failures.values())
    assert ("decode", "layers, stand-in", "bucket 1") in stats.steps


@pytest.mark.slow
def test_a_step_that_fails_on_one_rank_alone_ends_the_group(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_rank_one(
        monkeypatch,
        "from hybridgen.parallel.follow import Follower as owner",
        "def launch(self, told, scored): raise ValueError('of rank 1 alone')",
        "owner.launch = launch",
    )
    with Engine.load(path, mode="eager", **CONFIG) as engine:
        for error in errors_of(engine, 2):
            assert "rank 1 ended with status 1" in error
            assert "of rank 1 alone" in error


def test_a_checkpoint_that_only_another_rank_cannot_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_rank_one(
        monkeypatch,
        "from hybridgen.loading import Checkpoint as owner",
        "from hybridgen.errors import CheckpointError",
        "def fail(*a, **k): raise CheckpointError('it is not mounted there')",
        "owner.open = fail",
    )
    with pytest.raises(HybridgenError, match="it is not mounted there"):
        Engine.load(path, mode="eager", **CONFIG)


def test_shared_memory_that_cannot_be_had_leaves_nothing(
    path: Path, started: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(Path(ranks._SHM).glob("hybridgen-ranks-*"))
    monkeypatch.setattr(start, "_RING_BYTES", 2**60)
    with pytest.raises(DeviceError, match=r"bytes of shared memory in .* cannot be had"):
        Engine.load(path, mode="eager", **CONFIG)
    assert not started
    assert set(Path(ranks._SHM).glob("hybridgen-ranks-*")) <= before


@pytest.mark.parametrize("rank", [0, 1])
def test_ports_that_cannot_be_had_leave_nothing(
    rank: int, path: Path, started: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank:
        on_rank_one(
            monkeypatch,
            "from hybridgen.parallel import group",
            "def fail(*a): raise RuntimeError('bind: Address already in use')",
            "group._gloo = fail",
        )
    else:

        def fail(*_: Any) -> None:
            raise RuntimeError("bind: Address already in use")

        monkeypatch.setattr(group, "_gloo", fail)

    def test(seconds: float) -> None:
        monkeypatch.setattr(group, "JOIN_SECONDS", seconds)
        started.clear()
        with pytest.raises(HybridgenError, match=f"rank {rank} of 2 cannot join the group: bind: Address already in"):
            Engine.load(path, mode="eager", **CONFIG)
        assert len(started) == 1

    with_longer(test, (2.0, 20.0))


def test_the_end_of_rank_zero_is_the_end_of_all(path: Path) -> None:
    code = (
        "import hybridgen\n"
        "from hybridgen.parallel import ranks\n"
        "begin = ranks.Ranks.__init__\n"
        "def note(self, *a): begin(self, *a); print(*self.pids, self.directory, flush=True)\n"
        "ranks.Ranks.__init__ = note\n"
        f"engine = hybridgen.Engine.load({str(path)!r}, mode='eager', **{CONFIG!r})\n"
        "print('ready', flush=True)\n"
        "while True: engine.generate([[1, 2]], max_new_tokens=50)\n"
    )
    environment = {**os.environ, forks.INSIDE: "1"}
    parent = forks.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid, directory = parent.stdout.readline().split()
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not alive(int(pid)) and not Path(directory).exists())
