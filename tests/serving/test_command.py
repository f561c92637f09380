"""`hybridgen serve`: its options, and what it refuses before it loads a model."""

from __future__ import annotations

import builtins
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
from places import short_directory
from waiting import HANGS
from wire import environment

import hybridgen
from hybridgen.cli.main import main
from hybridgen.serving.service.adapter import EngineModel, graph_counts, graph_values, hit_rates, plain
from hybridgen.serving.service.metrics import Metrics
from hybridgen.telemetry.statistics import EngineStats, GraphStats, PhaseCounts


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["serve", "/no/such/model", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hybridgen: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "fast"], "mode='fast' is unknown"),
        (["--idle-exit", "-1"], "idle_exit=-1.0"),
        (["--step-timeout", "nan"], "step_seconds=nan"),
        (["--metrics", "70000"], "is no port"),
        (["--limit-queue", "0"], "limit queue=0"),
        (["--socket", "x" * 200], "an address holds"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in refused(capsys, *arguments)


def test_bad_places(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    directory = short_directory()
    (directory / "file").write_text("x")
    (directory / "open").mkdir(mode=0o755)
    assert "is not a socket of yours" in refused(capsys, "--socket", directory / "file")
    assert "has mode 0755" in refused(capsys, "--socket", directory / "open" / "x")
    assert "is no file" in refused(capsys, "--socket", directory / "x", "--ready-file", directory / "open")
    assert sorted(path.name for path in directory.iterdir()) == ["file", "open"]


def test_a_model_that_is_not_there() -> None:
    directory = short_directory()
    command = [sys.executable, "-m", "hybridgen", "serve", "/no/such/model", "--socket", str(directory / "x")]
    done = forks.run(command, capture_output=True, text=True, env=environment(), timeout=HANGS)
    assert done.returncode == 2
    assert "hybridgen: " in done.stderr
    assert "/no/such/model" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(directory.iterdir()) == []


def test_the_client_command_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["x"], ["--ping"], ["--shutdown"]):
        assert main(["client", "--socket", "/nowhere/at/all", *options]) == 2
        assert "no server answers at /nowhere/at/all" in capsys.readouterr().err
    assert main(["client", "--ping", "prompt"]) == 2


def test_metrics_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(hybridgen.ConfigError, match=r"pip install 'hybridgen\[serve\]'"):
        Metrics()


def test_graph_counts() -> None:
    decode = PhaseCounts(hits=7, padded_hits=2, misses=1)
    held = GraphStats(
        phases={"decode": decode, "prefill": PhaseCounts(misses=3)},
        misses={"no bucket": 4},
        evictions=5,
        capture_failures=2,
        lazy_captures=6,
        bytes=2**20,
        failures={"a": "x", "b": "not tried", "c": "wrong"},
    )
    stats = {"graphs": plain(_as_dict(held))}
    assert graph_counts(stats) == {
        ("prefill", "hit"): 0,
        ("prefill", "padded_hit"): 0,
        ("prefill", "miss"): 3,
        ("decode", "hit"): 5,
        ("decode", "padded_hit"): 2,
        ("decode", "miss"): 1,
    }
    assert hit_rates(stats) == {"decode": 7 / 8, "prefill": 0.0}
    assert graph_values(stats) == {
        "capture_failures": 2, "evictions": 5, "lazy_captures": 6, "bytes": 2**20, "held": 0, "failed": 3,
    }  # fmt: skip
    for none in ({}, {"graphs": 3}, {"graphs": {}}):
        assert set(graph_counts(none).values()) == {0}
        assert len(graph_counts(none)) == 6
        assert hit_rates(none) == {}
        assert set(graph_values(none).values()) == {0}


def _as_dict(graphs: GraphStats) -> dict[str, Any]:
    """The graphs of `EngineStats.as_dict()`."""
    values = {field.name: None for field in dataclasses.fields(EngineStats)}
    counted: dict[str, Any] = {key: {} for key in ("steps", "startup", "requests", "tokens", "fallbacks", "fused")}
    return EngineStats(**values | counted | {"graphs": graphs}).as_dict()["graphs"]


def test_a_scrape_has_what_an_alert_needs() -> None:
    graphs = GraphStats(
        phases={"decode": PhaseCounts(hits=9, padded_hits=3, misses=3)}, evictions=5, capture_failures=2, bytes=2**20
    )
    stats = {"graphs": plain(_as_dict(graphs)), "fallbacks": {"one": 2, "two": 1}}
    health = {"steps": 12, "clients": 0, "in_flight": 0, "work_age": 0.0, "healthy": True}
    service = SimpleNamespace(health=lambda: health, generator=SimpleNamespace(snapshot=stats), counts={})
    metrics = Metrics()
    metrics.watch(service)  # type: ignore[arg-type]
    lines = dict(line.rsplit(" ", 1) for line in metrics.text("")[0].decode().splitlines() if line[0] != "#")
    expected = {
        'graph_hit_rate{phase="decode"}': 0.75,
        'graph_steps_total{phase="decode",result="hit"}': 6,
        'graph_steps_total{phase="decode",result="padded_hit"}': 3,
        'graph_steps_total{phase="decode",result="miss"}': 3,
        'graph_steps_total{phase="prefill",result="miss"}': 0,
        "graph_capture_failures_total": 2,
        "graph_evictions_total": 5,
        "graph_bytes": 2**20,
        "fallbacks_total": 3,
    }
    assert {name: float(lines[f"hybridgen_{name}"]) for name in expected} == expected


def test_plain_values() -> None:
    values = {("a", 1): [float("nan"), float("-inf"), 1.5], "b": (True, None, {"c": Path("/x")})}
    assert plain(values) == {"('a', 1)": ["nan", "-inf", 1.5], "b": [True, None, {"c": "/x"}]}


def test_idle_work_is_done_when_the_engine_has_some(engine: hybridgen.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EngineModel(lambda: engine)
    left = [True, False]
    monkeypatch.setattr(type(engine), "idle", lambda self: left.pop(0), raising=False)
    assert [model.idle(), model.idle()] == [True, False]
