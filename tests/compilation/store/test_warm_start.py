"""Cold and warm starts in fresh processes: same tokens, and nothing is compiled the second time.

Of compiled layers, with the stand-in for graphs: mode hybrid as it is on CUDA.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from workers import CONFIG, Warmed, result, start

import hybridgen
from hybridgen import CacheMissError, Engine
from hybridgen.compilation.steps import compiles_whole
from hybridgen.compilation.store import Store
from hybridgen.compilation.store.files import sha256
from hybridgen.compilation.store.manifest import READY, Manifest
from hybridgen.execution import numerics
from hybridgen.execution.warm_up import check_numerics
from hybridgen.graphs import capture_plan as history

SETTINGS = CONFIG | {"progress": False}
PROMPTS = families.prompts_of((5, 33, 1, 17))


@pytest.fixture(autouse=True)
def _layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiles_whole, "__code__", (lambda config, mode, device_type: False).__code__)


def only_entry(store: Path) -> Path:
    (entry,) = (store / "entries").iterdir()
    return entry


def check_compiled_nothing(found: dict[str, Any]) -> None:
    assert found["stats"]["artifacts"]["state"] == "hit"
    assert (found["stats"]["compiled"], found["late"], found["traced"], found["inductor"]) == (0, 0, 0, 0)
    assert found["stats"]["fallbacks"] == {}
    # One header goes through the preprocessor in every process that uses Inductor on a CPU.
    assert [path for path in found["compilers"] if Path(path).name != "header.i"] == []


def test_of_two_processes_at_once_one_compiles(warmed: Warmed) -> None:
    first, second = sorted(warmed.results, key=lambda found: found["stats"]["compiled"])
    assert first["tokens"] == second["tokens"]
    assert (first["stats"]["compiled"], second["stats"]["compiled"]) == (0, 3)
    assert first["stats"]["artifacts"]["state"] == "hit"
    assert second["stats"]["artifacts"]["state"] == "miss"
    assert len(list((warmed.store / "entries").iterdir())) == 1


def test_the_tokens_are_those_of_mode_eager(warmed: Warmed) -> None:
    with Engine.load(warmed.model, **SETTINGS | {"mode": "eager"}) as engine:
        outs = engine.generate(PROMPTS, max_new_tokens=8)
    assert [list(out.token_ids) for out in outs] == warmed.tokens


def test_a_moved_store_with_other_weights_and_other_memory(warmed: Warmed, tmp_path: Path) -> None:
    """One warm process for all that must not matter: where the store is, the weights' values, the KV cache's size."""
    store = warmed.copy(tmp_path / "elsewhere")
    tuned = tmp_path / "tuned"
    shutil.copytree(warmed.model, tuned)
    weights = load_file(tuned / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, tuned / "model.safetensors", {"format": "pt"})
    found = result(start(tuned, store, kv_memory="11MiB", offline_compile=True))
    check_compiled_nothing(found)
    assert found["stats"]["artifacts"]["hits"]["compile"] == 3
    assert "start: compile" in found["table"]
    assert {"import", "open model", "load weights", "artifacts", "compile", "capture", "first token"} <= set(
        found["stats"]["startup"]
    )
    with Engine.load(tuned, **SETTINGS | {"mode": "eager"}) as engine:
        outs = engine.generate(PROMPTS, max_new_tokens=8)
    assert [list(out.token_ids) for out in outs] == found["tokens"]


def test_what_was_hot_is_captured(warmed: Warmed) -> None:
    cold = next(found for found in warmed.results if found["stats"]["compiled"])
    rows = cold["stats"]["graphs"]["graphs"]
    assert {(row["phase"], row["tokens"]) for row in rows} == {(p, t) for p, t in all_buckets()}
    plan = json.loads((only_entry(warmed.store) / "documents" / f"{history.DOCUMENT}.json").read_text())
    hot = {(row["phase"], row["tokens"]) for row in plan["graphs"] if row["uses"]}
    assert ("decode", 4) in hot
    assert ("decode", 2) not in hot


def all_buckets() -> list[tuple[str, int]]:
    decode = [("decode", size) for size in CONFIG["decode_buckets"]]
    return decode + [("prefill", size) for size in CONFIG["prefill_buckets"]]


def load(warmed: Warmed, store: Path, **changes: Any) -> Engine:
    return Engine.load(warmed.model, **SETTINGS | {"compile_cache": store} | changes)


def test_in_this_process_it_is_a_hit_too(warmed: Warmed, tmp_path: Path) -> None:
    store = warmed.copy(tmp_path / "store")
    with load(warmed, store, offline_compile=True) as engine:
        assert [list(out.token_ids) for out in engine.generate(PROMPTS, max_new_tokens=8)] == warmed.tokens
        stats = engine.stats()
        assert (stats.compiled, stats.artifacts.state) == (0, "hit")
        # These buckets were named, so all of them are recorded.
        assert recorded(engine) == set(all_buckets())
    with load(warmed, store, offline_compile=True, prefill_buckets=None, decode_buckets=None) as engine:
        # Of those that nobody named, only what was used.
        assert recorded(engine) < set(all_buckets())
    with load(warmed, store, offline_compile=True, prefill_buckets=None, decode_buckets=[3, 4]) as engine:
        assert {size for phase, size in recorded(engine) if phase == "decode"} == {3, 4}
    with load(warmed, store, offline_compile=True, prefill_buckets=None, lazy_capture=False) as engine:
        assert {size for phase, size in recorded(engine) if phase == "prefill"} == {16, 32, 48, 64}


def recorded(engine: Engine) -> set[tuple[str, int]]:
    return {(row.phase, row.tokens) for row in engine.stats().graphs.graphs}


def test_two_engines_that_close_one_after_the_other_keep_both_plans(warmed: Warmed, tmp_path: Path) -> None:
    store = warmed.copy(tmp_path / "store")
    path = only_entry(store) / "documents" / f"{history.DOCUMENT}.json"
    path_before = plan_uses(path)
    with load(warmed, store) as one, load(warmed, store) as two:
        one.generate(PROMPTS[:1], max_new_tokens=9, ignore_eos=True)
        two.generate(PROMPTS[:2], max_new_tokens=9, ignore_eos=True)
    after = plan_uses(path)
    assert after["decode", 1] > path_before["decode", 1] / 4 + 3
    assert after["decode", 2] > path_before["decode", 2] / 4 + 3


def plan_uses(path: Path) -> Counter[tuple[str, int]]:
    uses: Counter[tuple[str, int]] = Counter()
    for row in json.loads(path.read_text())["graphs"]:
        uses[row["phase"], row["tokens"]] += row["uses"]
    return uses


def test_times_that_are_out_of_date_are_measured_again(warmed: Warmed, tmp_path: Path) -> None:
    """As if the device had become a thousand times faster since."""
    store = warmed.copy(tmp_path / "store")
    opened, directory = Store(store), only_entry(store)
    with opened.open(Manifest.read(directory, directory.name).key) as entry:
        plan = entry.read_document(history.DOCUMENT)
        for row in plan["graphs"]:
            row["plain_seconds"] = row["seconds"] = 100.0
        entry.write_document(history.DOCUMENT, plan)
        opened.publish(entry)
    with load(warmed, store, prefill_buckets=[], decode_buckets=[1]) as engine:
        rows = engine.stats().graphs.graphs
        assert rows
        assert all(row.seconds < 50 and row.plain_seconds < 50 for row in rows)
    rows = json.loads((directory / "documents" / f"{history.DOCUMENT}.json").read_text())["graphs"]
    assert {row["seconds"] is None for row in rows} == {True, False}
    assert all(row["seconds"] < 50 for row in rows if row["seconds"] is not None)


def test_offline_a_miss_is_an_error(warmed: Warmed, tmp_path: Path) -> None:
    with pytest.raises(CacheMissError, match="the store is empty"):
        load(warmed, tmp_path / "empty", offline_compile=True)
    store = warmed.copy(tmp_path / "store")
    with pytest.raises(CacheMissError, match=r"config\.slots: 5 here, 4 there"):
        load(warmed, store, offline_compile=True, max_batch=5)
    with pytest.raises(hybridgen.ConfigError, match="nothing could ever run"):
        load(warmed, store, offline_compile=True, compile_cache=False)
    with pytest.raises(CacheMissError, match="what the backend aot_eager makes is not kept"):
        load(warmed, store, offline_compile=True, compile_backend="aot_eager")


def test_code_that_computes_something_else_is_found_and_replaced(
    warmed: Warmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numerics check fails: the entry is moved aside, and the engine compiles."""
    store = warmed.copy(tmp_path / "store")
    monkeypatch.setattr(numerics, "compare", lambda runner, compiled: "a prompt gave other logits")
    with pytest.raises(CacheMissError, match="a prompt gave other logits"), pytest.warns(RuntimeWarning, match="other"):
        load(warmed, store, offline_compile=True)
    (aside,) = (store / "quarantine").iterdir()
    assert "a prompt gave other logits" in (aside / "reason.txt").read_text()
    shutil.rmtree(store)
    warmed.copy(store)
    with pytest.warns(RuntimeWarning, match="a prompt gave other logits"):
        engine = load(warmed, store)
    with engine:
        assert [list(out.token_ids) for out in engine.generate(PROMPTS, max_new_tokens=8)] == warmed.tokens
        stats = engine.stats()
        assert (stats.compiled, stats.artifacts.state) == (3, "miss")
        assert any("other logits" in reason for reason in stats.fallbacks)
    assert (only_entry(store) / READY).exists()
    assert len(list((store / "quarantine").iterdir())) == 1


