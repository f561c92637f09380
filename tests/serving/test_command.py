"""`hybridgen serve`: its options, and what it refuses before it loads a model."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import short_directory
from wire import environment

import hybridgen
from hybridgen.cli.main import main
from hybridgen.serving.service.adapter import EngineModel, graph_counts, plain
from hybridgen.serving.service.metrics import Metrics


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
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
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
    graphs = {"hits": 7, "padded_hits": 2, "misses": {"no bucket": 3, "sampling": 1}}
    assert graph_counts({"graphs": graphs}) == {"hit": 5, "padded_hit": 2, "miss": 4}
    for none in ({}, {"graphs": 3}, {"graphs": {}}):
        assert graph_counts(none) == {"hit": 0, "padded_hit": 0, "miss": 0}


def test_plain_values() -> None:
    values = {("a", 1): [float("nan"), float("-inf"), 1.5], "b": (True, None, {"c": Path("/x")})}
    assert plain(values) == {"('a', 1)": ["nan", "-inf", 1.5], "b": [True, None, {"c": "/x"}]}


def test_idle_work_is_done_when_the_engine_has_some(engine: hybridgen.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EngineModel(lambda: engine)
    left = [True, False]
    monkeypatch.setattr(type(engine), "idle", lambda self: left.pop(0), raising=False)
    assert [model.idle(), model.idle()] == [True, False]
