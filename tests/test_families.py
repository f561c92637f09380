"""Every family, token for token against Hugging Face `generate`, from checkpoints on disk."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

import hybridgen
from hybridgen.output import Response
from hybridgen.requests import plan_requests

NEW_TOKENS = 40
# Across page borders (16), chunk borders (96), and what a window or a rotary scaling may do with length.
LENGTHS = (7, 300, 1, 33, 64, 65, 130, 2)
INDUCTOR = ("llama", "gemma3_text", "gpt2", "qwen3_moe")
SETTINGS = {"max_batch": 8, "page_size": 16, "token_budget": 96, "kv_memory": "16MiB", "max_context": 352}


@pytest.fixture(scope="module", params=sorted(families.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write(family, tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def expected(family: str) -> list[tuple[list[int], torch.Tensor]]:
    model = families.build(family)
    return [families.reference(model, prompt, NEW_TOKENS) for prompt in families.prompts_of(LENGTHS)]


def check_engine(engine: hybridgen.Engine, expected: list[tuple[list[int], torch.Tensor]]) -> None:
    """Batches of 8, 3 and 1, and requests that join late, all give Hugging Face's tokens."""
    prompts = families.prompts_of(LENGTHS)
    for batch in (range(8), range(3), range(1, 2)):
        outs = engine.generate([prompts[i] for i in batch], max_new_tokens=NEW_TOKENS, logprobs=0)
        for i, out in zip(batch, outs, strict=True):
            tokens, logits = expected[i]
            assert list(out.token_ids) == tokens, f"prompt of {LENGTHS[i]} tokens in a batch of {len(batch)}"
            wanted = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            actual = torch.tensor([entry.logprob for entry in out.logprobs])
            assert (actual - wanted).abs().max() < 1e-4
    assert join_late(engine, prompts) == [tokens for tokens, _ in expected]


def join_late(engine: hybridgen.Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Run the prompts with half of them submitted while the others decode."""
    plans = plan_requests(
        prompts, None, {"max_new_tokens": NEW_TOKENS}, engine.checkpoint, engine.max_context, engine.cache_tokens
    )
    loop = engine._open_loop()
    responses: list[Response] = []
    loop.submit(plans[:4], responses)
    for _ in range(11):
        loop.step()
    loop.submit(plans[4:], responses)
    while any(response.completion is None for response in responses):
        loop.step()
    return [list(response.completion.token_ids) for response in responses]


def test_eager(checkpoint: Path, expected: list) -> None:
    with hybridgen.Engine.load(checkpoint, mode="eager", **SETTINGS) as engine:
        check_engine(engine, expected)
        assert engine.stats().free_pages == engine.stats().pages


def test_jit(family: str, checkpoint: Path, expected: list, pytestconfig: pytest.Config) -> None:
    everywhere = pytestconfig.getoption("--all-inductor")
    backend = "inductor" if everywhere or family in INDUCTOR else "aot_eager"
    with hybridgen.Engine.load(checkpoint, mode="jit", compile_backend=backend, run_ahead=1, **SETTINGS) as engine:
        stats = engine.stats()
        assert not stats.fallbacks
        # Prefill, decode of one row and of several: one graph each, whatever the number of layers of a kind.
        assert stats.compiled == 3 * families.layer_kinds(family)
        with torch.compiler.set_stance("fail_on_recompile"):
            check_engine(engine, expected)
        assert engine.stats().late_compiles == 0


@pytest.mark.parametrize("variant", sorted(families.ROPE_VARIANTS))
@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_rope_scaling(variant: str, mode: str, tmp_path: Path) -> None:
    """Prompts below, at and above the length where the scaling changes, together in one batch.

    The prompts of 64 and 65 tokens cross longrope's 80 while they decode.
    """
    name, changes = families.ROPE_VARIANTS[variant]
    path = families.write(name, tmp_path, **changes)
    prompts = families.prompts_of(LENGTHS)
    # A fresh model for each prompt, because Hugging Face's dynamic scaling remembers the longest one.
    expected = [families.reference(families.build(name, **changes), prompt, NEW_TOKENS)[0] for prompt in prompts]
    with hybridgen.Engine.load(path, mode=mode, compile_backend="aot_eager", run_ahead=1, **SETTINGS) as engine:
        outs = engine.generate(prompts, max_new_tokens=NEW_TOKENS)
        assert [list(out.token_ids) for out in outs] == expected
        assert not engine.stats().fallbacks