def test_the_numerics_check_sees_a_wrong_layer(warmed: Warmed, tmp_path: Path) -> None:
    with load(warmed, warmed.copy(tmp_path / "store"), offline_compile=True) as engine:
        runner = engine._runner
        assert check_numerics(runner) is None
        find = runner.compiled.units.find

        def wrong(*arguments: Any) -> Any:
            right = find(*arguments)
            return lambda *args, **kwargs: right(*args, **kwargs) * 1.05

        runner.compiled.units.find = wrong
        assert "differ" in check_numerics(runner)
        del runner.compiled.units.find
        assert torch.count_nonzero(runner.state.table) == 0


def test_traced_source_that_changed(warmed: Warmed, tmp_path: Path) -> None:
    """The manifest is right, but a function that was traced has other lines now: as in an edited installation."""
    store = warmed.copy(tmp_path / "store")
    entry = only_entry(store)
    index = entry / "aot" / "units.json"
    text = index.read_text()
    digest = json.loads(text)["units"][0]["sources"][0]["sha256"]
    opened = Store(store)
    manifest = Manifest.read(entry, entry.name)
    index.write_text(text.replace(digest, "0" * 64))
    data = index.read_bytes()
    files = dict(manifest.files) | {"aot/units.json": (len(data), sha256(data))}
    Manifest(manifest.key, files).write(entry)
    assert opened.check(manifest.key).hit
    with (
        pytest.warns(RuntimeWarning, match="was traced and has changed since"),
        pytest.raises(CacheMissError, match="was traced and has changed since"),
    ):
        load(warmed, store, offline_compile=True)
