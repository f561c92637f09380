"""What a training loop asks of an engine: weights that changed, and the cache's memory between its phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest

import hybridgen
from hybridgen import Engine

SETTINGS: dict[str, Any] = {
    "max_batch": 2,
    "max_context": 64,
    "page_size": 8,
    "kv_memory": "4MiB",
    "device": "cpu",
    "progress": False,
    "decode_buckets": [1, 2],
    "prefill_buckets": [16],
}
MODES: list[dict[str, Any]] = [
    {"mode": "eager"},
    {"mode": "jit", "compile_backend": "eager"},
    {"mode": "graph", "run_ahead": 1, "check_addresses": True},
    {"mode": "hybrid", "compile_backend": "eager"},
]
[PROMPT] = families.prompts_of((20,))


def tokens(engine: Engine) -> tuple[int, ...]:
    return tuple(engine.generate(PROMPT, max_new_tokens=8, ignore_eos=True).token_ids)


def cache_bytes(engine: Engine) -> int:
    states = engine._runner.states
    return sum(tensor.untyped_storage().nbytes() for state in states for tensor in state.tensors().values())


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["mode"])
def test_the_cache_s_memory_comes_and_goes(mode: dict[str, Any], live: bool, tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    model: Any = families.build("llama", num_hidden_layers=2) if live else path
    with Engine.load(model, **mode, **SETTINGS) as engine:
        expected, full = tokens(engine), cache_bytes(engine)
        assert full > 0
        engine.resume()  # nothing was released
        for _ in range(3):
            engine.release_cache()
            engine.release_cache()
            assert cache_bytes(engine) == 0
            with pytest.raises(hybridgen.EngineError, match="the KV cache is released; call resume"):
                engine.generate(PROMPT)
            ballast = [bytearray(2**22) for _ in range(4)]  # so that the memory lies elsewhere afterwards
            engine.resume()
            del ballast
            assert cache_bytes(engine) == full
            assert tokens(engine) == expected
            assert engine.generate(PROMPT, max_new_tokens=1).cached_tokens in (0, 16)
        stats = engine.stats()
        assert (stats.free_pages, stats.running) == (stats.pages, 0)
        assert all("the pages of the KV cache lie elsewhere" in reason for reason in stats.fallbacks)


def test_it_is_not_taken_from_requests(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        stream = engine.stream(PROMPT, max_new_tokens=8, ignore_eos=True)
        next(stream)
        with pytest.raises(hybridgen.EngineError, match="requests wait or run"):
            engine.release_cache()
        assert len(list(stream)) == 7
        engine.release_cache()
    with pytest.raises(hybridgen.EngineError, match="closed"):
        engine.release_cache()


def test_changed_weights_forget_what_was_cached_and_are_counted(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    with Engine.load(path, mode="graph", **SETTINGS) as engine:
        assert engine.generate(PROMPT, max_new_tokens=1).weights_version == 0
        assert engine.generate(PROMPT, max_new_tokens=1).cached_tokens == 16
        captured = len(engine.stats().graphs.graphs)
        engine.weights_changed()
        out = engine.generate(PROMPT, max_new_tokens=1)
        assert (out.weights_version, out.cached_tokens) == (1, 0)
        assert len(engine.stats().graphs.graphs) == captured
