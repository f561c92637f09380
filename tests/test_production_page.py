"""docs/production.md: every call that it shows is run on an engine, and says what the page says."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest

import hybridgen
from hybridgen.cli import doctor
from hybridgen.core import GraphEventKind
from hybridgen.serving.service.metrics import Metrics

PAGE = (Path(__file__).parents[1] / "docs" / "production.md").read_text()
FIELDS: dict[str, Any] = {
    "max_batch": 4, "decode_buckets": [1, 4], "prefill_buckets": [32], "compile_backend": "eager", "dtype": "float32",
    "max_context": 128,
}  # fmt: skip


def sections() -> dict[str, list[str]]:
    """The Python blocks of the page under each heading; those before the first under an empty name."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE):
        name = part.split("\n", 1)[0] if found else ""
        found[name.lower()] = re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)
    return found


def run(block: str, names: dict[str, Any]) -> Any:
    """Run a block; returns the value of its last line, if that is an expression."""
    tree = ast.parse(block)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "production.md", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "production.md", "eval"), names)


@pytest.fixture(scope="module")
def shown() -> Iterator[dict[str, Any]]:
    """The value of each section's last line, and under an empty name what all blocks share."""
    load = hybridgen.Engine.load
    patch = pytest.MonkeyPatch()
    # The page's model and sizes are a reader's; here they are small.
    patch.setattr(hybridgen.Engine, "load", lambda model, **fields: load(None, **{**FIELDS, **fields}))
    names: dict[str, Any] = {}
    values: dict[str, Any] = {"": names}
    try:
        for name, blocks in sections().items():
            for block in blocks:
                values[name or "load"] = run(block, names)
    finally:
        patch.undo()
    yield values
    names["engine"].close()


def test_the_page_has_the_points_of_the_doctor_in_its_order() -> None:
    names = [name for name in sections() if name]
    assert names == [point.name for point in doctor.CHECKLIST]
    assert len(names) == 10
    assert all(len(blocks) == 1 for blocks in sections().values())


CHECKS: Mapping[str, Callable[[Any, dict[str, Any]], bool]] = {
    "capture sizes": lambda value, names: (
        {row[:2] for row in value} >= {("decode", 1), ("decode", 4), ("prefill", 32)}
        and sum(row[3] for row in value) > 0
    ),
    "pool": lambda value, names: value == (0, None, 0),
    "fallback": lambda value, names: not value[1] and {step.phase for step in value[2]} == {"prefill", "decode"},
    "hit rate": lambda value, names: 0 < value[0] <= 1 and set(value[1]) == {"prefill", "decode"},
    "alerts": lambda value, names: value == ([], 0) and len(names["events"]) > 0,
    "validation": lambda value, names: value == (True, {}),
    "numerics": lambda value, names: value == [True] * 3,
    "profiling": lambda value, names: "aten::" in value,
    "warm-up": lambda value, names: value[0]["capture"] > 0 and value[1] == 0,
    "memory": lambda value, names: value[0] > 0 and value[1] == value[2] > 0,
}


@pytest.mark.parametrize("name", [point.name for point in doctor.CHECKLIST])
def test_each_shown_call_runs_and_shows_it(name: str, shown: dict[str, Any]) -> None:
    assert CHECKS[name](shown[name], shown[""]), shown[name]


@pytest.mark.parametrize("point", doctor.CHECKLIST, ids=lambda point: point.name)
def test_the_call_that_the_doctor_names_runs(point: doctor.Point, shown: dict[str, Any]) -> None:
    assert eval(point.call, {"engine": shown[""]["engine"], "prompts": ["import os"]}) is not None


def test_the_alerts_are_of_metrics_that_there_are() -> None:
    service = SimpleNamespace(
        health=lambda: {"steps": 0, "clients": 0, "in_flight": 0, "work_age": 0.0, "healthy": True},
        generator=SimpleNamespace(snapshot={}),
        counts={},
    )
    metrics = Metrics()
    metrics.watch(service)  # type: ignore[arg-type]
    text = metrics.text("")[0].decode()
    [rules] = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    named = set(re.findall(r"hybridgen_\w+", rules))
    assert len(named) >= 5
    for name in named:
        assert re.search(rf"^{name}[ {{]", text, flags=re.MULTILINE), name


# ------------------------------------------------------------------ the doctor


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("doctor"))


def findings(path: Path, **fields: Any) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine_model(str(path), {**FIELDS, **fields})}


def test_a_model_that_is_well_is_well_at_every_point(path: Path) -> None:
    found = findings(path, mode="graph", max_padding_ratio=12, prefill_buckets=[128])
    assert list(found) == [point.name for point in doctor.CHECKLIST]
    assert all(finding.ok for finding in found.values()), found
    assert found["capture sizes"].detail.startswith("decode 1, 4; prefill 128 ")
    assert found["hit rate"].detail.startswith("prefill 100.0%, decode 100.0% ")
    assert "100.0% of tokens equal mode eager's" in found["numerics"].detail
    assert "CPU" in found["profiling"].detail
    assert "[engine.stats().graphs.hit_rate]" in found["hit rate"].detail


def test_a_mode_without_graphs_says_so(path: Path) -> None:
    found = findings(path, mode="eager")
    assert all(finding.ok for finding in found.values())
    assert "mode eager holds no graphs" in found["capture sizes"].detail
    assert "mode eager records no steps" in found["hit rate"].detail


def test_what_is_not_well_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode is not recorded, a capture fails and the log-probabilities are others."""
    from hybridgen.graphs import StandInRecorder

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("refused")

    monkeypatch.setattr(StandInRecorder, "record", refuse)
    monkeypatch.setattr("hybridgen.comparison.data.checks.logit_error", lambda *outs: 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = findings(path, mode="graph")
    bad = {name for name, finding in found.items() if not finding.ok}
    assert bad == {"capture sizes", "fallback", "hit rate", "alerts", "numerics"}
    assert f"{GraphEventKind.FAILED}" in found["alerts"].detail
    assert "decode 0.0%" in found["hit rate"].detail


def test_a_model_that_cannot_be_loaded_is_one_finding(tmp_path: Path) -> None:
    [finding] = doctor.examine_model(str(tmp_path / "absent"), {})
    assert (finding.name, finding.ok) == ("model", False)
    assert "absent" in finding.detail


def test_the_command_takes_a_model(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hybridgen.cli.main import main

    monkeypatch.setattr(doctor, "examine", list)
    assert main(["doctor", "--model", str(path), "--mode", "eager", "--max-batch", "2", "--max-context", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[4:17].strip() for line in lines] == [point.name for point in doctor.CHECKLIST]
    assert {line[:2] for line in lines} == {"ok"}
