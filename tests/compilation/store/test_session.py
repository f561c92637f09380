"""An engine's use of the store, without compilers: what is set, what wins, and what trouble costs."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir
from waiting import HANGS

from hybridgen import CacheMissError, EngineConfig
from hybridgen.compilation.store import Entry, MemoryEntry, Store, environment, session, versions
from hybridgen.compilation.store import store as store_module
from hybridgen.compilation.store.session import CompileCache
from hybridgen.config import Mode
from hybridgen.engine.preflight import open_cache
from hybridgen.engine.warm_start import Starter, Startup
from hybridgen.loading import Checkpoint
from hybridgen.telemetry.statistics import Counters

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
MARKS = tuple(f"_HYBRIDGEN_SET_{variable}" for variable in VARIABLES)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The variables as a fresh process has them, and as they were afterwards."""
    before = dict(environment._ours)
    for variable in (*VARIABLES, *MARKS):
        monkeypatch.delenv(variable, raising=False)
    environment._ours.clear()
    monkeypatch.setattr(environment, "_aside", [])
    yield
    for variable in (*VARIABLES, *MARKS):
        os.environ.pop(variable, None)
    environment._ours.clear()
    environment._ours.update(before)


def opened(store: Path, path: Path, **fields: Any) -> CompileCache:
    config = EngineConfig(**{"mode": "hybrid", "device": "cpu", "compile_cache": store} | fields)
    return open_cache(Checkpoint.open(path, config), config)


def test_compilers_are_sent_to_the_copy_and_back(tmp_path: Path, llama_path: Path) -> None:
    cache = opened(tmp_path / "store", llama_path)
    assert isinstance(cache.entry, Entry)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache.entry.inductor) == cache_dir()
    assert os.environ["TRITON_CACHE_DIR"] == str(cache.entry.triton)
    assert (cache.state, cache.notes) == ("miss", [])
    cache.close()
    assert not {*VARIABLES, *MARKS} & set(os.environ)


def test_a_child_process_does_not_take_ours_for_the_users(tmp_path: Path, llama_path: Path) -> None:
    parent = opened(tmp_path / "store", llama_path)
    environment._ours.clear()  # what a child inherits is the environment alone
    child = opened(tmp_path / "other", llama_path)
    assert child.notes == []
    assert os.environ["TRITON_CACHE_DIR"] == str(child.entry.triton) != str(parent.entry.triton)
    child.close()
    parent.close()


def test_a_refused_start_leaves_nothing_set(tmp_path: Path, llama_path: Path) -> None:
    with pytest.raises(CacheMissError):
        opened(tmp_path / "store", llama_path, offline_compile=True)
    assert not {*VARIABLES, *MARKS} & set(os.environ)


def test_a_users_own_settings_win_and_are_named(
    tmp_path: Path, llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/users/own")
    cache = opened(tmp_path / "store", llama_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/users/own"
    assert os.environ["TRITON_CACHE_DIR"] == str(cache.entry.triton)
    assert cache.notes == ["TORCHINDUCTOR_CACHE_DIR=/users/own is the user's own; its files are not in the entry"]
    cache.close()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/users/own"


def test_what_inductor_sets_itself_is_not_a_users_setting(
    tmp_path: Path, llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.path.abspath(default_cache_dir()))
    monkeypatch.setenv("TRITON_CACHE_DIR", os.path.join(os.path.abspath(default_cache_dir()), "triton", "0"))
    cache = opened(tmp_path / "store", llama_path)
    assert cache.notes == []
    assert os.environ["TRITON_CACHE_DIR"] == str(cache.entry.triton)
    cache.close()


def test_a_later_engine_has_its_own_and_closing_the_first_leaves_it(tmp_path: Path, llama_path: Path) -> None:
    first = opened(tmp_path / "store", llama_path)
    (first.entry.triton / "HASH").mkdir()
    (first.entry.triton / "HASH" / "kernel.cubin").write_bytes(b"x")
    first.end_start()
    second = opened(tmp_path / "store", llama_path, max_batch=3)
    assert os.environ["TRITON_CACHE_DIR"] == str(second.entry.triton)
    # Loaded already, it would not be compiled again into the second entry.
    assert (second.entry.triton / "HASH" / "kernel.cubin").exists()
    first.close()
    assert os.environ["TRITON_CACHE_DIR"] == str(second.entry.triton)
    second.close()


def test_what_triton_compiled_outlives_the_working_copy_of_a_closed_engine(tmp_path: Path, llama_path: Path) -> None:
    first = opened(tmp_path / "store", llama_path)
    group = first.entry.triton / "HASH" / "__grp__kernel.json"
    group.parent.mkdir()
    group.write_text(f'{{"child_paths": {{"kernel.cubin": "{group.parent}/kernel.cubin"}}}}')
    first.end_start()
    first.close()
    assert list((tmp_path / "store" / "work").iterdir()) == []
    second = opened(tmp_path / "store", llama_path, max_batch=3)
    assert str(second.entry.triton) in (second.entry.triton / "HASH" / "__grp__kernel.json").read_text()
    second.close()
    assert list((tmp_path / "store" / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"compile_cache": False}, "compile_cache=False"),
        ({"compile_cache": True}, "HYBRIDGEN_COMPILE_CACHE=0"),
        ({"compile_backend": "aot_eager"}, "what the backend aot_eager makes is not kept"),
        ({"mode": "graph"}, "mode graph on a CPU compiles nothing"),
    ],
)
def test_when_nothing_is_kept(tmp_path: Path, llama_path: Path, fields: dict[str, Any], reason: str) -> None:
    cache = opened(tmp_path / "store", llama_path, **fields)
    assert (cache.state, cache.entry.reason) == ("off", reason)
    assert isinstance(cache.entry, MemoryEntry)
    cache.keep_document("choices", {"a": 1})
    assert cache.read_document("choices") == {"a": 1}
    cache.end_start()
    cache.close()
    assert not (tmp_path / "store").exists()


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_the_cache_and_nothing_else(
    tmp_path: Path, llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "WorkingDirectory", full)
    cache = opened(tmp_path / "store", llama_path)
    assert (cache.state, cache.entry.reason) == ("off", "no working copy can be written (No space left on device)")
    cache.close()
    with pytest.raises(CacheMissError, match="No space left"):
        opened(tmp_path / "store", llama_path, offline_compile=True)
    monkeypatch.undo()
    cache = opened(tmp_path / "store", llama_path)
    (cache.entry.inductor / "code").write_bytes(b"x")
    monkeypatch.setattr(versions, "_put", full)
    cache.end_start()
    assert cache.notes == ["the compile cache cannot keep what was made: No space left on device"]
    cache.close()


