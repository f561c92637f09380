"""Every benchmark runs small on this machine and ends in one JSON line; every kept result says where it is from."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from hybridgen import EngineConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HELPERS = ("common.py", "lookup.py", "tables.py", "requirements.py", "targets.py")
"""What measures nothing."""
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in HELPERS)
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python benchmarks/SCRIPT --smoke`, in this process: what importing torch takes is most of a smoke run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / script), "--smoke"])
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        torch.compiler.reset()
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["provenance"]["torch"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_is_from(path: Path) -> None:
    provenance = json.loads(path.read_text())["provenance"]
    if "engine" in provenance:  # another engine's figures
        for name in ("engine", "version", "torch", "gpu", "date", "source", "ran"):
            assert provenance[name], name
        return
    on_gpu = () if path.stem.endswith("cpu") else ("gpu", "driver", "triton")
    for name in (*on_gpu, "torch", "commit", "command"):
        assert provenance[name], name


@pytest.mark.parametrize("name", [*SCRIPTS, *(path.name for path in RESULTS)])
def test_the_page_names_it(name: str) -> None:
    assert f"`{name}`" in (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()


def test_every_switch_has_a_variant_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation

    switches = {field.name for field in fields(EngineConfig) if isinstance(field.default, bool)}
    switches |= {"run_ahead", "max_padding_ratio", "graphs"}
    known = {name for options in ablation.VARIANTS.values() for name in options} | set(ablation.NOT_OF_STEPS)
    assert switches <= known, switches - known
    for name, options in ablation.VARIANTS.items():
        config = EngineConfig(**options)
        assert all(getattr(config, field) != getattr(EngineConfig(), field) for field in options), name
