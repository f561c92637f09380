"""Triton compiles no kernel of ours for an engine that may not compile: Triton itself, for a GPU that is not here."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_session import opened

from hybridgen import CacheMissError
from hybridgen.compilation.store import refusal
from hybridgen.compilation.store.refusal import allowing, refusing

triton = pytest.importorskip("triton")
NAME = "copy_kernel"


@pytest.fixture(autouse=True)
def _own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    before = dict(vars(triton.knobs.cache))
    yield
    assert dict(vars(triton.knobs.cache)) == before
    assert refusal._refusing == refusal._allowing == []


def lookup(name: str = NAME, key: str = "ab" * 32) -> Any:
    """What `triton.compile` asks before it compiles."""
    import hybridgen.kernels.step.metadata_copy  # noqa: F401

    return triton.runtime.cache.get_cache_manager(key).get_group(f"{name}.json")


def compiled() -> Any:
    """A kernel of ours for an H200."""
    from triton.backends.compiler import GPUTarget

    from hybridgen.kernels.step.metadata_copy import source_of

    source, options = source_of(8, True)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_what_is_kept_is_served_and_nothing_is_compiled() -> None:
    with refusing() as refused:
        with pytest.raises(CacheMissError, match=f"Triton kernel {NAME} .* hybridgen cache warm"):
            compiled()
        assert refused == [NAME]
    made = compiled()
    with refusing() as refused:
        assert compiled().asm["cubin"] == made.asm["cubin"]
        assert refused == []


def test_kernels_of_others_are_compiled() -> None:
    with refusing() as refused:
        assert lookup("a_users_kernel") is None
        assert refused == []


def test_an_engine_that_may_compile_is_not_refused() -> None:
    with allowing(), refusing() as refused:
        assert lookup() is None
        assert refused == []
    with refusing() as refused:
        with allowing():
            assert lookup() is None
        with pytest.raises(CacheMissError):
            lookup()
    assert lookup() is None


def test_engines_that_end_in_any_order() -> None:
    first, second = refusing(), refusing()
    first.__enter__()
    refused = second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(CacheMissError):
        lookup()
    assert refused == [NAME]
    second.__exit__(None, None, None)
    assert lookup() is None


def test_a_group_that_lacks_its_kernel_is_a_miss() -> None:
    manager = triton.runtime.cache.get_cache_manager("ab" * 32)
    manager.put_group(f"{NAME}.json", {f"{NAME}.json": manager.put("{}", f"{NAME}.json", binary=False)})
    with refusing():
        assert set(lookup()) == {f"{NAME}.json"}
        path = Path(manager.get_file(f"__grp__{NAME}.json"))
        path.write_text(json.dumps({"child_paths": {f"{NAME}.json": "/gone"}}))
        with pytest.raises(CacheMissError):
            lookup()


def test_a_users_own_class_stays_in_use() -> None:
    seen = []

    class Own(triton.runtime.cache.FileCacheManager):
        def get_group(self, filename: str) -> Any:
            seen.append(filename)
            return super().get_group(filename)

    triton.knobs.cache.manager_class = Own
    try:
        with refusing(), pytest.raises(CacheMissError):
            lookup()
        assert seen == [f"{NAME}.json"]
        assert triton.knobs.cache.manager_class is Own
    finally:
        del triton.knobs.cache.manager_class


def test_without_triton_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    with refusing() as refused:
        assert refused == []


def test_a_cache_that_was_found_refuses_until_it_is_closed(tmp_path: Path, llama_path: Path) -> None:
    cache = opened(tmp_path / "store", llama_path)
    (cache.entry.inductor / "code").write_bytes(b"x")
    cache.end_start()
    cache.refuse_kernels()  # this one may compile
    with refusing():
        assert lookup() is None
    cache.close()
    cache = opened(tmp_path / "store", llama_path, offline_compile=True)
    cache.refuse_kernels()
    with cache.unless_refused():
        lookup()
    assert f"does not hold the Triton kernel {NAME}" in cache.notes[-1]
    with pytest.raises(CacheMissError):
        lookup()
    with pytest.raises(CacheMissError, match=f"Triton kernels {NAME} as this engine calls them"):
        cache.end_start()
    cache.close()
    cache.close()
    assert lookup() is None