def test_what_proved_wrong_is_emptied_and_moved_aside(tmp_path: Path, llama_path: Path) -> None:
    cache = opened(tmp_path / "store", llama_path)
    (cache.entry.inductor / "code").write_bytes(b"x")
    cache.end_start()
    cache.close()
    cache = opened(tmp_path / "store", llama_path)
    assert cache.state == "hit"
    cache.distrust("it computes something else")
    assert (cache.state, list(cache.entry.inductor.iterdir())) == ("miss", [])
    cache.end_start()
    cache.close()
    (aside,) = (tmp_path / "store" / "quarantine").iterdir()
    assert (aside / "reason.txt").read_text() == "it computes something else\n"
    assert Store(tmp_path / "store").entries() == []


def test_a_store_that_others_can_write_to_is_not_used(tmp_path: Path, llama_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    cache = opened(tmp_path / "open" / "store", llama_path)
    assert cache.state == "off"
    assert "can be written by others" in cache.notes[0]
    cache.close()
    assert list((tmp_path / "open").iterdir()) == []


def test_a_directory_that_cannot_be_used_is_warned_of(tmp_path: Path, llama_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o755)
    cache, counters = opened(tmp_path / "store", llama_path), Counters()
    with pytest.warns(RuntimeWarning, match=f"compile cache: {tmp_path / 'store'} is open to others.*chmod 700"):
        Starter(cache, Startup(0.0, 0.0), counters)
    assert sum(counters.fallbacks.values()) == 1
    cache.close()


def test_what_is_imported_ahead_is_waited_for_and_counted(
    tmp_path: Path, llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, done = threading.Event(), []

    def load() -> None:
        ready.wait(HANGS)
        done.append("imported")

    monkeypatch.setattr(session, "_import_code_cache", load)
    monkeypatch.setattr(session, "import_loader", load)
    cache = opened(tmp_path / "store", llama_path)
    before = cache.seconds
    wait = session.preload(cache, EngineConfig(mode="jit"), Mode.JIT, "cpu")
    threading.Timer(0.05, ready.set).start()
    wait()
    assert done == ["imported"]
    assert cache.seconds > before
    for config, mode, device in (
        (EngineConfig(), Mode.EAGER, "cpu"),
        (EngineConfig(graphs="trees", mode="hybrid"), Mode.HYBRID, "cuda"),
        (EngineConfig(mode="hybrid"), Mode.HYBRID, "cpu"),  # no step is kept: nothing is loaded
    ):
        session.preload(cache, config, mode, device)()
    assert done == ["imported"]
    cache.entry.hit = True
    session.preload(cache, EngineConfig(mode="hybrid"), Mode.HYBRID, "cpu")()
    assert done == ["imported", "imported"]
    cache.close()


def test_modules_that_compiled_code_needs_are_there_ahead() -> None:
    session._import_code_cache()
    assert "torch._inductor.codecache" in sys.modules
