"""The rooms of `hybridgen.serving` import only what lies below them, also inside functions and for types."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hybridgen

ROOT = Path(hybridgen.__path__[0], "serving")
BELOW = {
    "service": {"service"},
    "unix": {"service", "unix"},
    "client": {"client", "unix.address", "unix.frames", "unix.messages"},
    "lifecycle": {"service", "unix", "lifecycle"},
    "http": {"http", "async_client", "client", "service.adapter", "unix.frames"},
    "process": {"service", "unix", "lifecycle", "http.child", "http.options"},
    "async_client": {"client"},
    "replicas": {"replicas", "client", "unix.messages", "process", "service.limits"},
    "__init__": set(),
}
"""What each room may import of the others."""


def files() -> dict[str, Path]:
    """Every module of the package, by its name below `hybridgen.serving`."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """What a file imports of `hybridgen.serving`, as names below it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    prefix = "hybridgen.serving."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


@pytest.mark.parametrize("name", files())
def test_imports_go_down(name: str) -> None:
    allowed = BELOW[name.partition(".")[0]]
    for other in imported(files()[name]):
        assert any(other == room or other.startswith(f"{room}.") for room in allowed), f"{name} imports {other}"


def test_no_circle() -> None:
    modules = files()
    edges = {name: {other for other in imported(path) if other in modules} for name, path in modules.items()}
    while edges:
        free = {name for name, others in edges.items() if not others & edges.keys()}
        assert free, f"these import each other: {sorted(edges)}"
        edges = {name: others for name, others in edges.items() if name not in free}


def test_the_service_knows_nothing_of_sockets() -> None:
    for name, path in files().items():
        if name.startswith("service."):
            tree = ast.parse(path.read_text())
            modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            assert not modules & {"socket", "asyncio", "struct", "select"}, name


def test_clients_start_without_torch_and_without_the_server() -> None:
    code = (
        "import sys, hybridgen, hybridgen.serving.async_client\n"
        "from hybridgen.serving.client import Client\n"
        "assert Client is hybridgen.Client\n"
        "from hybridgen.serving.async_client import AsyncClient\n"
        "assert AsyncClient is hybridgen.AsyncClient\n"
        "upper = ['service', 'unix.server', 'lifecycle']\n"
        "names = ['torch', 'transformers'] + [f'hybridgen.serving.{name}' for name in upper]\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parents[1])
    assert done.stdout == "[]\n", done.stderr
