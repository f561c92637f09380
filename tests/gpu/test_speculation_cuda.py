"""Drafts on a GPU: the kernels against the CPU, and in float32 the tokens of plain steps, recorded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from hybridgen import Completion, Engine, SamplingParams
from hybridgen.execution.runner import ModelRunner
from hybridgen.kernels.step.drafts import accept_drafts, feed_drafts, keep_drafts
from hybridgen.kernels.step.ngrams import draft_ngrams
from hybridgen.speculation.oracle import OracleDrafter

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "kernels"), str(TESTS / "speculation")]
import mtp_heads  # noqa: E402
from draft_cases import KINDS, PROMPTS, RIGHT, check_counts, check_equal, each, sequences  # noqa: E402
from draft_step_cases import VOCAB, WIDTH, random_chosen, random_made, random_tables  # noqa: E402
from eagle_heads import COUNT, counting_head, counting_model, random_head, write_specforge  # noqa: E402
from ngram_cases import random_case  # noqa: E402

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, Any] = {
    "max_batch": 8, "page_size": 16, "token_budget": 64, "kv_memory": "64MiB", "max_context": 192,
    "decode_buckets": [1, 8], "prefill_buckets": [64], "max_padding_ratio": 64, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with drafts are wanted and recorded, and what they take is not known.

    Beside so small a model a drafter's passes take as long as some plain steps: by measured times drafting pauses from
    the first step on, or does not, as the device is busy.
    """
    real = ModelRunner.decode_seconds
    monkeypatch.setattr(ModelRunner, "decode_seconds", lambda *args, **how: real(*args, **how) and None)


@pytest.mark.parametrize("seed", range(20))
def test_ngrams(seed: int) -> None:
    text, slots, lengths, *sizes = random_case(seed)
    found = draft_ngrams(text.cuda(), slots.cuda(), lengths.cuda(), *sizes)
    assert torch.equal(found.cpu(), draft_ngrams(text, slots, lengths, *sizes))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_fed_accepted_and_kept(seed: int) -> None:
    table, drafts, rows = random_tables(seed)
    for count in (1, 4, WIDTH + 1):
        chosen, (made, room) = random_chosen(seed, drafts, rows, count), random_made(seed, rows)
        kept = drafts.clone()
        theirs = [*feed_drafts(table, drafts, rows, count), *accept_drafts(chosen, drafts, rows)]
        theirs += [keep_drafts(made, kept, rows, room, VOCAB, count - 1), kept]
        table_, drafts_, rows_, chosen_, made_, room_ = (x.cuda() for x in (table, drafts, rows, chosen, made, room))
        ours = [*feed_drafts(table_, drafts_, rows_, count), *accept_drafts(chosen_, drafts_, rows_)]
        ours += [keep_drafts(made_, drafts_, rows_, room_, VOCAB, count - 1), drafts_]
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("drafter", ["oracle", "model"])
@pytest.mark.parametrize("mode", ["graph", "hybrid"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "gpt2"])
@pytest.mark.usefixtures("unmeasured")
def test_the_tokens_of_plain_steps(family: str, mode: str, drafter: str, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    path = families.write(family, tmp_path)
    params = each(8, 40)
    with Engine.load(path, mode=mode, device="cuda", **SETTINGS) as engine:
        expected = engine.generate(PROMPTS[:8], params)
        alone = engine.generate(PROMPTS[0], params[0])
    drafts: dict[str, Any] = {"drafter": path}
    if drafter == "oracle":
        drafts = {"speculation": OracleDrafter(sequences(expected), RIGHT[:8])}
    with Engine.load(path, mode=mode, device="cuda", validate=True, **drafts, **SETTINGS) as engine:
        for _ in range(3):  # graphs of other samplers come between calls
            found = engine.generate(PROMPTS[:8], params)
            check_equal(found, expected)
            check_counts(found)
            check_equal([engine.generate(PROMPTS[0], params[0])], [alone])
        stats = engine.stats()
    assert stats.speculation.accepted > 0
    if family == "qwen3_moe":
        # In float32 transformers' product of experts, which prefill keeps, copies from the host: none is captured.
        assert all("capture" in each for each in stats.fallbacks)
        return
    assert not stats.fallbacks
    steps = [(kind, reason) for (phase, kind, reason) in stats.steps if phase == "decode"]
    assert any(kind == "layers, cuda graph" and "drafts a row" in reason for kind, reason in steps), steps


FUSED: dict[str, Any] = {"vocab_size": 258, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
"""A size that the fused kernels serve."""


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.usefixtures("unmeasured")
def test_equal_bits_in_bfloat16(rows: int, temperature: float, tmp_path: Path) -> None:
    """Drafts change no bit where one kernel decodes: right ones, wrong ones, and none."""
    path = families.write("llama", tmp_path, **FUSED)
    settings = SETTINGS | {"dtype": "bfloat16", "decode_buckets": None, "equal_bits": True, "max_padding_ratio": None}
    params = [SamplingParams(max_new_tokens=40, temperature=temperature, seed=5, ignore_eos=True, logprobs=2)] * rows
    with Engine.load(path, mode="hybrid", device="cuda", **settings) as engine:
        expected = engine.generate(PROMPTS[:rows], params)
        assert "one persistent kernel for several rows" in engine.stats().fused["decode of 1 to 8 rows"]
    drafts = OracleDrafter(sequences(expected), RIGHT[:rows])
    with Engine.load(path, mode="hybrid", device="cuda", speculation=drafts, **settings) as engine:
        for _ in range(3):
            found = engine.generate(PROMPTS[:rows], params)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.token_ids == theirs.token_ids
                assert ours.logprobs == theirs.logprobs
        stats = engine.stats()
    assert (stats.speculation.accepted > 0) == (rows < 8)  # at 8 rows there is no room for drafts
    assert all(kind.startswith("rows") for (phase, kind, _) in stats.steps if phase == "decode")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "granite"])
