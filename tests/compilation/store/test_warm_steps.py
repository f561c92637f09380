"""Whole decode steps of a CPU in the compile cache: compiled in one process, loaded in another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from workers import CONFIG, Warmed, result, start

from hybridgen import CacheMissError, Engine, EngineConfig
from hybridgen.cli import cache as cache_command
from hybridgen.cli.main import main as run_command
from hybridgen.compilation import steps as compiled_steps
from hybridgen.compilation.store import session
from hybridgen.compilation.store.files import sha256
from hybridgen.compilation.store.manifest import Manifest
from hybridgen.engine.preflight import resolve_config
from hybridgen.graphs import capture_plan
from hybridgen.loading import Checkpoint

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")

CHANGES: dict[str, Any] = {"decode_buckets": [4], "prefill_buckets": None}
SETTINGS = CONFIG | {"progress": False} | CHANGES
PROMPTS = families.prompts_of((5, 33, 1, 17))


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Warmed:
    """What a process left that waits for its compiler, as `hybridgen cache warm` does."""
    directory = tmp_path_factory.mktemp("steps")
    model = families.write("llama", directory, num_hidden_layers=1)  # a step is compiled with all of them
    store = directory / "store"
    filled = result(start(model, store, layers=False, lazy_capture=False, **CHANGES))
    return Warmed(model, store, (filled,))


def load(warmed: Warmed, store: Path, **changes: Any) -> Engine:
    return Engine.load(warmed.model, **SETTINGS | {"compile_cache": store} | changes)


def tokens_of(engine: Engine, **sampling: Any) -> list[list[int]]:
    return [list(out.token_ids) for out in engine.generate(PROMPTS, max_new_tokens=8, **sampling)]


def kinds_of(engine: Engine) -> set[str]:
    return {kind for phase, kind, _ in engine.stats().steps if phase == "decode"}


def only_entry(store: Path) -> Path:
    (entry,) = (store / "entries").iterdir()
    return entry


def test_what_a_process_that_waits_leaves(warmed: Warmed) -> None:
    (found,) = warmed.results
    assert found["stats"]["fallbacks"] == {}
    assert found["stats"]["artifacts"]["misses"]["compile"] == 2
    # One greedy, and one up to the logits for all other samplers.
    assert {row["owner"] for row in found["stats"]["graphs"]["graphs"]} == {"compiled step"}
    assert len(list(only_entry(warmed.store).glob("aot/step-*.bin"))) == 2
    with Engine.load(warmed.model, **SETTINGS | {"mode": "eager"}) as engine:
        assert tokens_of(engine) == warmed.tokens


def test_a_moved_store_with_other_weights_and_other_memory(warmed: Warmed, tmp_path: Path) -> None:
    store = warmed.copy(tmp_path / "elsewhere")
    tuned = tmp_path / "tuned"
    shutil.copytree(warmed.model, tuned)
    weights = load_file(tuned / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, tuned / "model.safetensors", {"format": "pt"})
    found = result(start(tuned, store, layers=False, kv_memory="11MiB", offline_compile=True, **CHANGES))
    stats = found["stats"]
    assert (stats["artifacts"]["state"], stats["fallbacks"]) == ("hit", {})
    assert (stats["artifacts"]["hits"]["compile"], stats["artifacts"]["misses"]["compile"]) == (2, 0)
    assert (found["traced"], found["inductor"]) == (0, 0)
    assert [path for path in found["compilers"] if Path(path).name != "header.i"] == []
    assert stats["graphs"]["phases"]["decode"]["misses"] == 0
    with Engine.load(tuned, **SETTINGS | {"mode": "eager"}) as engine:
        assert tokens_of(engine) == found["tokens"]


def test_every_sampler_runs_from_it(warmed: Warmed, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "seed": 4},
        {"repetition_penalty": 1.3, "logprobs": 2},
    ]
    with Engine.load(warmed.model, **SETTINGS | {"mode": "eager"}) as engine:
        expected = [tokens_of(engine, **option) for option in options]
    with load(warmed, warmed.copy(tmp_path / "store"), offline_compile=True) as engine:
        assert [tokens_of(engine, **option) for option in options] == expected
        assert kinds_of(engine) == {"layers, compiled step"}
        assert engine.stats().fallbacks == {}


def test_steps_are_the_same_whatever_max_batch_is(warmed: Warmed, tmp_path: Path) -> None:
    with load(warmed, warmed.copy(tmp_path / "store"), offline_compile=True, max_batch=31) as engine:
        assert tokens_of(engine) == warmed.tokens
        assert kinds_of(engine) == {"layers, compiled step"}
        assert engine.stats().artifacts.hits["compile"] == 2


def test_offline_what_is_not_kept_is_an_error(warmed: Warmed, tmp_path: Path) -> None:
    with pytest.raises(CacheMissError, match="the store is empty"):
        load(warmed, tmp_path / "empty", offline_compile=True)
    store = warmed.copy(tmp_path / "store")
    with (
        pytest.warns(RuntimeWarning, match="does not hold this step"),
        pytest.raises(CacheMissError, match="2 compiled steps that this start needs"),
    ):
        load(warmed, store, offline_compile=True, decode_buckets=[3, 4])
    for step in only_entry(store).glob("aot/step-*.bin"):
        step.unlink()
    shrink(store)
    (only_entry(store) / "documents" / f"{capture_plan.DOCUMENT}.json").unlink()
    shrink(store)
    with pytest.raises(CacheMissError, match="does not hold any compiled step"):
        load(warmed, store, offline_compile=True, decode_buckets=None)


def test_offline_a_later_step_that_is_not_kept_runs_as_it_is(warmed: Warmed, tmp_path: Path) -> None:
    store = warmed.copy(tmp_path / "store")
    with load(warmed, store, offline_compile=True, decode_buckets=None, max_padding_ratio=0) as engine:
        for _ in range(2):
            outs = engine.generate(PROMPTS[:1], max_new_tokens=8)
            assert [list(out.token_ids) for out in outs] == warmed.tokens[:1]
            if not engine.stats().fallbacks:
                with pytest.warns(RuntimeWarning, match="does not hold this step"):
                    engine.idle()
        assert kinds_of(engine) == {"layers, eager"}


def shrink(store: Path) -> None:
    """Make the manifest say what is there."""
    entry = only_entry(store)
    manifest = Manifest.read(entry, entry.name)
    files = {}
    for name in manifest.files:
        if (entry / name).exists():
            data = (entry / name).read_bytes()
            files[name] = (len(data), sha256(data))
    Manifest(manifest.key, files).write(entry)


def test_a_step_that_cannot_be_loaded_is_said_so(warmed: Warmed, tmp_path: Path) -> None:
    store = warmed.copy(tmp_path / "store")
    for step in only_entry(store).glob("aot/step-*.bin"):
        step.write_bytes(b"no artifact")
    shrink(store)
    with (
        pytest.warns(RuntimeWarning, match="a compiled step cannot be loaded"),
        pytest.raises(CacheMissError, match="2 compiled steps"),
    ):
        load(warmed, store, offline_compile=True)


def test_code_that_computes_something_else_is_found(
    warmed: Warmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first replays are compared with the step, whose tokens stand."""
    right = compiled_steps.load_step

    def wrong(path: Path) -> Any:
        step = right(path)

        def run(*inputs: torch.Tensor) -> None:
            step(*inputs)
            for one in inputs:  # the state's table: [3, slots]
                if one.dtype == torch.int64 and one.dim() == 2 and one.shape[0] == 3 and one.shape[1] > 1:
                    one[0] += 1

        return run

    monkeypatch.setattr(compiled_steps, "load_step", wrong)
    with load(warmed, warmed.copy(tmp_path / "store"), offline_compile=True) as engine:
        with pytest.warns(RuntimeWarning, match="its first replay gave other values"):
            assert tokens_of(engine) == warmed.tokens
        assert tokens_of(engine) == warmed.tokens
        assert any("first replay gave other values" in why for why in engine.stats().graphs.failures.values())


