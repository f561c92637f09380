"""Steps whose products go through cublasLt on a GPU: logits as exact as by cuBLAS, and the process as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import families
import pytest
import torch

import hybridgen
from hybridgen.execution import executors, products

pytestmark = pytest.mark.gpu

ROWS = 64
LAYERS = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "initializer_range": 0.02}
"""Weights so small that bfloat16 alone is 0.01 off."""


@pytest.mark.parametrize("mode", ["eager", "jit", "graph", "hybrid"])
def test_tokens_are_as_likely(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextmanager
    def by_cublaslt() -> Iterator[None]:
        with products.by_cublaslt():
            entered.append(_library())
            yield

    monkeypatch.setattr(products, "choose", lambda *_: frozenset({ROWS}))
    monkeypatch.setattr(executors, "by_cublaslt", by_cublaslt)
    before = _library()
    model = families.build("llama", **LAYERS).to("cuda", torch.bfloat16)
    exact = copy.deepcopy(model).float()
    prompts = families.prompts_of((6,) * ROWS)
    buckets = {"decode_buckets": [8, ROWS]} if mode in ("graph", "hybrid") else {}
    with hybridgen.Engine.load(
        model, mode=mode, max_batch=ROWS, max_context=64, kv_memory="64MiB", **buckets
    ) as engine:
        outs = engine.generate(prompts, max_new_tokens=12, temperature=0, ignore_eos=True, logprobs=0)
        assert not engine.stats().fallbacks
    assert set(map(str, entered)) == {"_BlasBackend.Cublaslt"}
    assert _library() == before
    ids = torch.tensor([[*prompt, *out.token_ids] for prompt, out in zip(prompts, outs, strict=True)], device="cuda")
    with torch.no_grad():
        wanted = exact(ids).logits.log_softmax(-1)[:, 5:-1].gather(-1, ids[:, 6:, None])[..., 0].cpu()
    found = torch.tensor([[each.logprob for each in out.logprobs] for out in outs])
    assert (found - wanted).abs().max() < 0.05


def _library() -> object:
    return torch.backends.cuda.preferred_blas_library()
