"""Two processes with a model's parts: the tokens of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest

from hybridgen import Engine

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "max_context": 128,
    "kv_memory": "8MiB",
    "max_batch": 3,
    "token_budget": 32,
    "decode_buckets": [1, 3],
    "prefill_buckets": [16],
    "capture_after": 1,
}
PROMPTS = [[5, 6, 7, 8], [100] * 20 + list(range(30)), [3], [9, 8, 7]]
DRAWN = {"temperature": 0.8, "seed": 4, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2}


def compare(path: Path, mode: str, size: int, **fields: Any) -> None:
    """Greedy and drawn tokens, scores and hidden states of one process and of `size`."""
    with Engine.load(path, mode="graph" if mode == "hybrid" else "eager", **CONFIG) as engine:
        expected = outcome(engine)
    with Engine.load(path, mode=mode, tensor_parallel=size, **CONFIG, **fields) as engine:
        found = outcome(engine)
        stats = engine.stats()
        kinds = {kind for _, kind, _ in stats.steps}
        runner: Any = engine._runner
        assert runner.ranks_agree()
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=1e-3)
    assert (found[2] - expected[2]).abs().max() < 1e-3
    assert ("layers, stand-in" in kinds) == (mode in ("graph", "hybrid"))
    assert ("layers, compiled" in kinds) == (mode in ("jit", "hybrid"))
    assert stats.late_compiles == 0
    assert not stats.fallbacks


def outcome(engine: Engine) -> tuple[list[list[int]], list[float], Any]:
    done = engine.generate(PROMPTS, max_new_tokens=6) + engine.generate(PROMPTS, max_new_tokens=6, **DRAWN)
    done += engine.generate(PROMPTS[:2], max_new_tokens=4)  # what is cached, and other sizes of batch
    scores = engine.score(PROMPTS[1]).logprobs
    return [list(each.token_ids) for each in done], list(scores), engine.hidden_states(PROMPTS[0])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral"])
def test_tokens_are_those_of_one_process(family: str, tmp_path: Path) -> None:
    families.build(family, num_hidden_layers=2, **_types(family, 2)).save_pretrained(tmp_path)
    compare(tmp_path, "graph", 2)


@pytest.mark.parametrize("mode", [pytest.param("jit", marks=pytest.mark.slow), "hybrid"])
def test_layers_are_compiled_on_all_ranks(mode: str, tmp_path: Path) -> None:
    families.build("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    compare(tmp_path, mode, 2, compile_backend="eager", compile_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_layers_are_compiled_by_inductor(family: str, tmp_path: Path) -> None:
    families.build(family, num_hidden_layers=2, **_types(family, 2)).save_pretrained(tmp_path)
    compare(tmp_path, "hybrid", 2, compile_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral"])
def test_tokens_are_those_of_one_process_in_mode_eager(family: str, tmp_path: Path) -> None:
    families.build(family).save_pretrained(tmp_path)
    compare(tmp_path, "eager", 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "granite", "qwen3_moe"])
def test_other_families(family: str, tmp_path: Path) -> None:
    families.build(family).save_pretrained(tmp_path)
    compare(tmp_path, "graph", 2)


@pytest.mark.slow
def test_key_heads_are_on_several_ranks_where_there_are_few(tmp_path: Path) -> None:
    families.build("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    compare(tmp_path, "eager", 4)


def test_a_tied_head_in_bfloat16_of_several_files(tmp_path: Path) -> None:
    import torch

    model = families.build("qwen2", num_hidden_layers=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    compare(tmp_path, "eager", 2)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with Engine.load(tmp_path, tensor_parallel=2, dtype="bfloat16", **CONFIG) as engine:
        assert engine.stats().dtype == "bfloat16"
        assert len(engine.generate(PROMPTS[0], max_new_tokens=4).token_ids) == 4
        assert not torch.distributed.is_initialized()  # the default group is the caller's


def _types(family: str, layers: int) -> dict[str, Any]:
    known = families.FAMILIES[family].get("layer_types")
    return {} if known is None else {"layer_types": known[:layers]}
