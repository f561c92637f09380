"""The tables of results in the docs are those of the JSON files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from waiting import HANGS

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
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=HANGS)
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
    assert "| `run_ahead=0` | 1.0 | 2.0 | 3.0 | 4,000 | - |" in once
    assert tables.rewritten(once, tmp_path) == once


def test_a_switch_that_takes_an_executor_away_says_which_one_decodes(tables: ModuleType, tmp_path: Path) -> None:
    row = {"variant": "fuse_projections=False", "ttft_us": 3, "mixed_tokens_per_s": 4000}
    row |= {"decode_1_us": 1, "decode_64_us": 2, "decode_1_by": "layers, cuda graph", "decode_64_by": "layers, direct"}
    write(tmp_path, "ablation-x.json", rows=[{**row, "fused": {"fused decode": "none: q_proj is not joined"}}])
    text = tables.rewritten(page("ablation"), tmp_path)
    assert "| decode at batch 1, µs | decode at batch 64, µs |" in text
    assert "| `fuse_projections=False` | 1.0 | 2.0 | 3.0 | 4,000 | layers, layers |" in text
    assert "- `fuse_projections=False`: fused decode serves none: q_proj is not joined." in text


def test_trees_stand_beside_the_manual_buckets(tables: ModuleType, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for owner, step in (("manual", 10.0), ("both", 9.0)):
        by = [[1, "layers, compiled", "x"], [9, f"layers, {owner}", "bucket 3"]]
        rows.append({"model": "m", "owner": owner, "what": "decode", "batch": 3, "step_us": step, "by": by})
        whole = {"model": "m", "owner": owner, "what": "start and mix", "mix_tokens_per_s": 1234.0, "start_s": 5.5}
        whole |= {"idle_s": 0.5, "graphs": 7, "graph_bytes": 2**20, "start_bytes": None, "end_bytes": 3 * 2**20}
        rows.append(whole)
    write(tmp_path, "trees-x.json", rows=rows)
    text = tables.rewritten(page("trees"), tmp_path)
    assert "| m | 3 | 10.0 | - | 9.0 | layers, both |" in text
    assert "| m | `both` | 1,234 | 5.5 | 0.5 | 7 | 1 | - | 3 |" in text


def test_a_way_to_prepare_a_replay_has_its_two_times(tables: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "preparation-x.json", rows=[{"part": "p", "way": "w", "host_us": 1.25, "step_us": 600.0}])
    assert "| p | w | 1.2 | 600.0 |" in tables.rewritten(page("preparation"), tmp_path)


def test_an_unknown_table_is_an_error(tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown table 'other'"):
        tables.rewritten(page("other"), tmp_path)


def test_a_row_that_could_not_be_measured_says_so(tables: ModuleType, tmp_path: Path) -> None:
    times = {f"{kind}_{part}_ms": None for kind in ("ttft", "tpot") for part in ("mean", "std", "p50", "p99")}
    row = {"mode": "jit", "prompt": 10, "status": "out of memory", "calls": 0, "stopped": None, "mbu": None}
    row |= {"equal_tokens": None, "logit_error": None, **times}
    good = {**row, "mode": "hybrid", "status": "ok", "calls": 20, "stopped": "interval", "equal_tokens": 1.0}
    good |= {"ttft_mean_ms": 5.125, "ttft_p99_ms": 6.0, "mbu": 0.5, "logit_error": 0.0125}
    good |= {"graphs": {"pre_captured": 200, "lazy": 3, "none": 1}, "memory_bytes": 2.5 * 2**30}
    good |= {"cpu_utilisation": 1.25, "gpu_utilisation": 0.8}
    write(tmp_path, "ttft-x.json", model="m", rows=[row, good])
    text = tables.rewritten(page("ttft"), tmp_path)
    assert f"| m, 10 | `jit` |{' - |' * 13} out of memory |" in text
    known = "200 / 3 / 1 | 2.50 | 125.0% | 80.0% | 50.0% | 100.0% | 0.013"
    assert f"| m, 10 | `hybrid` | 5.12 | - | - | 6.00 | - | - | {known} | 20 (interval) |" in text
    assert "- m, lowest worst TTFT: `hybrid` at 10." in text
    assert "- m, lowest median TTFT: nothing measured." in text


def test_the_average_of_a_mode_is_over_all_of_its_prompts(tables: ModuleType) -> None:
    from call_tables import averages

    def row(mode: str, prompt: int, **figures: Any) -> dict[str, Any]:
        return {
            "mode": mode,
            "prompt": prompt,
            "batch": 1,
            "status": "ok",
            "calls": 50,
            "stopped": "interval",
        } | figures

    graphs = {"pre_captured": 10, "lazy": 2, "padded": 1, "none": 3}
    rows = [
        row("hybrid", 10, ttft_mean_ms=5.0, mbu=None, graphs=graphs),
        row("hybrid", 50, ttft_mean_ms=8.0, mbu=0.5, graphs=graphs),
        row("jit", 10, ttft_mean_ms=9.0, mbu=0.25, graphs=None),
        row("jit", 50, ttft_mean_ms=None, mbu=None, graphs=None) | {"status": "out of memory"},
    ]
    [average] = averages(rows)  # what jit needs for 50 is not known, and so not for both
    assert (average["mode"], average["prompt"], average["ttft_mean_ms"]) == ("hybrid", "average", 6.5)
    assert (average["mbu"], average["calls"], average["stopped"]) == (None, 100, "2 prompts")
    assert average["graphs"] == {"pre_captured": 20, "lazy": 4, "none": 6}


def test_decode_steps_have_their_utilisation(tables: ModuleType, tmp_path: Path) -> None:
    row = {"model": "m", "what": "hybrid", "batch": 2, "step_us": 500.0, "first_token_ms": 3.0}
    write(tmp_path, "memory-limit-x.json", rows=[row, {**row, "cpu_utilisation": 1.04, "gpu_utilisation": 0.97}])
    text = tables.rewritten(page("memory-limit"), tmp_path)
    assert "| m, batch 2 | hybrid | 500.0 | - | - | 4,000 | 3.00 | - | - |" in text
    assert "| m, batch 2 | hybrid | 500.0 | - | - | 4,000 | 3.00 | 104.0% | 97.0% |" in text


def test_throughput_has_the_spread_of_its_runs(tables: ModuleType, tmp_path: Path) -> None:
    row = {"model": "m", "engine": "hybrid", "requests": 256, "temperature": 0.0, "generated_tokens": 133966}
    row |= {"seconds": [5.5, 5.0], "tokens_per_s": 25000.0}
    failed = {
        "model": "m",
        "engine": "huggingface",
        "requests": 256,
        "temperature": 0.0,
        "error": "OutOfMemoryError: x",
    }
    write(tmp_path, "throughput-x.json", rows=[row, failed])
    text = tables.rewritten(page("throughput"), tmp_path)
    assert "| m | `hybrid` | 256 | 0 | 133,966 | 5.00 to 5.50 | 25,000 |" in text
    assert "| m | `huggingface` | 256 | 0 | - | - | OutOfMemoryError: x |" in text


def test_a_start_stands_beside_that_of_mode_eager(tables: ModuleType, tmp_path: Path) -> None:
    def row(case: str, *times: float, **startup: float) -> dict[str, Any]:
        found = {"shape": "m", "case": case, "median_s": sum(times) / len(times), "times_s": times}
        return {**found, "last": {"startup": startup}}

    rows = [row("eager", 10.0, 12.0), row("warm", 13.75, artifacts=1.5, capture=0.25), row("import", 0.125)]
    write(tmp_path, "warm-start-x.json", rows=rows)
    text = tables.rewritten(page("warm-start"), tmp_path)
    assert "| m | eager | abc | 11.0 | 2 | 1.00 | - | - | - | - | - | - | - |" in text
    assert "| m | warm | abc | 13.8 | 1 | 1.25 | - | - | 1.50 | - | - | - | 0.25 |" in text
    assert "- importing `hybridgen` takes 0.12 s more than torch and transformers." in text


TABLES = [
    "decode-modes", "replay", "unseen", "ablation", "metadata-copy", "ttft", "throughput", "ceilings", "warm-start",
    "memory-limit", "preparation", "trees", "speculation-text", "speculation-search", "speculation-machinery",
]  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_each_table_is_in_the_docs(name: str) -> None:
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    assert sum(f"<!-- table: {name} -->" in text for text in pages) == 1


def test_each_plot_is_what_its_file_says() -> None:
    script = SCRIPT.with_name("plots.py")
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}; run python benchmarks/plots.py"
    rows = json.loads((ROOT / "benchmarks" / "results" / "speculation-text-cpu.json").read_text())["rows"]
    drawn = (ROOT / "docs" / "speculation.svg").read_text()
    assert all(f">{row['tokens_per_step']:.2f}<" in drawn and f">{row['accepted']:.0%}<" in drawn for row in rows)
