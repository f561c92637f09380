"""A live model is trained while an engine generates with it: as if there were none, and each call sees the step."""

from __future__ import annotations

import warnings
from typing import Any

import families
import pytest
import torch

from hybridgen.engine import Engine

PROMPTS = families.prompts_of((7, 7))
NEW = 3
STEPS = 20


def build(family: str) -> Any:
    changes: dict[str, Any] = {"num_hidden_layers": 2}
    if family == "qwen3_moe":
        changes["output_router_logits"] = True
    return families.build(family, **changes).train()


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train_once(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """One step away from what was generated; its loss and gradients."""
    loss = model(input_ids=ids, labels=(ids + 1) % families.VOCAB).loss
    optimizer.zero_grad()
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    return loss.item(), gradients


def generated(model: Any) -> list[list[int]]:
    """What transformers generates, greedily, in evaluation mode."""
    model.eval()
    ids = model.generate(torch.tensor(PROMPTS), max_new_tokens=NEW, do_sample=False)
    model.train()
    return ids[:, len(PROMPTS[0]) :].tolist()


@pytest.fixture(scope="module")
def alone() -> Any:
    """By family: tokens, loss and gradients of each step of the loop without an engine."""
    known: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in known:
            model = build(family)
            optimizer, steps = optimizer_of(model), []
            for _ in range(STEPS):
                tokens = generated(model)
                ids = torch.tensor([p + t for p, t in zip(PROMPTS, tokens, strict=True)])
                steps.append((tokens, *train_once(model, optimizer, ids)))
            known[family] = steps
        return known[family]

    return get


@pytest.mark.parametrize("mode", ["eager", "jit", "graph", "hybrid"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_training_loop_is_the_same_with_an_engine(family: str, mode: str, alone: Any) -> None:
    expected = alone(family)
    assert len({str(tokens) for tokens, _, _ in expected}) > 3  # training changes what is generated
    model = build(family)
    optimizer = optimizer_of(model)
    settings: dict[str, Any] = {"max_batch": 2, "max_context": 32, "kv_memory": "4MiB", "token_budget": 32}
    settings["compile_backend"] = "aot_eager" if family == "llama" else "eager"
    with (
        warnings.catch_warnings(),
        Engine.load(model, mode=mode, device="cpu", **settings) as engine,
    ):
        warnings.simplefilter("error")
        for tokens, loss, gradients in expected:
            outs = engine.generate(PROMPTS, max_new_tokens=NEW, temperature=0, ignore_eos=True)
            assert [list(out.token_ids) for out in outs] == tokens
            ids = torch.tensor([p + list(out.token_ids) for p, out in zip(PROMPTS, outs, strict=True)])
            assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
            found, ours = train_once(model, optimizer, ids)
            assert found == loss
            assert all(map(torch.equal, ours, gradients))
        stats = engine.stats()
    assert not stats.fallbacks
    assert stats.late_compiles == 0
    kinds = {kind for phase, kind, _ in stats.steps if phase == "decode"}
    assert kinds == {{"eager": "layers, eager", "jit": "layers, compiled"}.get(mode, "layers, stand-in")}
