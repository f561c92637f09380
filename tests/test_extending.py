"""The pages for whoever carries on: each file and name that they mention is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hybridgen

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("extending", "contributing", "architecture")}
FILE = r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|json|txt|toml)"
RECIPES = (
    "A model family",
    "A sampling option",
    "A kernel",
    "An executor",
    "A drafter",
    "A kind of state",
    "A weight format",
    "A command",
    "A field of `EngineConfig`",
)


def files(text: str) -> set[str]:
    """Files in backticks or in a command, by their path from the root."""
    quoted = re.findall(r"`([^`\n]+)`", text)
    return {path for each in quoted for path in re.findall(rf"(?<![\w./-])({FILE})(?![\w/])", each) if "/" in path}


def names(text: str) -> set[tuple[str, str]]:
    """What is written as "`name` in `file`" or "`name` and `other` in `file`"."""
    found = re.findall(rf"((?:`\w+`(?:,| and)?\s+)+)in\s+`({FILE})`", text)
    return {(name, path) for some, path in found for name in re.findall(r"`(\w+)`", some)}


def test_there_is_a_recipe_for_each_thing_that_is_added() -> None:
    assert tuple(re.findall(r"^## (.+)$", PAGES["extending"], re.MULTILINE)) == RECIPES


@pytest.mark.parametrize("page", ["extending", "contributing"])
def test_the_files_are_there(page: str) -> None:
    found = files(PAGES[page])
    assert len(found) > 5
    made = {"decode.json"}
    assert sorted(path for path in found - made if not (ROOT / path).is_file()) == []


def test_the_names_are_in_their_files() -> None:
    found = names(PAGES["extending"])
    assert len(found) > 20
    missing = [(name, path) for name, path in found if not re.search(rf"\b{name}\b", (ROOT / path).read_text())]
    assert sorted(missing) == []


def test_what_is_missing_is_found() -> None:
    assert files("see `hybridgen/absent.py` and run `python benchmarks/absent.py --smoke`") == {
        "hybridgen/absent.py",
        "benchmarks/absent.py",
    }
    assert names("`A` and `b` in\n`hybridgen/core.py`") == {("A", "hybridgen/core.py"), ("b", "hybridgen/core.py")}


def test_the_tree_is_the_package() -> None:
    """Every room and module at the top is in the page's tree, and nothing that is not there."""
    tree = re.search(r"^hybridgen/\n(.*?)^```", PAGES["architecture"], re.MULTILINE | re.DOTALL)
    assert tree is not None
    package = Path(hybridgen.__file__).parent
    top, room = set(), ""
    for line in tree[1].splitlines():
        entry = re.match(r"^( {2}| {4})(\w+(?:\.py|/))", line)
        if entry is None:
            continue
        if len(entry[1]) == 2:
            top.add(entry[2])
            room = entry[2]
            assert (package / entry[2]).exists(), entry[2]
        else:
            assert (package / room / entry[2]).is_dir(), room + entry[2]
    there = {path.name if path.is_file() else f"{path.name}/" for path in package.iterdir() if path.name[0] != "_"}
    assert top - {"__init__.py"} == there - {"py.typed"}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", PAGES[page]):
        assert (ROOT / "docs" / target).is_file(), target
