"""Every family, token for token against Hugging Face `generate`, from checkpoints on disk."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import families
import pytest
import shared_graphs
import torch

import hybridgen
from hybridgen import Mode
from hybridgen.engine.builder import Builder
from hybridgen.engine.preflight import resolve_config
from hybridgen.engine.requests import make_requests
from hybridgen.loading.support import STATES_BY_SLOT

NEW_TOKENS = 25
"""Across a page border (16) wherever a prompt ends, and from one token to behind Llama 4's first chunk (24)."""
# Across page borders, chunk borders (96), and what a window or a rotary scaling may do with length.
LENGTHS = (7, 300, 1, 33, 64, 65, 130, 2)
COMPILED = (
    "dbrx",
    "llama4_text",
    "mimo_v2_flash",
    "nanochat",
    "qwen3_5_text",
    "granitemoehybrid",
    "falcon_h1",
)
"""Of the families in one sweep."""
COMPILED_SELDOM = ("kimi_linear", "zamba2")
"""With `-m slow`: gated delta rules and Mamba 2 are compiled in others, too."""
INDUCTOR = ("llama", "gemma3_text", "gpt2", "qwen3_moe")
FUNCTIONALISED = (
    "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "glm", "glm4", "glm4_moe", "gpt_bigcode",
    "gpt_neox", "gpt_oss", "granite", "hunyuan_v1_dense", "ministral3", "mistral", "mixtral", "nemotron", "olmo2",
    "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
"""Compiled with `aot_eager`: what Inductor does before it generates code. The others are traced by Dynamo alone."""
STRUCTURES = {
    **dict.fromkeys(INDUCTOR, "inductor"),
    **dict.fromkeys(("gpt_oss", "phi3"), "aot_eager"),
    **dict.fromkeys(("cohere", "gpt_neox", "lfm2", "nemotron", "opt"), "eager"),
}
"""Compiled in the usual run, and by which backend: one family of each structure of a layer. The others are with
`-m slow`: what they generate in modes eager and graph is compared in every run, and their layers differ from one of
these in sizes, norms or factors. So is `aot_eager` of these, which does with their operators what it does with the
others'."""
ONE_KIND = ("gpt_oss",)
"""Compiled with layers of one kind, although they have two: `gemma3_text` shows what two are, and so do these with
`--all-inductor` and in `test_whole_matrix`."""
SETTINGS = {"max_batch": 8, "page_size": 16, "token_budget": 96, "kv_memory": "16MiB", "max_context": 352}
# Every batch and most prompts are padded, whatever the stand-in's times say.
GRAPHS: dict[str, Any] = {"decode_buckets": (2, 4, 8), "prefill_buckets": (16, 40, 96), "max_padding_ratio": 64}
ELSEWHERE = STATES_BY_SLOT - families.FAMILIES.keys()
"""Families whose long sweep is in `test_state_families`."""
WHOLE_TOKENS = 40
"""Of every batch in the long sweeps (`-m slow`)."""
FEW_LENGTHS = (7, 110, 1, 33)
FEW_TOKENS = 18
"""Across a page border wherever a prompt ends; for modes whose steps are those of another that generates all."""
FEWEST_TOKENS = 10
"""Across one behind prompts of 7, 64 and 300 tokens; for batches of rows that another batch generates all of."""


@pytest.fixture(scope="module", params=sorted(families.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write(family, tmp_path_factory.mktemp("families"), **families.depth(family))


@pytest.fixture(scope="module")
def expected(family: str) -> list[tuple[list[int], torch.Tensor]]:
    model = families.build(family, **families.depth(family))
    return families.references(model, families.prompts_of(LENGTHS), NEW_TOKENS)


def check_engine(
    engine: hybridgen.Engine,
    expected: list[tuple[list[int], torch.Tensor]],
    new_tokens: int = NEW_TOKENS,
    tolerance: float = 1e-4,
    few: int = FEWEST_TOKENS,
    prompts: list[list[int]] | None = None,
) -> None:
    """Batches of 8, 3 and 1, and requests that join late, all give Hugging Face's tokens.

    The batch of 8 gets all `new_tokens`; the others, whose rows and lengths are among its own, get few.
    """
    prompts = prompts or families.prompts_of(LENGTHS)
    few = min(new_tokens, few)
    for batch, count in ((range(8), new_tokens), (range(3), few), (range(1, 2), few)):
        outs = engine.generate([prompts[i] for i in batch], max_new_tokens=count, logprobs=0)
        for i, out in zip(batch, outs, strict=True):
            tokens, logits = expected[i][0][:count], expected[i][1][:count]
            assert list(out.token_ids) == tokens, f"prompt of {LENGTHS[i]} tokens in a batch of {len(batch)}"
            wanted = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            actual = torch.tensor([entry.logprob for entry in out.logprobs])
            assert (actual - wanted).abs().max() < tolerance
    assert join_late(engine, prompts, few) == [tokens[:few] for tokens, _ in expected]


def join_late(engine: hybridgen.Engine, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Run the prompts with half of them submitted while the others decode."""
    requests = make_requests(
        prompts, None, {"max_new_tokens": new_tokens}, engine.checkpoint, engine.max_context, engine.cache_tokens
    )
    loop = engine.open_loop()
    loop.submit(requests[:4])
    for _ in range(8):  # four of them for the prompt of 300 tokens
        loop.step()
    loop.submit(requests[4:])
    while any(request.completion is None for request in requests):
        loop.step()
    return [list(request.completion.token_ids) for request in requests]


def check_replays(engine: hybridgen.Engine) -> None:
    """Graphs ran the decode steps and padded prompts, and nothing went another way than asked for."""
    stats = engine.stats()
    assert not stats.fallbacks
    assert not stats.graphs.failures
    assert {kind for phase, kind, _ in stats.steps if phase == "decode"} >= {"layers, stand-in"}
    reasons = {reason.split(",")[0] for _, kind, reason in stats.steps if kind == "layers, stand-in"}
    assert {"padded to bucket 2", "padded to bucket 4", "bucket 8"} <= reasons
    why = {reason for phase, _, reason in stats.steps if phase == "prefill" and "not recorded" in reason}
    if engine._runner.bound.mixers:
        assert why == {"prefill is not recorded: layers that keep a state take prompts one by one"}
    else:
        assert not why
        assert {"padded to bucket 16", "bucket 96"} <= reasons
    assert stats.free_pages == stats.pages


def make_hybrid(engine: hybridgen.Engine) -> None:
    """Turn an engine of mode jit into one of mode hybrid, as loading does it, with what was compiled."""
    engine.mode = Mode.HYBRID
    # With Inductor decode steps would be compiled whole, which is tried in graphs/test_compiled_step.py.
    engine.config = engine.config.replace(mode="hybrid", compile_backend="eager", **GRAPHS)
    builder = Builder(
        engine.checkpoint,
        engine.config,
        resolve_config(engine.checkpoint, engine.config),
        engine._parts.starter,
        engine._parts.startup,
        engine._counters,
    )
    plan = builder.graph_plan(engine._runner.bound)
    builder.use_graphs(engine._runner, plan, "mode hybrid")
    builder.capture(engine._runner, plan)
    engine._loop.scheduler.pages.clear()  # prompts that mode jit has seen would have short prefills


def test_eager(checkpoint: Path, expected: list) -> None:
    with hybridgen.Engine.load(checkpoint, mode="eager", **SETTINGS) as engine:
        check_engine(engine, expected)
        assert engine.stats().free_pages == engine.stats().pages


def test_graph(checkpoint: Path, expected: list) -> None:
    with hybridgen.Engine.load(checkpoint, mode="graph", **SETTINGS, **GRAPHS) as engine:
        check_engine(engine, expected, FEW_TOKENS)
        check_replays(engine)


def compiled_families() -> list[Any]:
    """Backends and families."""
    usual = [pytest.param(STRUCTURES[name], name) for name in sorted(STRUCTURES)]
    swept = [
        (backend, name)
        for name in sorted(families.FAMILIES)
        for backend in ["aot_eager" if name in FUNCTIONALISED else STRUCTURES.get(name, "eager")]
        if STRUCTURES.get(name) != backend
    ]
    return [*usual, *(pytest.param(*each, marks=pytest.mark.slow) for each in swept)]


@pytest.mark.parametrize(("backend", "family"), compiled_families(), indirect=["family"], scope="module")
def test_jit_and_hybrid(
    backend: str, family: str, checkpoint: Path, expected: list, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Both with the same compiled layers, because most of the time goes into compiling them."""
    shared_graphs.forget()
    kinds, everywhere = families.layer_kinds(family), pytestconfig.getoption("--all-inductor")
    if family in ONE_KIND and not everywhere:
        checkpoint, kinds = families.write(family, tmp_path, **families.ALIKE), 1
        model = families.build(family, **families.ALIKE)
        expected = families.references(model, families.prompts_of(LENGTHS), NEW_TOKENS)
    if everywhere:
        backend = "inductor"
    with hybridgen.Engine.load(checkpoint, mode="jit", compile_backend=backend, run_ahead=1, **SETTINGS) as engine:
        stats = engine.stats()
        assert not stats.fallbacks
        # Prefill, decode of one row and of several: one graph each, whatever the number of layers of a kind.
        assert stats.compiled == 3 * kinds - families.state_kinds(family)
        with torch.compiler.set_stance("fail_on_recompile"):
            check_engine(engine, expected)
            make_hybrid(engine)
            check_engine(engine, expected, FEW_TOKENS)
        assert engine.stats().late_compiles == 0
        check_replays(engine)


@pytest.mark.parametrize("name", sorted(families.MORE_FAMILIES))
def test_more_families(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """In modes eager and graph; a few in mode hybrid, too, or all with `--all-inductor`.

    Of two layers, and traced without a code generator, because most of the time goes into compiling.
    """
    everywhere = pytestconfig.getoption("--all-inductor")
    modes = ["eager", "graph", *(["hybrid"] if everywhere or name in COMPILED else [])]
    check_modes(name, tmp_path, modes, "inductor" if everywhere else "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED_SELDOM)
def test_more_families_compiled(name: str, tmp_path: Path) -> None:
    check_modes(name, tmp_path, ["hybrid"], "eager")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "graph", "jit", "hybrid"])
@pytest.mark.parametrize("name", sorted(families.CONFIGS.keys() - ELSEWHERE))
def test_whole_matrix(name: str, mode: str, tmp_path: Path) -> None:
    """All tokens of every batch and of late requests, borders and log-probabilities, in every mode."""
    if families.is_absent(name):
        pytest.skip(f"this transformers has no {name}")
    model = families.build(name)
    expected = [families.reference(model, prompt, WHOLE_TOKENS) for prompt in families.prompts_of(LENGTHS)]
    path = families.write(name, tmp_path)
    check_whole_matrix(path, mode, expected, compiles=name not in families.UNCOMPILED)


def check_whole_matrix(
    path: Path,
    mode: str,
    expected: list[tuple[list[int], torch.Tensor]],
    compiles: bool = True,
    tolerance: float = 1e-4,
    prompts: list[list[int]] | None = None,
) -> None:
    """`check_engine` with all tokens of every batch, and how the steps ran.

    Args:
        compiles: whether the model's layers do.
    """
    fields: dict[str, Any] = {"mode": mode, "compile_backend": "eager", "run_ahead": 1, **SETTINGS}
    fields |= GRAPHS if mode in ("graph", "hybrid") else {}
    with hybridgen.Engine.load(path, **fields) as engine:
        check_engine(engine, expected, WHOLE_TOKENS, tolerance, WHOLE_TOKENS, prompts)
        stats = engine.stats()
        assert bool(stats.fallbacks) == (mode in ("jit", "hybrid") and not compiles)
        assert stats.late_compiles == 0
        assert stats.free_pages == stats.pages
        assert (stats.graphs.padded_hits > 0) == (mode in ("graph", "hybrid"))


def check_modes(name: str, directory: Path, modes: list[str], backend: str) -> None:
    """In these modes, the tokens of Hugging Face."""
    if families.is_absent(name):
        pytest.skip(f"this transformers has no {name}")
    model = families.build(name)
    prompts = families.prompts_of(FEW_LENGTHS)
    model.save_pretrained(directory)
    expected = [tokens for tokens, _ in families.references(model, prompts, FEW_TOKENS)]
    for mode in modes:
        fields: dict[str, Any] = {**SETTINGS, "max_batch": 4, "mode": mode}
        if mode in ("jit", "hybrid"):
            fields |= {"compile_backend": backend, "run_ahead": 1}
        if mode in ("graph", "hybrid"):
            fields |= GRAPHS | {"decode_buckets": (2, 4), "prefill_buckets": (16, 96)}
        with hybridgen.Engine.load(directory, **fields) as engine:
            outs = engine.generate(prompts, max_new_tokens=FEW_TOKENS)
            assert [list(out.token_ids) for out in outs] == expected, mode
            assert list(engine.generate(prompts[1], max_new_tokens=FEW_TOKENS).token_ids) == expected[1]
            stats = engine.stats()
            assert bool(stats.fallbacks) == (mode in ("jit", "hybrid") and name in families.UNCOMPILED)
            assert stats.late_compiles == 0
            assert (stats.graphs.padded_hits > 0) == (mode in ("graph", "hybrid"))


@functools.cache
def scaled(variant: str) -> list[list[int]]:
    """Hugging Face's tokens, by a fresh model for each prompt: its dynamic scaling remembers the longest one."""
    name, changes = families.ROPE_VARIANTS[variant]
    prompts = families.prompts_of(LENGTHS)
    return [families.reference(families.build(name, **changes), prompt, NEW_TOKENS)[0] for prompt in prompts]


@pytest.mark.parametrize("variant", sorted(families.ROPE_VARIANTS))
@pytest.mark.parametrize("mode", ["eager", pytest.param("jit", marks=pytest.mark.slow), "graph", "hybrid"])
def test_rope_scaling(variant: str, mode: str, tmp_path: Path) -> None:
    """Prompts below, at and above the length where the scaling changes, together in one batch.

    The prompts of 64 and 65 tokens cross longrope's 80 while they decode. Mode hybrid runs the compiled layers of jit.
    """
    name, changes = families.ROPE_VARIANTS[variant]
    path = families.write(name, tmp_path, **changes)
    prompts = families.prompts_of(LENGTHS)
    fields: dict[str, Any] = {"mode": mode, "compile_backend": "eager", "run_ahead": 1, **SETTINGS}
    if mode in ("graph", "hybrid"):
        fields |= GRAPHS | {"decode_buckets": (3, 8)}
    with hybridgen.Engine.load(path, **fields) as engine:
        outs = engine.generate(prompts, max_new_tokens=NEW_TOKENS)
        assert [list(out.token_ids) for out in outs] == scaled(variant)
        stats = engine.stats()
        assert not stats.fallbacks
        assert stats.late_compiles == 0
        assert (stats.graphs.padded_hits > 0) == (mode in ("graph", "hybrid"))
