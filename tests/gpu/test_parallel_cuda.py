"""Two GPUs with a part of a model each, whose decode steps are fused: the sums of the ranks meet inside kernels."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from hybridgen import Engine, EngineError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

# What both persistent kernels take, cut in two.
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "num_hidden_layers": 3,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "initializer_range": 0.03,
}
FIELDS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_context": 512,
    "kv_memory": "256MiB",
    "compile_cache": False,
    "prefix_cache": False,  # a cached beginning is computed with other bits
}
PROMPTS = families.prompts_of((5, 130, 33, 1, 64, 7, 300, 20))


def ran(engine: Engine) -> set[str]:
    return {kind for phase, kind, _ in engine.stats().steps if phase == "decode"}


def check_logprobs(path: Path, done: list[Any]) -> None:
    """What the ranks' tokens were worth to them is what one GPU says of them."""
    with Engine.load(path, device="cuda:0", mode="eager", max_batch=4, **FIELDS) as engine:
        for each, prompt in zip(done, PROMPTS, strict=False):
            tokens = list(each.token_ids)
            expected = torch.tensor(engine.score(prompt + tokens).logprobs[-len(tokens) :])
            found = torch.tensor([entry.logprob for entry in each.logprobs])
            assert float((found - expected).abs().mean()) < 0.06, each


def test_persistent_kernels_wait_for_the_words_of_other_ranks(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, **SHAPE)
    buckets = {"decode_buckets": [1, 2, 8], "prefill_buckets": []}
    with Engine.load(path, mode="hybrid", tensor_parallel=2, max_batch=8, **buckets, **FIELDS) as engine:
        notes = dict(engine.stats().fused)
        assert notes["decode of 1 row"] == "one persistent kernel", notes
        assert any("several rows" in how for how in notes.values()), notes
        one = engine.generate(PROMPTS[:1], max_new_tokens=40, ignore_eos=True, logprobs=0)
        assert any(kind.startswith("persistent") for kind in ran(engine)), engine.stats().steps
        drawn = [engine.generate(PROMPTS, max_new_tokens=30, temperature=1.0, seed=3) for _ in range(2)]
        assert [each.token_ids for each in drawn[0]] == [each.token_ids for each in drawn[1]]
        eight = engine.generate(PROMPTS, max_new_tokens=40, ignore_eos=True, logprobs=0)
        runner: Any = engine._runner
        assert runner.ranks_agree()
        assert not engine.stats().fallbacks
    check_logprobs(path, one)
    check_logprobs(path, eight)


@pytest.mark.parametrize("rows", [None, (2, 8)], ids=["measured", "forced"])
def test_several_rows_by_one_kernel_or_what_is_faster(
    rows: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridgen.engine.warm_start import Starter

    if rows is not None:
        monkeypatch.setattr(Starter, "choose_decode", lambda *arguments, **keywords: None)
    path = families.write("llama", tmp_path, **SHAPE)
    with Engine.load(path, mode="hybrid", tensor_parallel=2, max_batch=8, decode_buckets=[8], **FIELDS) as engine:
        done = engine.generate(PROMPTS, max_new_tokens=40, ignore_eos=True, logprobs=0)
        if rows is not None:
            assert any(kind.startswith("rows") for kind in ran(engine)), engine.stats().steps
    check_logprobs(path, done)


def test_the_chain_adds_up_over_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridgen.engine.warm_start import Starter

    monkeypatch.setattr(Starter, "choose_decode", lambda *arguments, **keywords: None)
    path = families.write(
        "llama", tmp_path, initializer_range=0.1
    )  # its heads are too small for the persistent kernels
    with Engine.load(path, mode="hybrid", tensor_parallel=2, max_batch=8, decode_buckets=[1, 8], **FIELDS) as engine:
        done = engine.generate(PROMPTS, max_new_tokens=20, ignore_eos=True, logprobs=0)
        assert any(kind.startswith("chain") for kind in ran(engine)), engine.stats().fused
    check_logprobs(path, done)


def test_drafts_are_checked_by_the_kernel_for_several_columns(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, **SHAPE)
    prompts = [prompt * 3 for prompt in PROMPTS[:2]]  # what repeats is drafted
    fields = {**FIELDS, "max_batch": 2, "decode_buckets": [1, 2]}
    with Engine.load(path, mode="hybrid", tensor_parallel=2, speculation="ngram", **fields) as engine:
        done = engine.generate(prompts, max_new_tokens=60, ignore_eos=True)
        runner: Any = engine._runner
        assert runner.ranks_agree()
        assert any(kind.startswith("rows") for kind in ran(engine)), engine.stats().steps
    assert [len(each.token_ids) for each in done] == [60, 60]


def test_a_rank_that_dies_in_a_persistent_step_ends_the_group(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, **SHAPE)
    fields = {**FIELDS, "max_context": 8192}
    with Engine.load(path, mode="hybrid", tensor_parallel=2, max_batch=1, decode_buckets=[1], **fields) as engine:
        engine.generate(PROMPTS[0], max_new_tokens=4)
        lead: Any = engine._runner
        (pid,) = lead._lead.ranks.pids
        start = time.monotonic()
        with pytest.raises(EngineError):
            for number, _ in enumerate(engine.stream(PROMPTS[0], max_new_tokens=8000, ignore_eos=True)):
                if number == 20:
                    os.kill(pid, signal.SIGKILL)
        assert time.monotonic() - start < 60
