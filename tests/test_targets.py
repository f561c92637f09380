"""Targets: their schema, that measured values are their files', and that the page has the table of the script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from waiting import HANGS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "targets.py"
TARGETS: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "targets.json").read_text())
MEASURED = [target for target in TARGETS if target["measured"] is not None]


def name_of(target: dict[str, Any]) -> str:
    return f"{target['group']}: {target['name']}"


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import targets

    return targets


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_a_target_has_its_fields(target: dict[str, Any], targets: ModuleType) -> None:
    assert tuple(target) == targets.FIELDS
    for name in ("group", "name", "unit"):
        assert isinstance(target[name], str)
        assert target[name]
    assert target["better"] in targets.BETTER
    assert isinstance(target["must"], (int, float))
    assert target["aim"] is None or isinstance(target["aim"], (int, float))
    if target["aim"] is not None:
        lower, higher = sorted((target["aim"], target["must"]))
        assert (target["aim"], target["must"]) == ((lower, higher) if target["better"] == "lower" else (higher, lower))
    sources = {target["file"] is None, target["key"] is None, target["measured"] is None}
    assert len(sources) == 1, "a measured value has a file and a key, and the other way round"


def test_names_are_told_apart() -> None:
    names = [name_of(target) for target in TARGETS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("target", MEASURED, ids=name_of)
def test_a_measured_value_is_that_of_its_file(target: dict[str, Any], targets: ModuleType) -> None:
    assert target["measured"] == targets.figure(target["file"], target["key"])


def test_the_file_and_the_page_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}; run python benchmarks/targets.py"


def test_the_page_has_the_table_that_the_script_writes(targets: ModuleType) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"<!-- targets -->\n{targets.lines(TARGETS)}<!-- end -->" in page


@pytest.mark.parametrize(
    ("better", "measured", "state"),
    [
        ("lower", 9.0, "aim reached"),
        ("lower", 11.0, "reached"),
        ("lower", 12.0, "reached"),
        ("lower", 12.5, "missed"),
        ("higher", 11.0, "reached"),
        ("higher", 9.0, "missed"),
        ("lower", None, "open"),
    ],
)
def test_a_state_follows_from_the_value(targets: ModuleType, better: str, measured: float | None, state: str) -> None:
    must, aim = (12.0, 10.0) if better == "lower" else (10.0, 12.0)
    values = ("g", "n", "us", better, must, aim, measured, None, None)
    assert f"| {state} |" in targets.lines([dict(zip(targets.FIELDS, values, strict=True))])


def test_what_is_filled_comes_from_the_results(targets: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"rows": [{"batch": 1, "us": 8.0}, {"batch": 8, "us": 10.0}]}))
    one = {"measured": 1.0, "file": "r.json", "key": "rows[batch=8].us / rows[batch=1].us"}
    assert targets.filled([one], tmp_path) == [{**one, "measured": 1.25}]
    assert targets.filled([{"measured": 3.0, "file": None, "key": None}])[0]["measured"] is None


def test_a_page_without_a_place_is_an_error(targets: ModuleType) -> None:
    with pytest.raises(SystemExit, match="0 places"):
        targets.rewritten("no markers", [])