@pytest.mark.usefixtures("unmeasured")
def test_equal_bits_of_other_families(family: str, tmp_path: Path) -> None:
    """Windows, biases, norms of heads, factors; requests of every kind, two at a time, that accept differently."""
    window = {"sliding_window": 24} if family == "mistral" else {}
    path = families.write(family, tmp_path, **FUSED, **window, head_dim=64)
    settings = SETTINGS | {"dtype": "bfloat16", "decode_buckets": None, "equal_bits": True, "max_padding_ratio": None}
    settings["prefix_cache"] = False  # prompts that are found there are read in other pieces, with other bits
    kinds = [kind | {"logprobs": 2} for kind in KINDS]
    params = each(10, 40, kinds)

    def run(engine: Engine) -> list[Completion]:
        return [out for at in range(0, 10, 2) for out in engine.generate(PROMPTS[at : at + 2], params[at : at + 2])]

    with Engine.load(path, mode="hybrid", device="cuda", **settings) as engine:
        expected = run(engine)
    drafts = OracleDrafter(sequences(expected), RIGHT[:10])
    with Engine.load(path, mode="hybrid", device="cuda", speculation=drafts, **settings) as engine:
        for _ in range(2):
            for ours, theirs in zip(run(engine), expected, strict=True):
                assert ours.token_ids == theirs.token_ids
                assert ours.logprobs == theirs.logprobs
        stats = engine.stats()
    assert stats.speculation.accepted > 0
    assert all(kind.startswith("rows") for (phase, kind, _) in stats.steps if phase == "decode")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_equal_bits_beside_a_head(rows: int, temperature: float, tmp_path: Path) -> None:
    """Its passes are other kernels, which make drafts and no token."""
    path = families.write("llama", tmp_path / "model", **FUSED)
    tensors = random_head(vocab=FUSED["vocab_size"], hidden=FUSED["hidden_size"], inside=FUSED["intermediate_size"])
    layers = {"eagle_aux_hidden_state_layer_ids": [-1, 0, 1]}  # by their outputs: the inputs of all three
    head = write_specforge(tmp_path / "head", tensors, eagle_config=layers)
    settings = SETTINGS | {"dtype": "bfloat16", "decode_buckets": None, "equal_bits": True, "max_padding_ratio": None}
    params = [SamplingParams(max_new_tokens=40, temperature=temperature, seed=5, ignore_eos=True, logprobs=2)] * rows
    with Engine.load(path, mode="hybrid", device="cuda", **settings) as engine:
        expected = engine.generate(PROMPTS[:rows], params)
    with Engine.load(path, mode="hybrid", device="cuda", drafter=head, **settings) as engine:
        for _ in range(3):
            found = engine.generate(PROMPTS[:rows], params)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.token_ids == theirs.token_ids
                assert ours.logprobs == theirs.logprobs
        stats = engine.stats()
    assert stats.fused["passes of the drafting head"] == "a chain of Triton kernels"
    assert all(kind.startswith("rows") for (phase, kind, _) in stats.steps if phase == "decode")
    assert not stats.fallbacks


@pytest.mark.parametrize("kind", ["dense", "fp8"])
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_the_passes_of_a_head(rows: int, kind: str) -> None:
    """The chain's logits and pages, beside those of PyTorch's operators in bfloat16."""
    from head_chain_checks import CONTEXT, MOST, drafter_of, fuse_head, logits_by, random_call, random_head

    sizes = {"hidden": 512, "heads": 8, "kv_heads": 2, "head_dim": 64, "intermediate": 768, "model_hidden": 256}
    make = torch.Generator().manual_seed(rows)
    head = random_head(make, torch.bfloat16, fp8=kind == "fp8", device="cuda", vocab=3000, draft_vocab=2000, **sizes)
    with torch.inference_mode():
        drafter = drafter_of(head, rows + 2, make)
        fuse_head(drafter, CONTEXT, rows=rows, most=MOST)
        for fed in (1, 4):
            call = random_call(make, drafter, rows, fed, greedy=True)
            call = call._replace(room=torch.full_like(call.room, MOST + 1))
            before = [part.clone() for part in drafter.pages]
            expected = logits_by(drafter, None, call)
            written = [part.clone() for part in drafter.pages]
            for part, old in zip(drafter.pages, before, strict=True):
                part.copy_(old)
            found = logits_by(drafter, drafter._chain, call)
            real = call.slots < drafter.padding_slot
            assert (found - expected)[:, real].norm() <= 3e-2 * expected[:, real].norm()
            for ours, theirs in zip(drafter.pages, written, strict=True):
                assert (ours[1:] - theirs[1:]).float().norm() <= 3e-2 * theirs[1:].float().norm()
            made = drafter.draft(call).clone()
            assert torch.equal(made, drafter.draft(call))
            assert made.min() >= 0
            assert made.max() < 3000


