"""The tables of results in the docs are those of the JSON files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "tables.py"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import tables

    return tables


def page(name: str, table: str = "something old\n") -> str:
    return f"before\n\n<!-- table: {name} -->\n{table}<!-- end -->\n\nafter\n"


def write(folder: Path, name: str, **result: Any) -> None:
    where = {"gpu": "a GPU", "torch": "2.11.0", "commit": "abc"}
    (folder / name).write_text(json.dumps({"provenance": where, **result}))


def test_the_docs_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}; run python benchmarks/tables.py"


def test_without_a_file_nothing_was_measured(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.rewritten(page("replay"), tmp_path) == page("replay", "not measured yet\n")


def test_a_table_is_made_from_all_of_its_files(tables: ModuleType, tmp_path: Path) -> None:
    for model, step in (("big", 100.0), ("small", 50.0)):
        rows = [{"model": model, "batch": 4, "mode": mode, "step_us": step} for mode in ("jit", "hybrid")]
        write(tmp_path, f"decode-modes-{model}.json", rows=rows)
    text = tables.rewritten(page("decode-modes"), tmp_path)
    assert "| µs per step | batch | `jit` | `hybrid` | `hybrid`, tokens/s |" in text
    assert "| big | 4 | 100.0 | 100.0 | 40,000 |" in text
    assert "| small | 4 | 50.0 | 50.0 | 80,000 |" in text
    assert "`decode-modes-big.json`: a GPU, torch 2.11.0, commit abc." in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")


def test_writing_twice_changes_nothing(tables: ModuleType, tmp_path: Path) -> None:
    row = {"variant": "run_ahead=0", "decode_1_us": 1, "decode_8_us": 2, "ttft_us": 3, "mixed_tokens_per_s": 4000}
    write(tmp_path, "ablation-x.json", rows=[row])
    once = tables.rewritten(page("ablation"), tmp_path)
    assert "| `run_ahead=0` | 1.0 | 2.0 | 3.0 | 4,000 |" in once
    assert tables.rewritten(once, tmp_path) == once


def test_an_unknown_table_is_an_error(tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown table 'other'"):
        tables.rewritten(page("other"), tmp_path)


@pytest.mark.parametrize("name", ["decode-modes", "replay", "unseen", "ablation", "metadata-copy"])
def test_each_table_is_in_the_docs(name: str) -> None:
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    assert sum(f"<!-- table: {name} -->" in text for text in pages) == 1
