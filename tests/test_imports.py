"""Imports go down only, and in no circle: those inside functions and under `TYPE_CHECKING` count too.

A type that points up is replaced by a `Protocol` in the lower room, and a value is handed down as an argument.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import hybridgen

ROOMS = (
    "display",
    "fields",
    "core",
    "_version",
    "errors",
    "hints",
    "params",
    "config",
    "arguments",
    "demo",
    "device",
    "text",
    "kernels",
    "cache",
    "sampling",
    "models",
    "loading",
    "telemetry",
    "compilation",
    "graphs",
    "fused",
    "execution",
    "speculation",
    "parallel",
    "engine",
    "serving",
    "comparison",
    "integrations",
    "api",
    "cli",
    "__main__",
)
"""The packages and the single modules of hybridgen, lowest first. Each may import from those before it."""


def modules(root: Path) -> dict[str, Path]:
    """The modules of the package in a directory, by their full names."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """What a module imports of its own package, with the line, wherever in the file the statement stands."""
    top = name.partition(".")[0]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            wanted = [each if (each := f"{base}.{alias.name}") in known else base for alias in node.names]
        else:
            continue
        for each in wanted:
            if each.partition(".")[0] == top and each != name:
                yield each, node.lineno


def room(name: str) -> str:
    """The first part of a module's name below the package; empty for the package itself."""
    return name.partition(".")[2].partition(".")[0]


def upward(root: Path, rooms: Sequence[str] = ROOMS) -> list[str]:
    """Import statements that go from a lower room to a higher one, as `module:line imports module`.

    The package itself is above all rooms: nothing inside may import from it, and it may import from all.
    """
    known = modules(root)
    rank = {name: place for place, name in enumerate([*rooms, ""])}
    return [
        f"{name}:{line} imports {other}"
        for name, path in known.items()
        for other, line in imported(name, path, known)
        if rank[room(other)] > rank[room(name)]
    ]


def circles(root: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's components, with an own stack)."""
    known = modules(root)
    edges = {name: sorted({other for other, _ in imported(name, path, known)}) for name, path in known.items()}
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    open_: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        open_.append(name)
        for other in edges.get(name, ()):
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in open_:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            group = open_[open_.index(name) :]
            del open_[open_.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in edges:
        if name not in number:
            visit(name)
    return found


ROOT = Path(hybridgen.__file__).parent


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in modules(ROOT)} - {""} <= set(ROOMS)


def test_imports_go_down_only() -> None:
    assert upward(ROOT) == []


def test_no_modules_import_each_other() -> None:
    assert circles(ROOT) == []


def test_no_import_hides_in_a_string() -> None:
    """A name of ours given to `import_module` would not be seen. The package itself does it, for what is imported when
    it is first used."""
    hidden = re.compile(r"""(import_module|__import__)\(\s*f?["']hybridgen""")
    assert [name for name, path in modules(ROOT).items() if hidden.search(path.read_text(encoding="utf-8"))] == []


def made_up(root: Path, files: Mapping[str, str]) -> Path:
    """A package `house` with the rooms `low` and `high`."""
    package = root / "house"
    for name, text in {"__init__.py": "", "low/__init__.py": "", "high/__init__.py": "", **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.mark.parametrize(
    "text",
    [
        "import house.high.b",
        "from house.high import b",
        "from house.high.b import thing",
        "from ..high import b",
        "from ..high.b import thing",
        "def f():\n    from house.high import b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high.b import Thing",
        "try:\n    import house.high.b\nexcept ImportError:\n    pass",
        "from house import api",
        "import house",
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(tmp_path: Path, text: str) -> None:
    package = made_up(tmp_path, {"low/a.py": text, "high/b.py": "", "api.py": ""})
    [line] = upward(package, ("low", "high", "api"))
    assert line.startswith("house.low.a:")


def test_a_downward_import_is_none(tmp_path: Path) -> None:
    files = {"low/a.py": "import os\nfrom house.low import c", "low/c.py": "", "high/b.py": "from house.low.a import x"}
    package = made_up(tmp_path, files)
    assert upward(package, ("low", "high")) == []
    assert circles(package) == []


def test_a_circle_is_found_through_others_and_inside_functions(tmp_path: Path) -> None:
    files = {
        "low/a.py": "from house.low import b",
        "low/b.py": "import house.low.c",
        "low/c.py": "def late():\n    from house.low.a import x",
        "low/d.py": "from house.low import a",
    }
    package = made_up(tmp_path, files)
    assert upward(package, ("low", "high")) == []
    assert circles(package) == [["house.low.a", "house.low.b", "house.low.c"]]


def test_a_package_and_its_module_can_make_a_circle(tmp_path: Path) -> None:
    files = {"low/__init__.py": "from house.low.a import x", "low/a.py": "from house.low import y"}
    assert circles(made_up(tmp_path, files)) == [["house.low", "house.low.a"]]
