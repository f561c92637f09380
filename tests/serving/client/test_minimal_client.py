"""The page on serving is enough to write a client from."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from minimal_client import Minimal
from wire import Process

import hybridgen
from hybridgen.serving.service.limits import Limits
from hybridgen.serving.unix.messages import CODES, VERSION

CLIENT = Path(__file__).with_name("minimal_client.py")
PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()


def test_it_is_short_and_needs_nothing() -> None:
    source = CLIENT.read_text()
    assert len(source.splitlines()) <= 42
    assert len([line for line in source.splitlines() if line.strip()]) <= 40
    imported = {
        name.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported <= sys.stdlib_module_names


def test_it_generates(demo: Process, engine: hybridgen.Engine) -> None:
    expected = engine.generate("def read(path):\n", max_new_tokens=20).text
    done = subprocess.run(
        [sys.executable, "-I", str(CLIENT), str(demo.path), "def read(path):\n"], capture_output=True, text=True
    )
    assert done.stdout == expected
    client = Minimal(str(demo.path))
    assert client.hello["version"] == VERSION
    assert "".join(client.stream("import", max_new_tokens=3)) == engine.generate("import", max_new_tokens=3).text
    with pytest.raises(RuntimeError, match="prompt: prompt 0 is an empty string"):
        list(client.stream(""))
    assert "".join(client.stream([5, 6], max_new_tokens=3)) == engine.generate([5, 6], max_new_tokens=3).text


def test_the_page_has_every_limit_and_code() -> None:
    for field in fields(Limits):
        assert f"`{field.name}`" in PAGE
    raised = set()
    for path in Path(hybridgen.__path__[0], "serving").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ServerError":
                raised |= {argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant)}
    assert {"limit", "protocol", "shutting_down", "clients", "user", "timeout", "version"} <= raised
    for code in raised | CODES.keys() | {"busy", "internal", "stuck"}:
        assert f"`{code}`" in PAGE, code
