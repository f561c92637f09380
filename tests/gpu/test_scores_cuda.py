"""Scores on a GPU: the kernel against its reference, and engines in every mode against transformers' forward."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

from hybridgen import Engine
from hybridgen.kernels.scoring.logprobs import token_logprobs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "k"), [(1, 5, 1), (64, 128256, 1), (700, 4097, 8), (3, 151936, 0)])
def test_the_kernel_is_its_reference(rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocab, generator=generator) * 8).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    ours, theirs = token_logprobs(logits.cuda(), targets.cuda(), k), token_logprobs(logits, targets, k)
    assert torch.allclose(ours[0].cpu(), theirs[0], atol=2e-5, rtol=1e-5)
    assert torch.equal(ours[1][:, 0].cpu(), theirs[1][:, 0])
    assert torch.allclose(ours[2].cpu(), theirs[2], atol=2e-5, rtol=1e-5)


def test_memory_does_not_grow_with_the_text() -> None:
    """A long prompt's logits would be gigabytes."""
    model = families.build("llama", vocab_size=128256, max_position_embeddings=20000, num_hidden_layers=2)
    with Engine.load(model.bfloat16().cuda(), mode="eager", kv_memory="256MiB", max_batch=2) as engine:
        [short, long] = families.prompts_of((2000, 16000))
        engine.score(short)
        peaks = []
        for prompt in (short, long):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            engine.score(prompt)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2 * peaks[0] + 2**26
    assert peaks[1] < 2**30


@pytest.mark.parametrize("mode", ["eager", "jit", "graph", "hybrid"])
def test_scores_are_those_of_a_forward_pass(mode: str, tmp_path: Path) -> None:
    path, model = families.write("llama", tmp_path), families.build("llama").cuda()
    prompts = families.prompts_of((70, 33, 9, 120))
    pairs = [(a, b) for a in prompts for b in prompts]
    with Engine.load(path, mode=mode, max_batch=4, page_size=16, token_budget=96, kv_memory="16MiB") as engine:
        for _ in range(2):
            scores = engine.score([a for a, _ in pairs], [b for _, b in pairs])
            for score, (prompt, completion) in zip(scores, pairs, strict=True):
                ids = torch.tensor([prompt + completion], device="cuda")
                with torch.inference_mode():
                    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                expected = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
                assert score.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert not engine.stats().fallbacks
