"""Experts that run as they are stored: MXFP4 of gpt-oss, and those of other formats that are stored one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import quantised_formats as formats
import torch
from safetensors.torch import load_file, save_file
from test_formats import check_values, expected, tokens
from transformers import PreTrainedModel

import hybridgen
from hybridgen.errors import EngineError
from hybridgen.kernels.linear.experts import expert_values, experts
from hybridgen.loading import Checkpoint
from hybridgen.models import experts_check
from hybridgen.models.packed_experts import PackedExperts

MODES = ("eager", "graph", "jit", "hybrid")
SHORT = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def write_mxfp4_experts(path: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A gpt-oss checkpoint as OpenAI writes it; the model with its values, and these by name."""
    model = families.build("gpt_oss", **SHORT)
    model.save_pretrained(path)
    g = torch.Generator().manual_seed(0)
    out, plain = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            out[name] = plain[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        packed, scales, values = formats._mxfp4((experts, outputs), inputs, g)
        out[f"{name}_blocks"] = packed.view(experts, outputs, inputs // 32, 16)
        out[f"{name}_scales"] = scales
        plain[name] = values.transpose(1, 2).contiguous()
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "mxfp4"}}))
    formats.fill(model, plain)
    return model, plain


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    """They stay as they are stored, and every mode generates what their values do."""
    model, plain = write_mxfp4_experts(tmp_path)
    loaded = Checkpoint.open(tmp_path).load()
    check_values(loaded.model, model)
    assert not loaded.notes
    packed = {name: one for name, one in loaded.model.named_modules() if isinstance(one, PackedExperts)}
    assert len(packed) == 2
    for name, module in packed.items():
        stored = module.weights_stored
        for part, one, inputs in (("gate_up", stored.gate_up, 64), ("down", stored.down, 96)):
            wanted = plain[f"{name}.{part}_proj"]
            for expert in range(4):
                values = expert_values(one, expert, "mxfp4", inputs, stored.block, False, torch.float32)
                assert torch.equal(values, wanted[expert].t())
    wanted_tokens = expected(model)
    for mode in MODES:
        with hybridgen.Engine.load(tmp_path, mode=mode, compile_backend="eager", **formats.SETTINGS) as engine:
            assert tokens(engine) == wanted_tokens, mode
            stats = engine.stats()
            assert not stats.fallbacks
            assert not stats.late_compiles
            assert stats.weights["mxfp4 experts in blocks of 1x32"] == (16, 4.25, None)  # 4 experts of 2 layers
            assert "mxfp4 experts in blocks of 1x32, 4.25 bits a weight" in str(engine._runner.bound.model)


