"""Every benchmark runs small on this machine and ends in one JSON line; every kept result says where it is from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in ("common.py", "tables.py"))
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / script), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["provenance"]["torch"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_is_from(path: Path) -> None:
    provenance = json.loads(path.read_text())["provenance"]
    on_gpu = () if path.stem.endswith("-cpu") else ("gpu", "driver", "triton")
    for name in (*on_gpu, "torch", "commit", "command"):
        assert provenance[name], name


@pytest.mark.parametrize("name", [*SCRIPTS, *(path.name for path in RESULTS)])
def test_the_page_names_it(name: str) -> None:
    assert f"`{name}`" in (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
