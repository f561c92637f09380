"""The page of requirements: a row for each, every file and test that it names is there, every figure is its file's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from waiting import HANGS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "requirements.py"
PAGE = (ROOT / "docs" / "requirements.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$", PAGE, re.MULTILINE)
NAMED = re.findall(r"`([\w/.-]+\.(?:py|md|json))(?:::(\w+))?`", PAGE)
MEASURED = re.compile(r"\d[\d.,]*(?:e-?\d+)?\s*(?:us|µs|ms|s|%|GB/s|GB|MB|TFLOP/s|tokens/s|times)\b|\d[\d.,]*\s*%")
"""What a measured figure looks like."""


@pytest.fixture
def requirements(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import requirements

    return requirements


def test_every_requirement_has_one_row() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 63))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_says_how_it_stands_and_why(row: tuple[str, str, str, str]) -> None:
    _, requirement, state, where = row
    assert state in ("met", "better", "partly", "not built")
    assert len(requirement) > 10
    assert len(where) > 5


@pytest.mark.parametrize(("path", "test"), sorted(set(NAMED)), ids="::".join)
def test_what_it_names_is_there(path: str, test: str) -> None:
    file = ROOT / path
    assert file.is_file()
    if test:
        assert re.search(rf"^def {test}\(", file.read_text(), re.MULTILINE)


def test_many_are_named() -> None:
    assert len({path for path, _ in NAMED}) > 40


def test_the_figures_in_the_docs_are_those_of_the_files() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}; run python benchmarks/requirements.py"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_no_measured_figure_is_written_by_hand(row: tuple[str, str, str, str], requirements: ModuleType) -> None:
    number, _, _, where = row
    by_hand = MEASURED.findall(re.sub(r"`[^`]*`", "", requirements.without_figures(where)))
    assert not by_hand, f"row {number}: put {by_hand} into FIGURES of benchmarks/requirements.py"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_the_files_of_its_figures(row: tuple[str, str, str, str], requirements: ModuleType) -> None:
    where = row[3]
    for name in re.findall(r"<!-- figure: ([a-z0-9-]+) -->", where):
        file = requirements.NOTES[name][0] if name in requirements.NOTES else requirements.FIGURES[name].file
        assert f"`benchmarks/results/{file}`" in where, name


def test_every_figure_is_quoted_somewhere(requirements: ModuleType) -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for name in (*requirements.FIGURES, *requirements.NOTES):
        assert f"<!-- figure: {name} -->" in pages, name


def test_another_number_in_the_file_is_another_in_the_page(requirements: ModuleType, tmp_path: Path) -> None:
    row = {"what": "hybrid", "batch": 1, "step_us": 1234.5}
    (tmp_path / requirements.LIMIT).write_text(json.dumps({"rows": [row, row | {"batch": 8, "step_us": 7.0}]}))
    page = "takes <!-- figure: step-1b -->641<!-- . --> us"
    assert requirements.rewritten(page, tmp_path) == "takes <!-- figure: step-1b -->1,234<!-- . --> us"


def test_a_state_is_read_from_the_file(requirements: ModuleType, tmp_path: Path) -> None:
    for variants, word in ((["all"], "before"), (["all", "fused_decode=False"], "after")):
        folder = tmp_path / word
        folder.mkdir()
        rows = [{"variant": name} for name in variants]
        (folder / requirements.ABLATION).write_text(json.dumps({"provenance": {"commit": "abc"}, "rows": rows}))
        assert requirements.text_of("ablation-state", folder).startswith(f"measured {word} ")


def test_an_unknown_figure_is_an_error(requirements: ModuleType) -> None:
    with pytest.raises(SystemExit, match="unknown figure 'other'"):
        requirements.rewritten("<!-- figure: other -->1<!-- . -->")


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("a.b", 2.0),
        ("rows[x=1;y=p q].v", 5.0),
        ("rows[x=2].v / rows[x=1;y=p q].v", 2.0),
    ],
)
def test_a_key_finds_one_figure(requirements: ModuleType, tmp_path: Path, key: str, found: float) -> None:
    rows = [{"x": 1, "y": "p q", "v": 5}, {"x": 1, "y": "r", "v": 6}, {"x": 2, "v": 10}]
    (tmp_path / "f.json").write_text(json.dumps({"a": {"b": 2}, "rows": rows}))
    assert requirements.figure("f.json", key, tmp_path) == found


@pytest.mark.parametrize("key", ["a.c", "a", "rows[x=1].v", "rows[x=9].v", "b.c"])
def test_a_key_that_finds_none_or_several_is_an_error(requirements: ModuleType, tmp_path: Path, key: str) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"a": {"b": 2}, "rows": [{"x": 1, "v": 5}, {"x": 1, "v": 6}]}))
    with pytest.raises(KeyError):
        requirements.figure("f.json", key, tmp_path)
