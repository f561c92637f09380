"""Heads for multi-token prediction that checkpoints carry: what they draft is what their layer computes, and whatever
they draft changes no token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from draft_cases import GREEDY, KINDS, PROMPTS, check_counts, check_equal, each, loaded
from mtp_heads import LAYERS, Reference, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import hybridgen
from hybridgen import Engine
from hybridgen.execution.drafting import DraftCall
from hybridgen.graphs import recorder, stand_in
from hybridgen.loading import Checkpoint
from hybridgen.speculation.mtp import MtpDrafter


@pytest.fixture(
    scope="module", params=["glm4_moe", "deepseek_v3", pytest.param("glm4_moe_lite", marks=pytest.mark.slow)]
)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Each row's text and what was drafted behind it."""
    seen = []
    draft = MtpDrafter.draft

    def noted(self: MtpDrafter, call: DraftCall) -> Tensor:
        made = draft(self, call)
        for slot, length, row in zip(call.slots.tolist(), call.lengths.tolist(), made.tolist(), strict=True):
            if slot < call.text.shape[0] - 1:
                seen.append((call.text[slot, :length].tolist(), row[: row.index(-1)] if -1 in row else row))
        return made

    monkeypatch.setattr(MtpDrafter, "draft", noted)
    return seen


def test_it_drafts_what_its_layer_computes(
    checkpoint: tuple[str, Path], tmp_path: Path, drafts: list[tuple[list[int], list[int]]]
) -> None:
    """Prompts in chunks, packed with others, over page borders: each draft is that of the layer over the whole text."""
    family, path = checkpoint
    prompts = PROMPTS[:4]
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, **GREEDY}
    with loaded(path) as engine:
        expected = engine.generate(prompts, **options)
    with loaded(path, drafter="mtp") as engine:
        check_equal(engine.generate(prompts, **options), expected)
        stats = engine.stats().speculation
    assert stats.drafter == "mtp"
    assert stats.drafted > 50
    reference = Reference(path, tmp_path / "whole", family)
    assert len(drafts) > 40
    for text, found in drafts:
        assert found == reference.drafts(text, 3)[: len(found)]


@pytest.mark.parametrize(
    "mode",
    ["eager", "graph", pytest.param("jit", marks=pytest.mark.slow), pytest.param("hybrid", marks=pytest.mark.slow)],
)
def test_every_mode(mode: str, checkpoint: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled, with penalties, bans and log-probabilities."""
    _, path = checkpoint
    for module in (stand_in, recorder):  # or drafts may not be worth their time here
        monkeypatch.setattr(module, "median_seconds", lambda *_: 1.0)
    params = each(9, 16, KINDS)
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[:9], params)
    with loaded(path, mode, drafter="mtp") as engine:
        for _ in range(2):
            found = engine.generate(PROMPTS[:9], params)
            while engine.record_missing():
                pass
            check_equal(found, expected)
            check_counts(found)
        stats = engine.stats()
    assert stats.speculation.drafted > 0
    assert stats.speculation.cache_bytes * (LAYERS["glm4_moe"] + 1) == stats.cache_bytes


def _changed(path: Path, to: Path, change: Any) -> Path:
    to.mkdir()
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors, config), to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t, c: {name: value for name, value in t.items() if "layers.2." not in name},
            "ConfigError",
            "carries no head for multi-token prediction",
        ),
        (
            lambda t, c: {name.replace("model.layers.2.", "mtp."): value for name, value in t.items()},
            "UnsupportedModelError",
            "has its head as mtp.eh_proj.weight",
        ),
        (
            lambda t, c: t | {"model.layers.3.eh_proj.weight": torch.ones(1)},
            "UnsupportedModelError",
            r"has the layers \[2, 3\] behind its 2; heads of one layer run",
        ),
        (
            lambda t, c: {name: value for name, value in t.items() if "hnorm" not in name},
            "UnsupportedModelError",
            "has no hnorm.weight",
        ),
        (
            lambda t, c: t | {"model.layers.2.eh_proj.weight": torch.ones(64, 64)},
            "CheckpointError",
            r"eh_proj.weight of .* is \[64, 64\], its config says \[64, 128\]",
        ),
        (lambda t, c: t | {"model.layers.2.extra.weight": torch.ones(2)}, "UnsupportedModelError", "layers.2.extra"),
        (
            lambda t, c: {name: value for name, value in t.items() if "layers.2.input_layernorm" not in name},
            "CheckpointError",
            "lacks 1 weights .*input_layernorm",
        ),
    ],
)
def test_heads_that_are_refused(
    change: Any, error: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _changed(write(tmp_path, "glm4_moe"), tmp_path / "changed", change)
    if "extra" not in message and "lacks" not in message:
        monkeypatch.setattr(Checkpoint, "load", lambda _: pytest.fail("weights are read"))
    with pytest.raises(getattr(hybridgen, error), match=message):
        Engine.load(path, mode="eager", drafter="mtp", max_context=64, compile_cache=False)


def test_models_without_files_and_without_heads(tmp_path: Path) -> None:
    path = families.write("llama", tmp_path, num_hidden_layers=2)
    settings: dict[str, Any] = {"mode": "eager", "max_context": 64, "compile_cache": False, "drafter": "mtp"}
    with pytest.raises(hybridgen.ConfigError, match="carries no head for multi-token prediction"):
        Engine.load(path, **settings)
    live = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with pytest.raises(hybridgen.ConfigError, match="is a live module, and such a head is read from files"):
        Engine.load(live, **settings)
    with pytest.raises(hybridgen.ConfigError, match="quantize_drafter='fp8' with drafter=\"mtp\""):
        Engine.load(path, quantize_drafter="fp8", **settings)
    with pytest.raises(hybridgen.ConfigError, match="quantize_head='fp8' with drafter=\"mtp\""):
        Engine.load(path, quantize_head="fp8", **settings)