def test_experts_in_mxfp4_are_refused_where_their_kernel_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mxfp4_experts(tmp_path)
    rows: list[int] = []

    def right(x: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(x.shape[0])
        return experts(x, *others)

    monkeypatch.setattr(experts_check, "wants_check", lambda device: True)
    monkeypatch.setattr(experts_check, "experts", right)
    with hybridgen.Engine.load(tmp_path, mode="graph", **formats.SETTINGS) as engine:
        assert rows == [1, 8, 65]  # layers of a kind are checked once
        assert not engine.stats().fallbacks
    monkeypatch.setattr(experts_check, "experts", lambda x, *others: experts(x, *others) * 1.1)
    with pytest.raises(EngineError, match=r"experts in mxfp4 do not run on cpu: of 1 random tokens .* off by 0.1;"):
        hybridgen.Engine.load(tmp_path, mode="graph", **formats.SETTINGS)
    with hybridgen.Engine.load(tmp_path, mode="eager", **formats.SETTINGS) as engine:
        assert not engine.stats().fallbacks


@pytest.mark.parametrize("still_wrong", [False, True])
def test_a_wrong_kernel_of_one_token_is_left_to_others(
    still_wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed experts are refused where the other kernels are wrong, too."""
    refused: list[str] = []

    def refuse(kernel: str, device: torch.device) -> bool:
        refused.append(kernel)
        return len(refused) == 1

    def trial(x: torch.Tensor, *others: Any) -> torch.Tensor:
        wrong = x.shape[0] == 1 and (still_wrong or not refused)
        return experts(x, *others) * (1.05 if wrong else 1)

    monkeypatch.setattr(experts_check, "wants_check", lambda device: True)
    monkeypatch.setattr(experts_check, "experts", trial)
    monkeypatch.setattr(experts_check, "refuse", refuse)
    write_mxfp4_experts(tmp_path)
    if still_wrong:
        with pytest.raises(EngineError, match=r"off by 0\.05"):
            hybridgen.Engine.load(tmp_path, mode="graph", **formats.SETTINGS)
        return
    with (
        pytest.warns(RuntimeWarning, match="take a slower kernel: of 1 random tokens"),
        hybridgen.Engine.load(tmp_path, mode="graph", **formats.SETTINGS) as engine,
    ):
        assert any("experts of one token" in why for why in engine.stats().fallbacks)
    assert refused == ["experts_one"]


def test_experts_whose_code_is_another_are_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = write_mxfp4_experts(tmp_path)
    monkeypatch.setattr("hybridgen.loading.quantised.probe", lambda module: None)
    loaded = Checkpoint.open(tmp_path).load()
    check_values(loaded.model, model)
    assert sum(count for note, count in loaded.notes.items() if "experts" in note) == 4


def check_experts(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    """Every expert of the loaded model is the other's, bit for bit."""
    packed = {path: one for path, one in loaded.named_modules() if isinstance(one, PackedExperts)}
    assert len(packed) == model.config.num_hidden_layers
    for path, module in packed.items():
        stored, own = module.weights_stored, model.get_submodule(path)
        for one, wanted in ((stored.gate_up, own.gate_up_proj), (stored.down, own.down_proj)):
            for expert, values in enumerate(wanted):
                found = expert_values(one, expert, stored.kind, values.shape[1], stored.block, False, torch.float32)
                assert torch.equal(found, values)


@pytest.mark.parametrize("modes", [MODES[:2], pytest.param(MODES[2:], marks=pytest.mark.slow)], ids="-".join)
def test_experts_that_are_stored_one_by_one(modes: tuple[str, ...], tmp_path: Path) -> None:
    """They are run as they are stored, from one tensor for a layer. Compiled ones in every run are those in MXFP4."""
    parts = {
        "first": ("ct w4 zeros", r"re:.*layers\.0\..*"),
        "second": ("ct fp8 block", r"re:.*layers\.1\..*"),
    }
    model = families.build("qwen3_moe", num_hidden_layers=2, moe_intermediate_size=96)
    formats.write_parts(tmp_path, model, parts, ("lm_head", r"re:.*\.gate$"))
    loaded = Checkpoint.open(tmp_path).load()
    check_values(loaded.model, model)
    check_experts(loaded.model, model)
    assert not any("dequantised" in note for note in loaded.notes)
    wanted = expected(model)
    for mode in modes:
        with hybridgen.Engine.load(tmp_path, mode=mode, compile_backend="eager", **formats.SETTINGS) as engine:
            assert tokens(engine) == wanted, mode
            assert not engine.stats().late_compiles


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8 block", "ct fp8 channel", "ct fp8 tensor", "ct mxfp4", "awq"])
def test_experts_in_other_formats(name: str, tmp_path: Path) -> None:
    model = formats.write_family(tmp_path, "qwen3_moe", name, moe_intermediate_size=96)
    loaded = Checkpoint.open(tmp_path).load()
    check_values(loaded.model, model)
    check_experts(loaded.model, model)
    wanted = expected(model)
    for mode in ("eager", "graph"):
        with hybridgen.Engine.load(tmp_path, mode=mode, **formats.SETTINGS) as engine:
            assert tokens(engine) == wanted, mode
