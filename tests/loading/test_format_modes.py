"""Every format in every mode: what is generated is Hugging Face's with the weights' values.

A compiled or recorded step knows of a format only what `QuantisedWeight` says, and layers of a model may be stored in
different formats. So one model has them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats as formats
import torch
from one_projection import read_one, write_one
from transformers import PreTrainedModel

import hybridgen
from hybridgen.loading import Checkpoint
from hybridgen.models.quantised import QuantisedLinear, QuantisedWeight, quantised_modules

GRAPHS: dict[str, Any] = {"decode_buckets": (2, 4), "prefill_buckets": (16, 48), "max_padding_ratio": 64}
LENGTHS = (7, 33, 1)
NEW_TOKENS = 12
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
Wanted = list[tuple[list[int], torch.Tensor]]


def mixed(place: Path, names: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose projections are stored in these formats in turn, and one with their values."""
    layers = -(-len(names) // len(PROJECTIONS))
    stored, plain = (families.build("llama", num_hidden_layers=layers) for _ in range(2))
    turns = cycle(names)
    for layer, values in zip(stored.model.layers, plain.model.layers, strict=True):
        for projection, name in zip(PROJECTIONS, turns, strict=False):
            own = values.get_submodule(projection)
            own.weight.data.copy_(write_one(place / "one.safetensors", name, None, *own.weight.shape))
            weight = read_one(place / "one.safetensors", name)
            if not isinstance(weight, QuantisedWeight):
                layer.get_submodule(projection).weight.data.copy_(weight)
                continue
            module = QuantisedLinear(own.in_features, own.out_features, False)
            module.fill(weight)
            layer.set_submodule(projection, module)
    return stored, plain


def wanted_of(plain: PreTrainedModel) -> Wanted:
    return [families.reference(plain, prompt, NEW_TOKENS) for prompt in families.prompts_of(LENGTHS)]


def check(engine: hybridgen.Engine, wanted: Wanted) -> None:
    outs = engine.generate(families.prompts_of(LENGTHS), max_new_tokens=NEW_TOKENS, logprobs=0)
    for out, (tokens, logits) in zip(outs, wanted, strict=True):
        assert list(out.token_ids) == tokens
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        found = torch.tensor([entry.logprob for entry in out.logprobs])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not engine.stats().fallbacks
    assert not engine.stats().late_compiles


def told_apart(place: Path) -> list[str]:
    """Of formats that become the same in memory the first: compiled code can know no more of a weight."""
    firsts: dict[Any, str] = {}
    for name in formats.FORMATS:
        write_one(place / "one.safetensors", name, None, 96, 96)
        weight = read_one(place / "one.safetensors", name)
        stored = isinstance(weight, QuantisedWeight)
        key = (weight.kind, weight.block, weight.scales.dtype, weight.zeros is None) if stored else None
        firsts.setdefault(key, name)
    return list(firsts.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Wanted]:
    """The model and what is wanted of it."""
    place = tmp_path_factory.mktemp("mixed")
    stored, plain = mixed(place, told_apart(place))
    return stored, wanted_of(plain)


@pytest.mark.parametrize("mode", ["eager", "graph", "jit", "hybrid"])
def test_every_mode_generates_the_tokens_of_the_values(mode: str, made: tuple[PreTrainedModel, Wanted]) -> None:
    model, wanted = made
    graphs = GRAPHS if mode in ("graph", "hybrid") else {}
    with hybridgen.Engine.load(model, mode=mode, compile_backend="eager", **formats.SETTINGS, **graphs) as engine:
        check(engine, wanted)
        # Only eager steps dequantise by themselves; the others go through the op, which has kernels.
        modules = [module for _, module in quantised_modules(engine._runner.bound.model)]
        assert {module.dequantises for module in modules} == {mode == "eager"}
    assert not any(module.dequantises for _, module in quantised_modules(model))  # its owner's


def test_whole_steps_compiled_by_inductor(tmp_path: Path) -> None:
    """Another process compiles them, with all layers; prompts go by compiled layers."""
    parts = {
        "qkv": ("ct w4 zeros", r"re:.*\.[qkv]_proj$"),
        "o": ("ct fp8 block", r"re:.*\.o_proj$"),
        "gate_up": ("ct int8 channel", r"re:.*\.(gate|up)_proj$"),
        "down": ("ct mxfp4", r"re:.*\.down_proj$"),
    }
    plain = formats.write_parts(tmp_path, families.build("llama", num_hidden_layers=1), parts)
    found = [module.kind for _, module in quantised_modules(Checkpoint.open(tmp_path).load().model)]
    assert sorted(found) == ["fp8", *["int4"] * 3, *["int8"] * 2, "mxfp4"]
    with hybridgen.Engine.load(
        tmp_path, mode="hybrid", decode_buckets=[4], lazy_capture=False, **formats.SETTINGS
    ) as engine:
        check(engine, wanted_of(plain))
        stats = engine.stats()
        assert "compiled step" in {row.owner for row in stats.graphs.graphs}
        assert any("compiled step" in kind for phase, kind, _ in stats.steps if phase == "decode")