def test_the_command_line_knows_it(
    warmed: Warmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, bundle = warmed.copy(tmp_path / "store"), tmp_path / "bundle"
    config = EngineConfig(**SETTINGS | {"compile_cache": store})
    checkpoint = Checkpoint.open(warmed.model, config)
    found = session.explain(checkpoint, config, session.key_for(checkpoint, config, resolve_config(checkpoint, config)))
    assert found.hit
    assert run_command(["cache", "export", str(bundle), "--dir", str(store)]) == 0
    assert run_command(["cache", "import", str(bundle), "--trust", "--dir", str(tmp_path / "other")]) == 0
    assert run_command(["cache", "list", "--dir", str(tmp_path / "other")]) == 0
    assert "mode hybrid" in capsys.readouterr().out
    monkeypatch.setattr(cache_command, "_config", lambda arguments: config)  # page_size is no option
    # Which would fill it, if it were not full.
    assert run_command(["cache", "warm", str(warmed.model), "--mode", "hybrid"]) == 0
    assert ": hit (" in capsys.readouterr().out
    with load(warmed, tmp_path / "other", offline_compile=True) as engine:
        assert tokens_of(engine) == warmed.tokens
        assert engine.stats().artifacts.misses["compile"] == 0


def test_a_model_whose_steps_cannot_be_recorded_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = families.write("gpt2", tmp_path)
    options = ["--mode", "hybrid", "--device", "cpu", "--buckets", "1", "--dir", str(tmp_path / "store")]
    with pytest.warns(RuntimeWarning, match="values"):
        assert run_command(["cache", "warm", str(path), *options]) == 2
    assert "the compile cache was not filled" in capsys.readouterr().err
