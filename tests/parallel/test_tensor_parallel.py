"""Two processes with a model's parts: the tokens of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import multimodal
import pytest
import quantised_formats

from hybridgen import Engine, SamplingParams, UnsupportedModelError

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


REPEATS = [[5, 6, 7, 8] * 5, [9, 8, 7], [3, 4] * 8]


@pytest.mark.parametrize("mode", ["eager", pytest.param("graph", marks=pytest.mark.slow)])
def test_drafts_by_ngrams_change_no_token(mode: str, tmp_path: Path) -> None:
    families.build("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    wanted: list[dict[str, Any]] = [{"logit_bias": {7: 9.0}, "max_new_tokens": 24}, {"max_new_tokens": 12, **DRAWN}]
    with Engine.load(tmp_path, mode="eager", **CONFIG) as engine:
        expected = [[each.token_ids for each in engine.generate(REPEATS, **fields)] for fields in wanted]
    with Engine.load(tmp_path, tensor_parallel=2, mode=mode, speculation="ngram", **CONFIG) as engine:
        done = [engine.generate(REPEATS, **fields) for fields in wanted]
        runner: Any = engine._runner
        assert runner.ranks_agree()
    assert [[each.token_ids for each in some] for some in done] == expected
    if mode == "eager":  # by their times, recorded steps with drafts may not be worth it
        assert sum(each.accepted_tokens for each in done[0]) > 20


def test_rows_with_functions_get_the_tokens_that_rank_zero_chose(tmp_path: Path) -> None:
    families.build("llama", num_hidden_layers=2).save_pretrained(tmp_path)

    def next_one(ids: Any, scores: Any) -> Any:
        """Prefers what is one above the last token."""
        scores[(ids[-1] + 1) % len(scores)] += 4.0
        return scores

    def raises(ids: Any, scores: Any) -> Any:
        raise ValueError("of its own")

    plain: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.8, "repetition_penalty": 1.2}
    sampling = [SamplingParams(**plain, seed=seed, logits_processors=[next_one] * (seed % 2)) for seed in range(3)]

    def outcome(engine: Engine) -> list[list[int]]:
        done = engine.generate(PROMPTS[:3], sampling) + engine.generate(PROMPTS[:2], max_new_tokens=4)
        return [list(each.token_ids) for each in done]

    with Engine.load(tmp_path, mode="eager", **CONFIG) as engine:
        expected = outcome(engine)
    with Engine.load(tmp_path, mode="graph", tensor_parallel=2, **CONFIG) as engine:
        assert outcome(engine) == expected
        failed = engine.generate([PROMPTS[0]], SamplingParams(logits_processors=[raises]))[0]
        assert "of its own" in str(failed.error)
        assert outcome(engine) == expected
        runner: Any = engine._runner
        assert runner.ranks_agree()


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_keys_and_values_in_8_bits(count: int, tmp_path: Path) -> None:
    """With the scales of a checkpoint: of each key and value head, or one for all."""
    import torch
    from safetensors.torch import load_file, save_file

    families.build("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        for name, size in {"k_scale": 0.5, "v_scale": 0.25}.items():
            weights[f"model.layers.{layer}.self_attn.{name}"] = size * (1 + torch.arange(count))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = CONFIG | {"mode": "graph", "kv_dtype": "fp8"}
    found = []
    for size in (1, 2):
        with Engine.load(tmp_path, tensor_parallel=size, **config) as engine:
            assert "fp8" in engine.stats().kv_dtype
            found.append([each.token_ids for each in engine.generate(PROMPTS, max_new_tokens=6)])
    assert found[0] == found[1]


MADE = ("int8", "fp8", "int4")
STORED = (
    "awq",
    "gptq desc_act",
    "gptq v2 zeros",
    "ct w4 group",
    "ct int8 zeros",
    "ct fp8 tensor",
    "fp8 block",
    "bnb nf4",
)


@pytest.mark.parametrize(
    "name",
    ["int8", "awq", *(pytest.param(name, marks=pytest.mark.slow) for name in (*MADE[1:], *STORED[1:]))],
)
def test_quantised_weights_are_the_whole_ones_cut(name: str, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 2, "intermediate_size": 128}
    if name in MADE:
        families.build("llama", **changes, attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    else:
        quantised_formats.write_family(tmp_path, "llama", name, **changes)
    config = CONFIG | {"mode": "graph", "quantization": name if name in MADE else None}
    found: list[Any] = []
    for size in (1, 2):
        with Engine.load(tmp_path, tensor_parallel=size, **config) as engine:
            done = engine.generate(PROMPTS, max_new_tokens=6)
            found.append(([each.token_ids for each in done], engine.score(PROMPTS[1]).logprobs, engine.stats()))
    (tokens, scores, stats), (others, more, over_two) = found
    assert others == tokens
    assert more == pytest.approx(scores, abs=1e-3)
    assert over_two.fallbacks == stats.fallbacks
    assert {name: row.projections for name, row in over_two.weights.items()} == {
        name: row.projections for name, row in stats.weights.items()
    }


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        ("gemma3", None),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("llava", None), ("mistral3", None), ("llava", "int8"))
        ),
    ],
)
def test_the_text_part_of_a_multimodal_model(kind: str, quantization: str | None, tmp_path: Path) -> None:
    path = multimodal.write(kind, tmp_path)
    config = CONFIG | {"mode": "graph", "quantization": quantization}
    found: list[Any] = []
    for size in (1, 2):
        with Engine.load(path, tensor_parallel=size, **config) as engine:
            done = engine.generate(PROMPTS, max_new_tokens=6)
            found.append(([each.token_ids for each in done], engine.score(PROMPTS[1]).logprobs))
    (tokens, scores), (others, more) = found
    assert others == tokens
    assert more == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_quantised_head_is_the_whole_one_cut(tied: bool, tmp_path: Path) -> None:
    """Of a number of ids that two ranks do not have evenly."""
    changes = {"num_hidden_layers": 2, "vocab_size": 255, "tie_word_embeddings": tied}
    families.build("llama", **changes).save_pretrained(tmp_path)
    config = CONFIG | {"mode": "graph", "quantize_head": "int8"}
    found: list[Any] = []
    for size in (1, 2):
        with Engine.load(tmp_path, tensor_parallel=size, **config) as engine:
            done = engine.generate([prompt[:8] for prompt in PROMPTS], max_new_tokens=6)
            found.append(([each.token_ids for each in done], engine.score(PROMPTS[0]).logprobs, engine.stats()))
    (tokens, scores, stats), (others, more, over_two) = found
    assert others == tokens
    assert more == pytest.approx(scores, abs=1e-3)
    assert over_two.fallbacks == stats.fallbacks
    assert [row.projections for row in over_two.weights.values()] == [14, 1]


def test_groups_that_cannot_be_cut(tmp_path: Path) -> None:
    quantised_formats.write_family(tmp_path, "llama", "awq", num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match=r"down_proj cannot be cut: inputs .* do not begin and end with"):
        Engine.load(tmp_path, mode="eager", tensor_parallel=2, **CONFIG)


def test_grammars() -> None:
    pytest.importorskip("llguidance")
    wanted = SamplingParams(regex=r"[a-z]{3}=[0-9]{2};", max_new_tokens=24, temperature=1.0, seed=5)
    config = CONFIG | {"mode": "eager", "kv_memory": "32MiB"}
    with Engine.load(None, **config) as engine:
        expected = engine.generate(["x = ", "def f("], wanted)
    with Engine.load(None, tensor_parallel=2, **config) as engine:
        found = engine.generate(["x = ", "def f("], wanted)
    assert [each.text for each in found] == [each.text for each in expected]
    assert all(each.text.endswith(";") for each in found)


def _types(family: str, layers: int) -> dict[str, Any]:
    known = families.FAMILIES[family].get("layer_types")
    return {} if known is None else {"layer_types": known[:layers]}
