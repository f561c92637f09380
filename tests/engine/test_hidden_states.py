"""Hidden states: those of transformers' `output_hidden_states`, in every mode, whatever the chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import Engine

SETTINGS: dict[str, Any] = {
    "max_batch": 4,
    "page_size": 8,
    "token_budget": 48,
    "kv_memory": "16MiB",
    "max_context": 256,
    "device": "cpu",
    "progress": False,
}
MODES: list[dict[str, Any]] = [
    {"mode": "eager"},
    {"mode": "jit", "compile_backend": "eager", "run_ahead": 1},
    {"mode": "graph", "run_ahead": 1},
    {"mode": "hybrid", "compile_backend": "eager"},
]
PROMPTS = families.prompts_of((70, 1, 9, 33))


def reference(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([prompt]), use_cache=False, output_hidden_states=True)
    return torch.stack(out.hidden_states)[:, 0]


@pytest.mark.parametrize(
    ("family", "mode"),
    [("llama", mode) for mode in MODES] + [(family, MODES[0]) for family in ("gemma2", "opt", "llama4_text")],
    ids=lambda value: value["mode"] if isinstance(value, dict) else value,
)
def test_they_are_those_of_transformers(family: str, mode: dict[str, Any], tmp_path: Path) -> None:
    path, model = families.write(family, tmp_path), families.build(family)
    count = model.config.num_hidden_layers
    with Engine.load(path, **mode, **SETTINGS) as engine:
        engine.generate(PROMPTS[0], max_new_tokens=1)  # its pages are not used: nothing would be computed
        before = engine.stats().late_compiles
        for prompt, states in zip(PROMPTS, engine.hidden_states(PROMPTS, range(count + 1)), strict=True):
            expected = reference(model, prompt)
            assert states.shape == expected.shape
            assert torch.allclose(states, expected, atol=1e-4, rtol=1e-4)
        last = engine.hidden_states(PROMPTS, [2, -1], pool="last")
        mean = engine.hidden_states(PROMPTS, 1, pool="mean")
        for prompt, end, average in zip(PROMPTS, last, mean, strict=True):
            expected = reference(model, prompt)
            assert torch.allclose(end, expected[[2, -1], -1], atol=1e-4, rtol=1e-4)
            assert torch.allclose(average, expected[[1]].mean(1), atol=1e-4, rtol=1e-4)
        stats = engine.stats()
        assert stats.late_compiles == before
        assert (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)
        assert not stats.fallbacks
        assert not any(layer._forward_pre_hooks for layer in engine._runner.bound.layers)


def test_a_live_module_keeps_its_hooks(tmp_path: Path) -> None:
    model = families.build("llama", num_hidden_layers=2)
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(1))
    with Engine.load(model, mode="eager", **SETTINGS) as engine:
        states = engine.hidden_states(PROMPTS[2], (0, 1))
        assert torch.allclose(states, reference(model, PROMPTS[2])[:2], atol=1e-4)
    assert seen
    assert len(model.model.layers[0]._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], 5), hybridgen.ConfigError, r"layers has 5; give integers from 0 .* to 2"),
        (([1, 2], [-4]), hybridgen.ConfigError, "layers has -4"),
        (([1, 2], []), hybridgen.ConfigError, "layers is empty"),
        (([1, 2], "last"), hybridgen.ConfigError, "layers='last'"),
        (([1, 2], [True]), hybridgen.ConfigError, "layers has True"),
        (([1, 999],), hybridgen.PromptError, "outside the vocabulary"),
        (([1] * 257,), hybridgen.PromptError, "over the context of 256"),
        (("text",), hybridgen.TokenizerError, "needs a tokenizer"),
    ],
)
def test_what_is_wrong_is_refused(arguments: Any, error: type, message: str, tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        with pytest.raises(error, match=message):
            engine.hidden_states(*arguments)
        with pytest.raises(hybridgen.ConfigError, match="pool='max'"):
            engine.hidden_states([1, 2], pool="max")
        assert not engine.stats().steps
    with pytest.raises(hybridgen.EngineError, match="closed"):
        engine.hidden_states([1, 2])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("opt", {"num_hidden_layers": 2, "word_embed_proj_dim": 32}, "32 and 64 numbers; ask for them apart"),
        ("gemma3n_text", {}, "several states of each token"),
    ],
)
def test_states_of_other_shapes_fail_their_request_alone(family: str, changes: Any, message: str) -> None:
    with Engine.load(families.build(family, **changes), mode="eager", **SETTINGS) as engine:
        with pytest.raises(hybridgen.RequestError, match=message):
            engine.hidden_states(PROMPTS[2], (0, -1))
        assert engine.hidden_states(PROMPTS[2], -1).shape[1] == 9
