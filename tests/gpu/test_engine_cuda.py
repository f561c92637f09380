"""The engine on a GPU: token for token against Hugging Face in float32, and its promises about compilation."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

import hybridgen

pytestmark = pytest.mark.gpu

LENGTHS = (7, 300, 1, 33, 64, 65, 130, 2)
NEW_TOKENS = 40
SETTINGS = {"max_batch": 8, "page_size": 16, "token_budget": 96, "kv_memory": "64MiB", "max_context": 352}


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


EXPERTS = ("qwen3_moe", "gpt_oss")
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "mistral", *EXPERTS)
# Experts in float32 wait for the device, so they cannot be recorded: see test_graphs_cuda.
CASES = [(name, mode) for name in FAMILIES for mode in ("eager", "jit", "graph", "hybrid")
         if mode in ("eager", "jit") or name not in EXPERTS]  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_families_match_huggingface(name: str, mode: str, tmp_path: Path) -> None:
    path = families.write(name, tmp_path)
    model = families.build(name).cuda()
    prompts = families.prompts_of(LENGTHS)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    with hybridgen.Engine.load(path, mode=mode, device="cuda", **SETTINGS) as engine:
        assert not engine.stats().fallbacks
        with torch.compiler.set_stance("fail_on_recompile" if mode in ("jit", "hybrid") else "default"):
            for _ in range(2):  # graphs that were missing are recorded at the end of the first call
                outs = engine.generate(prompts, max_new_tokens=NEW_TOKENS)
                assert [list(out.token_ids) for out in outs] == expected
            alone = engine.generate(prompts[1], max_new_tokens=NEW_TOKENS)
            assert list(alone.token_ids) == expected[1]
        assert engine.stats().late_compiles == 0
        assert engine.stats().free_pages == engine.stats().pages


def test_draws_do_not_depend_on_batch_mode_or_device(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path)
    prompts = families.prompts_of(LENGTHS)
    params = [
        hybridgen.SamplingParams(max_new_tokens=24, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, seed=100 + i)
        for i in range(len(prompts))
    ]
    found = {}
    for device, mode in (("cpu", "eager"), ("cuda", "eager"), ("cuda", "jit"), ("cuda", "graph"), ("cuda", "hybrid")):
        with hybridgen.Engine.load(path, mode=mode, device=device, **SETTINGS) as engine:
            found[device, mode] = [out.token_ids for out in engine.generate(prompts, params)]
            alone = [engine.generate(prompt, one).token_ids for prompt, one in zip(prompts, params, strict=True)]
            assert alone == found[device, mode]
    assert found["cuda", "eager"] == found["cpu", "eager"]
    for mode in ("jit", "graph", "hybrid"):
        assert found["cuda", mode] == found["cpu", "eager"]


def test_a_decode_step_waits_for_nothing(tmp_path: Path) -> None:
    """No call of a decode step may wait for the device: sampled, penalised, with log-probabilities."""
    path = families.write("llama", tmp_path)
    with hybridgen.Engine.load(path, mode="eager", device="cuda", **SETTINGS) as engine:
        engine.generate([[1, 2, 3]], max_new_tokens=3, temperature=0.8, seed=1, logprobs=3)
        runner, decode = engine._runner, engine._runner.decode

        def guarded(slots: tuple[int, ...]):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return decode(slots)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        runner.decode = guarded
        outs = engine.generate(
            families.prompts_of((5, 9)),
            max_new_tokens=6,
            temperature=0.8,
            top_k=20,
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.1,
            frequency_penalty=0.1,
            min_new_tokens=2,
            stop_token_ids=[5],
            ignore_eos=True,
            seed=1,
            logprobs=3,
        )
        assert all(out.error is None for out in outs)


def test_the_demo_model(tmp_path: Path) -> None:
    out = hybridgen.generate(None, "def fibonacci(n):", max_new_tokens=48, device="cuda")
    again = hybridgen.generate(None, "def fibonacci(n):", max_new_tokens=48, device="cuda", mode="eager")
    assert out.text
    assert out.token_ids[:8] == again.token_ids[:8]


def test_cache_too_large_for_the_device(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path)
    settings = SETTINGS | {"kv_memory": "9000GiB", "max_batch": 4096, "max_context": 512}
    with hybridgen.Engine.load(path, mode="eager", device="cuda", **settings) as engine:
        assert engine.stats().pages == 4096 * 32  # no more than the batch can use
    model = families.write("llama", tmp_path / "wide", num_key_value_heads=4, max_position_embeddings=2**22)
    settings |= {"max_context": 2**22, "max_batch": 512}  # its block table stays under its limit
    with pytest.raises(hybridgen.OutOfMemoryError, match="lower kv_memory"):
        hybridgen.Engine.load(model, mode="eager", device="cuda", **settings)
