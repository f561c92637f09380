"""The page of requirements: a row for each, and every file and test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "requirements.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$", PAGE, re.MULTILINE)
NAMED = re.findall(r"`([\w/.-]+\.(?:py|md|json))(?:::(\w+))?`", PAGE)


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
