"""Whole comparisons of a tiny model on the CPU, and the command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import families
import pytest

import hybridgen
from hybridgen.cli.main import main
from hybridgen.comparison.data.config import ABLATIONS
from hybridgen.comparison.measuring.measure import Measurement
from hybridgen.comparison.results import read

TINY: dict[str, Any] = {
    "prompt_lengths": (5, 20),
    "batch_sizes": (1, 2),
    "new_tokens": 4,
    "budget": 600,
    "repeats": 2,
    "warm_up": 1,
    "compile_backend": "eager",
    "decode_buckets": [1, 2],
    "prefill_buckets": [8, 32],
    "progress": False,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    model = families.build("llama")
    folder = tmp_path_factory.mktemp("comparison")
    return model, hybridgen.compare(model, baselines=("hf-dynamic", "hf-static"), output=folder, **TINY), folder


def test_all_modes_and_baselines_are_measured_on_the_same_weights(found: Any) -> None:
    _, comparison, _ = found
    assert [subject.name for subject in comparison.subjects] == [
        "eager", "jit", "graph", "hybrid", "hf-dynamic", "hf-static",
    ]  # fmt: skip
    assert {cell.status for cell in comparison.cells} == {"ok"}
    assert all(cell.repeats == 2 and cell.stopped == "repeats" for cell in comparison.cells)


def test_every_mode_agrees_with_eager_in_float32(found: Any) -> None:
    for cell in found[1].cells:
        assert cell.agreement == (1.0, None), cell.subject
        if not cell.subject.startswith("hf"):
            assert cell.logit_error < 1e-4, cell.subject


def test_times_are_of_the_calls(found: Any) -> None:
    for cell in found[1].cells:
        assert cell.ttft.count == cell.repeats * cell.batch_size
        assert cell.tpot.count == cell.repeats * cell.batch_size * 3
        assert 0 < cell.ttft.p50 <= cell.ttft.p99 <= max(cell.walls)
        assert cell.tokens_per_s == pytest.approx(cell.batch_size * 4 / cell.wall.p50)
        assert cell.cpu_per_step > 0
        assert 0 < cell.cpu_utilisation < 2 * (os.cpu_count() or 1)
        assert (cell.mbu, cell.gpu_utilisation) == (None, None)  # a CPU
        assert cell.memory >= sum(parameter.nbytes for parameter in found[0].parameters())


def test_steps_are_counted_by_how_they_ran(found: Any) -> None:
    comparison = found[1]
    for cell in comparison.cells:
        if cell.subject.startswith("hf"):
            assert cell.graphs is None
            continue
        steps = sum(cell.graphs["reasons"].values())
        assert steps == cell.repeats * 4
        assert cell.graphs["pre_captured"] + cell.graphs["lazy"] + cell.graphs["none"] == steps
        assert (cell.graphs["capture_failures"], cell.graphs["failed"]) == (0, 0)
        if cell.subject in ("eager", "jit"):
            assert cell.graphs["none"] == steps
            assert (cell.graphs["hit_rate"], cell.graphs["phases"]) == (None, {})
        else:
            assert cell.graphs["pre_captured"] + cell.graphs["lazy"] >= 3 * cell.repeats  # all decode steps
            assert cell.graphs["hit_rate"] == 1 - cell.graphs["none"] / steps
            assert cell.graphs["phases"]["decode"] == {
                "hits": 3 * cell.repeats, "padded_hits": 0, "misses": 0, "hit_rate": 1.0,
            }  # fmt: skip
            assert any("stand-in" in reason for reason in cell.graphs["reasons"])


def test_no_measured_call_brings_a_capture(found: Any) -> None:
    for cell in found[1].cells:
        if cell.graphs is not None:
            assert not any("is not captured" in reason for reason in cell.graphs["reasons"])


def test_start_up_has_its_parts(found: Any) -> None:
    subjects = {subject.name: subject for subject in found[1].subjects}
    assert subjects["eager"].compile_cache is None
    assert {"compile", "capture", "first calls"} <= set(subjects["hybrid"].startup)
    assert subjects["hybrid"].captured > 0
    assert subjects["hf-dynamic"].captured is None


def test_provenance_says_where_and_with_what(found: Any) -> None:
    facts = found[1].provenance
    for name in ("time", "command", "hybridgen", "python", "torch", "transformers", "processor", "threads"):
        assert facts[name], name


def test_a_live_module_is_not_run_again_by_itself(found: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert found[1].live
    assert main(["compare", "--config", str(found[2] / "comparison.json")]) == 2
    assert "name a MODEL" in capsys.readouterr().err


def test_one_engine_after_the_other_gives_the_same_tokens(found: Any) -> None:
    comparison = hybridgen.compare(found[0], modes=("jit",), together=False, **{**TINY, "prompt_lengths": 5})
    assert [cell.agreement for cell in comparison.cells] == [(1.0, None)] * 4
    assert all(cell.logit_error is not None for cell in comparison.cells)


def test_ablation_adds_a_row_for_each_switch(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {
        name: ABLATIONS[name]
        for name in (
            "decode_buckets=[]",
            "mode=graph",
            "fuse_projections=False, fused_decode=False",
            "speculation=ngram",
        )
    }
    monkeypatch.setattr("hybridgen.comparison.data.config.ABLATIONS", few)
    fields = {**TINY, "prompt_lengths": 5, "batch_sizes": 2, "repeats": 1}
    comparison = hybridgen.compare(found[0], modes=("hybrid",), ablate=True, **fields)
    switches = {subject.name: subject for subject in comparison.subjects if subject.kind == "switch"}
    assert len(switches) == 4
    assert {cell.status for cell in comparison.cells} == {"ok"}
    assert all(cell.agreement.share == 1.0 for cell in comparison.cells)
    without = comparison.cell("hybrid, decode_buckets=[]", 5, 2).graphs
    assert any("decode is not recorded" in reason for reason in without["reasons"])


def test_draws_are_the_same_in_every_mode(found: Any) -> None:
    fields = {**TINY, "prompt_lengths": 5, "repeats": 1}
    sampled = hybridgen.compare(found[0], temperature=0.9, seed=4, **fields)
    assert all(cell.agreement == (1.0, None) for cell in sampled.cells)


def test_a_rerun_from_json_has_the_same_config_and_order(
    llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    orders: list[list[Any]] = []
    measure = Measurement._measure

    def noting(self: Any, subject: Any, record: Any) -> None:
        orders[-1].append(record.cell)
        measure(self, subject, record)

    monkeypatch.setattr(Measurement, "_measure", noting)
    options = [
        "--modes", "eager", "graph", "--prompt-lengths", "5", "9", "--batch-sizes", "1", "2", "--new-tokens", "3",
        "--repeats", "2", "--seed", "7", "--engine", "decode_buckets=[1,2]", "prefill_buckets=[16]", "page_size=16",
    ]  # fmt: skip
    orders.append([])
    assert main(["compare", str(llama_path), *options, "--output", str(tmp_path / "one")]) == 0
    orders.append([])
    again = ["compare", "--config", str(tmp_path / "one" / "comparison.json"), "--output", str(tmp_path / "two")]
    assert main(again) == 0
    assert orders[0] == orders[1]
    assert len(orders[0]) == 2 * 8
    one, two = (read(tmp_path / name / "comparison.json") for name in ("one", "two"))
    assert one.config == two.config
    assert one.source == two.source == str(llama_path)
    assert "Times and agreement" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options, message in (
        (["--smoke", "--config", "x.json"], "give one of them"),
        (["--engine", "page_size"], "is no FIELD=VALUE"),
        (["--modes", "fast"], "modes holds 'fast'"),
        (["--config", str(tmp_path / "absent.json")], "cannot be read"),
    ):
        assert main(["compare", *options]) == 2
        assert message in capsys.readouterr().err


def test_smoke_runs_all_modes_of_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The small run, with a backend that compiles nothing: what it costs with Inductor is for whoever runs it."""
    options = ["--engine", "compile_backend=eager", "dtype=float32", "page_size=16", "prefill_buckets=[16,64]"]
    code = main(["compare", "--smoke", "--budget", "1", "--new-tokens", "4", *options, "--output", str(tmp_path)])
    text = capsys.readouterr().out
    assert code == 0, text
    assert len(list(tmp_path.iterdir())) == 8
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert {cell["subject"] for cell in values["cells"]} >= {"eager", "jit", "graph", "hybrid", "hf-dynamic"}
    assert {cell["status"] for cell in values["cells"]} <= {"ok", "not measured"}
    assert all(cell["agreement"][0] == 1.0 for cell in values["cells"] if cell["status"] == "ok")
