"""Every benchmark runs small on this machine and ends in one JSON line; every kept result says where it is from."""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hybridgen import EngineConfig
from hybridgen.comparison.measuring.utilisation import Probe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HELPERS = (
    "call_tables.py", "checkpoints.py", "clocks.py", "common.py", "demo_formats.py", "group_kernels.py",
    "http_clients.py", "http_load.py", "lookup.py", "parts.py", "plots.py", "ragged_steps.py", "random_weights.py",
    "rank_kernels.py", "requirements.py", "shapes.py", "speculation_tables.py", "step_tables.py", "table_cells.py",
    "tables.py", "targets.py",
)  # fmt: skip
"""What measures nothing."""
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in HELPERS)
LONG = (
    "ablation.py", "accuracy.py", "first_text.py", "model_shapes.py", "multimodal_loading.py", "parallel.py",
    "prefill_kernels.py", "ragged.py", "serving.py", "serving_http.py", "serving_mix.py", "two_trees.py", "unseen.py",
    "warm_start.py", "workflows.py",
)  # fmt: skip
"""Of which a smoke run takes ten seconds or more: processes of their own, or all modes compiled by Inductor."""
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


def run(script: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / script), option])
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.parametrize("script", LONG)
def test_a_script_of_which_the_smoke_is_slow_can_be_called(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it imports is there, and it takes its options."""
    with pytest.raises(SystemExit) as ended:
        run(script, "--help", monkeypatch)
    assert ended.value.code == 0


@pytest.mark.parametrize(
    "script",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in SCRIPTS if name != "ttft.py"],
)
def test_smoke(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python benchmarks/SCRIPT --smoke`, in this process: what importing torch takes is most of a smoke run.
    That of `ttft.py` is of the test of its table."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    # Scripts collect garbage between their cases: they are not to look at what compiling for others left.
    gc.collect()
    gc.freeze()
    try:
        run(script, "--smoke", monkeypatch)
    finally:
        torch.set_num_threads(threads)
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


def test_the_gpu_s_share_of_a_benchmark_is_of_the_call_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels cover 0.25 of the 0.5 s that the short call took before; seven times as much is no share."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memory_limit = importlib.import_module("memory_limit")
    called: list[int] = []

    def cases(model: object, arguments: object, add: Callable[..., None]) -> None:
        add("hybrid", 1, None, called.append)
        add("hybrid", 8, None, called.append)

    def record(call: Callable[[], object]) -> list[object]:
        call()
        times = SimpleNamespace(start=0, end=250_000)
        return [SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, time_range=times)]

    monkeypatch.setattr(memory_limit, "engine_cases", cases)
    rows = [
        {"model": "m", "what": "hybrid", "batch": batch, "short_call_s": took} for batch, took in ((1, 0.5), (8, 0.03))
    ]
    arguments = SimpleNamespace(new=256)
    memory_limit.profile_cases(None, rows, arguments, Probe(lambda: None, record))
    assert [row["gpu_utilisation"] for row in rows] == [0.5, None]
    assert set(called) == {memory_limit.UTILISATION_TOKENS}


def test_the_table_by_prompt_length_is_printed_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TTFT, p99, graphs and memory of each prompt, and an average of each mode, in one table, on any machine."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    output = tmp_path / "ttft.json"
    options = ["--smoke", "--modes", "eager", "hybrid", "--baselines", "hf-dynamic", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["ttft.py", *options])
    importlib.import_module("ttft").main()
    result = json.loads(output.read_text())
    for row in result["rows"]:
        assert row["ttft_p99_ms"] > 0
        assert row["memory_bytes"] > 0
        assert row["cpu_utilisation"] > 0
        if row["mode"] == "hf-dynamic":
            assert row["graphs"] is None
            continue
        steps = sum(row["graphs"][name] for name in ("pre_captured", "lazy", "none"))
        assert steps == 2 * 3  # calls of three tokens
        assert (row["graphs"]["hit_rate"] is None) == (row["mode"] == "eager")
    assert [row["mode"] for row in result["averages"]] == ["eager", "hybrid", "hf-dynamic"]
    for average in result["averages"]:
        own = [row for row in result["rows"] if row["mode"] == average["mode"]]
        for name in ("ttft_mean_ms", "ttft_p99_ms", "memory_bytes"):
            assert average[name] == pytest.approx(sum(row[name] for row in own) / 2)
    printed = capsys.readouterr().out
    assert json.loads(printed.strip().splitlines()[-1])["provenance"]["torch"]
    [head] = [line for line in printed.splitlines() if line.startswith("| prompt |")]
    assert all(name in head for name in ("TTFT mean, ms", "steps by graphs", "memory, GiB", "CPU", "GPU"))
    assert [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| tiny")] == [
        *["| tiny, 5"] * 3, *["| tiny, 20"] * 3, *["| tiny, average"] * 3,
    ]  # fmt: skip


def test_codes_of_8_bits_that_a_rounding_may_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the kernel for several columns takes a number's nearest code and its neighbours, and no others."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = importlib.import_module("rows")
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = codes.float()
    order = values[values.isfinite()].abs().unique()
    order = torch.cat((-order.flip(0)[:-1], order))  # without a second zero
    near = rows.last_bits(codes[:, None].expand(256, 256), codes[None].expand(256, 256))
    for a in range(256):
        for b in range(256):
            if values[a].isfinite() and values[b].isfinite():
                apart = (torch.searchsorted(order, values[a]) - torch.searchsorted(order, values[b])).abs()
                assert bool(near[a, b]) == (int(apart) <= 1), (a, b)


def test_who_has_the_time_lock_measures_when_nobody_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    turns_of = importlib.import_module("model_shapes").Turns
    lock = tmp_path / "lock"
    ours, theirs = turns_of(lock), lock.open("w")  # descriptors of their own, as processes have

    def free(kind: int) -> bool:
        try:
            fcntl.flock(theirs, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(theirs, fcntl.LOCK_UN)
        return True

    with theirs:
        with ours.together():
            assert free(fcntl.LOCK_SH)
            assert not free(fcntl.LOCK_EX)
        with ours.alone():
            assert not free(fcntl.LOCK_SH)
        assert free(fcntl.LOCK_EX)