@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.usefixtures("unmeasured")
def test_a_head_by_the_chain(quantize: str | None, tmp_path: Path) -> None:
    """Recorded with the step, for rows of every kind; its drafts are right as they are by PyTorch's operators."""
    path, head = counting_model(tmp_path / "model"), write_specforge(tmp_path / "head", counting_head())
    prompts = [[token % COUNT for token in prompt] for prompt in PROMPTS[:8]]
    params = each(8, 40, [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20}])
    settings = SETTINGS | {"dtype": "bfloat16"}
    with Engine.load(path, mode="hybrid", device="cuda", **settings) as engine:
        expected = engine.generate(prompts, params)
    more = {"drafter": head, "quantize_drafter": quantize, "validate": True}
    with Engine.load(path, mode="hybrid", device="cuda", **more, **settings) as engine:
        for _ in range(3):
            found = engine.generate(prompts, params)
            check_equal(found, expected)
            check_counts(found)
            check_equal([engine.generate(prompts[0], params[0])], expected[:1])
        stats = engine.stats()
    assert stats.fused["passes of the drafting head"] == "a chain of Triton kernels"
    assert stats.speculation.accepted > 20
    assert not stats.fallbacks


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
@pytest.mark.usefixtures("unmeasured")
def test_a_head_that_a_checkpoint_carries(family: str, mode: str, tmp_path: Path) -> None:
    """For multi-token prediction: its passes, with experts and latents, are recorded with the step."""
    torch.backends.cuda.matmul.allow_tf32 = False
    path = mtp_heads.write(tmp_path, family)
    params = each(8, 24)
    with Engine.load(path, mode=mode, device="cuda", **SETTINGS) as engine:
        expected = engine.generate(PROMPTS[:8], params)
    with Engine.load(path, mode=mode, device="cuda", validate=True, drafter="mtp", **SETTINGS) as engine:
        for _ in range(3):
            found = engine.generate(PROMPTS[:8], params)
            check_equal(found, expected)
            check_counts(found)
        stats = engine.stats()
    assert stats.speculation.drafter == "mtp"
    assert stats.speculation.drafted > 0
    # In float32 transformers' product of experts, which prefill keeps, copies from the host: none is captured.
    assert all("capture" in each for each in stats.fallbacks)


def test_ngrams_in_the_demo_model() -> None:
    prompt = "def add(a, b):\n    return a + b\n\n\n" * 4
    options: dict[str, Any] = {"device": "cuda", "dtype": "float32", "max_batch": 2, "decode_buckets": [1]}
    sampling: dict[str, Any] = {"max_new_tokens": 120, "temperature": 0.0, "repetition_penalty": 1.0}
    torch.backends.cuda.matmul.allow_tf32 = False
    with Engine.load(None, **options) as engine:
        expected = engine.generate(prompt, **sampling)
    with Engine.load(None, speculation="ngram", **options) as engine:
        found = engine.generate(prompt, **sampling)
        assert engine.stats().speculation.tokens_per_step > 1.5
    check_equal([found], [expected])


@pytest.mark.parametrize("mode", ["eager", "graph", "hybrid"])
@pytest.mark.usefixtures("unmeasured")
def test_a_head_that_is_right(mode: str, tmp_path: Path) -> None:
    """Hidden states of recorded and compiled steps; its draws are those of the requests."""
    torch.backends.cuda.matmul.allow_tf32 = False
    path, head = counting_model(tmp_path / "model"), write_specforge(tmp_path / "head", counting_head())
    prompts = [[token % COUNT for token in prompt] for prompt in PROMPTS[:8]]
    params = each(8, 40, [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20}])
    with Engine.load(path, mode=mode, device="cuda", **SETTINGS) as engine:
        expected = engine.generate(prompts, params)
    with Engine.load(path, mode=mode, device="cuda", validate=True, drafter=head, **SETTINGS) as engine:
        for _ in range(3):
            found = engine.generate(prompts, params)
            check_equal(found, expected)
            check_counts(found)
            alone = engine.generate(prompts[0], params[0])
            check_equal([alone], expected[:1])
        stats = engine.stats()
    assert stats.speculation.drafted > 0
    assert mode != "eager" or alone.accepted_tokens > 20
    assert not stats.fallbacks
