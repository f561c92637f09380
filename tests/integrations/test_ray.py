"""Ray Data on a cluster in this machine: the tokens of one engine, whatever becomes of the actors."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hybridgen
from hybridgen import ConfigError, PromptError
from hybridgen.params import row_seed

ray = pytest.importorskip("ray", reason="needs the extra ray")
module = pytest.importorskip("hybridgen.integrations.ray", reason="needs the extra ray", exc_type=ConfigError)

CONFIG: dict[str, Any] = {"device": "cpu", "mode": "eager", "dtype": "float32", "kv_memory": "32MiB", "max_batch": 8}
DRAWN = {"max_new_tokens": 8, "temperature": 0.9, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": number, "prompt": f"def f{number}(x):"} for number in range(count)]


def expected(count: int, **how: Any) -> dict[int, str]:
    """Texts of one engine in this process, by id."""
    sampling = [hybridgen.SamplingParams(seed=row_seed(3, number), **how) for number in range(count)]
    with hybridgen.Engine.load(**CONFIG) as engine:
        done = engine.generate([row["prompt"] for row in rows(count)], sampling)
    return {number: each.text for number, each in enumerate(done)}


def test_rows_get_what_one_engine_gives(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [{**row, "messages": None, "sampling_params": None} for row in rows(10)]
    given[3] |= {"prompt": ""}
    given[4] |= {"prompt": None, "messages": [{"role": "user", "content": "x"}]}
    given[5] |= {"sampling_params": {"max_new_tokens": 2}}
    given[6] |= {"sampling_params": {"max_new_tokens": -1}}
    process = module.build_processor(
        sampling=DRAWN,
        seed=3,
        batch_size=4,
        postprocess=lambda row: {**row, "length": len(row["generated_text"])},
        **CONFIG,
    )
    done = {row["id"]: row for row in process(ray.data.from_items(given)).take_all()}
    texts = expected(10, **DRAWN)
    assert sorted(done) == list(range(10))
    for number in (0, 1, 2, 7, 8, 9):
        assert done[number][module.ERROR] == ""
        assert done[number]["generated_text"] == texts[number]
        assert done[number]["num_generated_tokens"] == len(done[number]["generated_tokens"]) == 8
        assert done[number]["finish_reason"] == "length"
        assert done[number]["length"] == len(texts[number])
    assert PromptError.__name__ in done[3][module.ERROR]
    assert done[3]["generated_text"] == ""
    assert "chat template" in done[4][module.ERROR]
    assert done[5][module.ERROR] == ""
    assert done[5]["num_generated_tokens"] == 2
    assert "max_new_tokens" in done[6][module.ERROR]


def actors() -> list[int]:
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::" in line and "EngineActor" in line]


def test_an_actor_that_is_killed_loses_and_doubles_nothing() -> None:
    how = DRAWN | {"max_new_tokens": 60}
    process = module.build_processor(sampling=how, seed=3, batch_size=4, concurrency=2, **CONFIG)
    found: list[dict[str, Any]] = []
    dataset = process(ray.data.from_items(rows(24)))
    thread = threading.Thread(target=lambda: found.extend(dataset.take_all()))
    thread.start()
    deadline = time.monotonic() + 60
    while len(actors()) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.0)
    victims = actors()
    os.kill(victims[0], signal.SIGKILL)
    thread.join(120)
    texts = expected(24, **how)
    assert sorted(row["id"] for row in found) == list(range(24))
    assert {row["id"]: row["generated_text"] for row in found} == texts


@pytest.mark.slow
def test_a_run_that_is_begun_again_makes_what_is_missing(tmp_path: Path) -> None:
    from ray.data.checkpoint import CheckpointConfig

    for count in (8, 16):
        ray.data.from_items(rows(count)).write_parquet(str(tmp_path / f"in-{count}"))
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(tmp_path / "checkpoint"), delete_checkpoint_on_success=False
    )
    try:
        process = module.build_processor(sampling=DRAWN, seed=3, batch_size=4, **CONFIG)
        for count in (8, 16):
            process(ray.data.read_parquet(str(tmp_path / f"in-{count}"))).write_parquet(str(tmp_path / "out"))
    finally:
        context.checkpoint_config = None
    done = ray.data.read_parquet(str(tmp_path / "out")).take_all()
    assert sorted(row["id"] for row in done) == list(range(16))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"concurrency": 0}, "give a number from 1"),
        ({"concurrency": (3, 2)}, "or a pair"),
        ({"model": 5}, "give a path or hub id"),
        ({"bundle": "x.tar.gz"}, "trust_bundle=True"),
        ({"mode": "fast"}, "is unknown"),
        ({"no_field": 1}, "no_field"),
    ],
)
def test_values_that_cannot_be(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        module.build_processor(**fields)
