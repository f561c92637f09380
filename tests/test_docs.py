"""The docs: every page is in the site, the site builds, what scripts write is up to date, and the blocks run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forks
import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hybridgen
from hybridgen.demo import model_path
from hybridgen.loading.support import unsupported_reason

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
ELSEWHERE = "production.md"
"""`test_production_page.py` runs its blocks of Python."""

_BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.S | re.M)


class Block(NamedTuple):
    """A fenced block of a page."""

    kind: str
    text: str
    line: int
    why_not: str | None
    """Why it is not run, as the comment before it says."""


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        yield Block(found["kind"], found["text"], text.count("\n", 0, found.start("text")), found["why"])


def made(name: str = "make_reference") -> Any:
    """A script that writes a part of the docs."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_script_writes_is_up_to_date() -> None:
    script, advice = made(), "run python docs/make_reference.py"
    assert (DOCS / "reference.md").read_text() == script.reference(), advice
    for page in PAGES[1:]:
        assert script.page(page.read_text()) == page.read_text(), f"{page.name}: {advice}"
    assert "<!-- fields of SamplingParams -->\n\n| field | default | |" in (DOCS / "usage.md").read_text()


def test_the_table_of_model_types_has_what_is_tested_and_nothing_else_as_running() -> None:
    script, text = made("make_models"), (DOCS / "models.md").read_text()
    if f"(transformers {transformers.__version__})" not in text:
        pytest.skip("the table was made with another transformers")
    rows = text.partition(script.BEGIN)[2].partition(script.END)[0].splitlines()
    for how, names in script.RUNS.items():
        (row,) = (row for row in rows if row.startswith(f"| runs: {how} |"))
        assert re.findall(r"`([\w.-]+)`", row.rpartition("|")[0].rpartition("| ")[2]) == sorted(names), (
            "run python docs/make_models.py"
        )
    assert sum(row.startswith("| runs:") for row in rows) == len(script.RUNS)


def test_every_causal_type_that_the_checks_let_in_is_compared() -> None:
    """So that none runs untried: add it to `tests/families.py`, or refuse it."""
    script = made("make_models")
    tested = {name for names in script.RUNS.values() for name in names}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - tested:
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:
            continue
        assert unsupported_reason(config) or script.probed(config), name


@pytest.mark.slow
def test_the_table_of_model_types_is_up_to_date() -> None:
    """For the transformers that it was made with."""
    script, text = made("make_models"), (DOCS / "models.md").read_text()
    if f"(transformers {transformers.__version__})" not in text:
        pytest.skip("the table was made with another transformers")
    assert script.page(text) == text, "run python docs/make_models.py"


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "reference.md").read_text()
    for name in hybridgen.__all__:
        assert f"\n## {name}\n" in text
    assert "### Engine.generate\n" in text


def test_every_page_is_in_the_site() -> None:
    named = re.findall(r": ([\w-]+\.md)$", (DOCS / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    zensical = shutil.which("zensical") or shutil.which("zensical", path=str(Path(sys.executable).parent))
    if zensical is None:
        pytest.skip("zensical comes with the extra docs")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("site"))
    command = [zensical, "build", "--strict", "-f", str(tmp_path / "docs" / "mkdocs.yml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "docs" / "site" / "recipes" / "index.html").is_file()
    broken = tmp_path / "docs" / "recipes.md"
    broken.write_text(broken.read_text() + "\n[nowhere](no-such-page.md)\n")
    assert subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=300).returncode != 0


def prepared(text: str) -> str:
    """A block with the demo model in place of one that is named, and few sizes where it fills a compile cache: each is
    a step to compile."""
    text = text.replace("path/or/hub-id", str(model_path()))
    return re.sub(r"(hybridgen cache warm .*--mode hybrid)", r"\1 --buckets 1", text)


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if page.name != ELSEWHERE and any(b.kind == "python" and not b.why_not for b in blocks(page))
    ],
    ids=lambda page: page.name,
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, as a reader would run them."""
    found = [block for block in blocks(page) if block.kind == "python" and block.why_not is None]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"hybridgen": hybridgen}
    try:
        for block in found:
            # Lines as in the page, for tracebacks.
            source = "\n" * block.line + prepared(block.text)
            exec(compile(source, str(page), "exec"), names)
    finally:
        for value in names.values():
            if isinstance(value, hybridgen.Engine):
                value.close()


NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run_and_have_no_outputs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells run one after the other; what the last line of one is can be shown."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text())
    names: dict[str, Any] = {}
    shown = 0
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert (cell["outputs"], cell["execution_count"]) == ([], None), "clear the outputs"
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name} cell {number}", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"{path.name} cell {number}", "eval"), names)
            shown += "<table" in value._repr_html_() if hasattr(value, "_repr_html_") else bool(repr(value))
    assert shown >= 2


def test_a_page_links_to_each_notebook() -> None:
    text = (DOCS / "recipes.md").read_text()
    assert len(NOTEBOOKS) <= 3
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name}" not in text] == []


def shell_blocks() -> list[Any]:
    """Those that run the same commands once. Filling a compile cache is slow: `tests/compilation/store` has its
    commands."""
    found = {}
    for page in PAGES:
        for block in blocks(page):
            if block.kind in ("sh", "bash") and block.why_not is None:
                marks = pytest.mark.slow if "hybridgen cache warm" in block.text else ()
                param = pytest.param(block, id=f"{page.name}:{block.line}", marks=marks)
                found.setdefault(re.sub(r"^pip install.*?( && |$)", "", block.text, flags=re.M).strip(), param)
    return list(found.values())


@pytest.mark.parametrize("block", shell_blocks())
def test_shell_blocks_run(block: Block, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, command in {
        "hybridgen": f'exec {shlex.join(forks.command())} -m hybridgen "$@"',
        "pip": "exit 0",  # what it would install is what is tested
        "pytest": "exit 0",  # that is this very run
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{command}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "prompts.jsonl").write_text('"import os"\n{"prompt": "x", "max_new_tokens": 2}\n')
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "import", "completion": " os"}) + "\n")
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HYBRIDGEN_COMPILE_CACHE"},
        forks.INSIDE: "1",  # what compiles behind starts within milliseconds
        "HYBRIDGEN_CACHE_DIR": str(tmp_path / "cache"),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_RUNTIME_DIR": str(runtime),
    }
    ending = "\n(hybridgen client --shutdown >/dev/null 2>&1 || true)\nwait\n" if "serve" in block.text else ""
    script = f"set -eo pipefail\n{prepared(block.text)}{ending}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_not_run_is_little_and_says_why() -> None:
    left = [(page.name, block.line) for page in PAGES for block in blocks(page) if block.why_not is not None]
    assert len(left) <= 20, left


def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nx = 1\n```\n<!-- not run: because -->\n```sh\nfalse\n```\n```sh\nfalse\n```\n")
    assert [(b.kind, b.line, b.why_not) for b in blocks(page)] == [
        ("python", 2, None),
        ("sh", 6, "because"),
        ("sh", 9, None),
    ]
    with pytest.raises(AssertionError):
        test_shell_blocks_run(list(blocks(page))[2], tmp_path)
