"""Adapters of PEFT merged into an engine's weights: its own tokens, and nothing left of it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import Engine

SETTINGS: dict[str, Any] = {"max_batch": 2, "max_context": 64, "kv_memory": "4MiB", "device": "cpu", "progress": False}
MODES: list[dict[str, Any]] = [
    {"mode": "eager"},
    {"mode": "jit", "compile_backend": "eager"},
    {"mode": "graph", "run_ahead": 1},
    {"mode": "hybrid", "compile_backend": "eager"},
]
[PROMPT] = families.prompts_of((12,))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "saved": ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
}


def write(directory: Path, kind: str, seed: int = 0) -> tuple[Path, list[int]]:
    """An adapter with random weights, and the tokens that peft's model generates with it."""
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    family, fields = KINDS[kind]
    model = families.build(family)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **fields)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    path = directory / f"{kind}-{seed}"
    adapted.save_pretrained(path)
    ids = adapted.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False, pad_token_id=0)
    return path, ids[0, len(PROMPT) :].tolist()


def tokens(engine: Engine) -> list[int]:
    return list(engine.generate(PROMPT, max_new_tokens=10, ignore_eos=True).token_ids)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine._runner.bound.model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("lora", mode) for mode in MODES] + [(kind, MODES[0]) for kind in KINDS if kind != "lora"],
    ids=lambda value: value["mode"] if isinstance(value, dict) else value,
)
def test_tokens_are_those_of_peft_and_nothing_stays(kind: str, mode: dict[str, Any], tmp_path: Path) -> None:
    path = families.write(KINDS[kind][0], tmp_path)
    (first, expected), (second, others) = write(tmp_path, kind), write(tmp_path, kind, seed=1)
    with Engine.load(path, **mode, **SETTINGS) as engine:
        plain, before = tokens(engine), weights(engine)
        compiled = engine.stats().compiled
        assert plain != expected != others
        for name, wanted in ((first, expected), (second, others), (first, expected), (None, plain)):
            engine.set_adapter(name)
            assert engine.adapter == (None if name is None else str(name))
            assert tokens(engine) == wanted
        after = weights(engine)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        stats = engine.stats()
        assert (stats.compiled, stats.late_compiles) == (compiled, 0)
        assert not stats.fallbacks
        assert engine.generate(PROMPT, max_new_tokens=1).weights_version == 4
    with Engine.load(path, adapter=first, **mode, **SETTINGS) as engine:
        assert tokens(engine) == expected


def test_half_precision_is_undone_bit_for_bit(tmp_path: Path) -> None:
    path, (adapter, _) = families.write("llama", tmp_path), write(tmp_path, "rslora")
    with Engine.load(path, mode="eager", dtype="bfloat16", **SETTINGS) as engine:
        before = weights(engine)
        for _ in range(3):
            engine.set_adapter(adapter)
        changed = weights(engine)
        engine.set_adapter(None)
        after = weights(engine)
    assert sum(not torch.equal(before[name], changed[name]) for name in before) > 20
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    adapter, expected = write(tmp_path, "lora")
    path = families.write("llama", tmp_path)
    other = families.write("llama", tmp_path / "wide", hidden_size=128)
    tied = families.write("llama", tmp_path / "tied", tie_word_embeddings=True)
    saved, _ = write(tmp_path, "saved")
    with Engine.load(other, mode="eager", **SETTINGS) as engine:
        plain = tokens(engine)
        with pytest.raises(hybridgen.ConfigError, match="does not fit the model"):
            engine.set_adapter(adapter)
        assert engine.adapter is None
        assert tokens(engine) == plain
    with Engine.load(tied, mode="eager", **SETTINGS) as engine:
        plain = tokens(engine)
        with pytest.raises(hybridgen.UnsupportedModelError, match="which is tied to"):
            engine.set_adapter(saved)
        assert tokens(engine) == plain
    with Engine.load(path, mode="eager", **SETTINGS) as engine:
        for wrong in (tmp_path / "none", 5):
            with pytest.raises(hybridgen.ConfigError, match="adapter="):
                engine.set_adapter(wrong)
        stream = engine.stream(PROMPT, max_new_tokens=8, ignore_eos=True)
        next(stream)
        with pytest.raises(hybridgen.EngineError, match="requests wait or run"):
            engine.set_adapter(adapter)
        stream.close()
        engine.release_cache()
        with pytest.raises(hybridgen.EngineError, match="call resume"):
            engine.set_adapter(adapter)
        engine.resume()
        engine.set_adapter(adapter)
        assert tokens(engine) == expected
    with pytest.raises(hybridgen.ConfigError, match="not for a live module"):
        Engine.load(families.build("llama"), adapter=adapter, **SETTINGS)
    with pytest.raises(hybridgen.ConfigError, match="cannot be read"):
        Engine.load(path, adapter=tmp_path / "none", **SETTINGS)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, llama_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(hybridgen.ConfigError, match=r"pip install 'hybridgen\[lora\]'"):
        Engine.load(llama_path, adapter="x", **SETTINGS)


LIVE: dict[str, tuple[str, dict[str, Any]]] = {
    **KINDS,
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "both of the experts": (
        "qwen3_moe",
        {"target_modules": ["k_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


def adapted(kind: str) -> Any:
    """A live PEFT model with random weights in its adapter."""
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    family, fields = LIVE[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(families.build(family), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **fields))
    shake(model)
    return model


def shake(model: Any) -> None:
    """Other values in its adapter, as a step of training leaves them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)


def expected(model: Any) -> list[int]:
    model.eval()
    ids = model.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False, pad_token_id=0)
    model.train()
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("lora", mode) for mode in MODES] + [(kind, MODES[0]) for kind in LIVE if kind != "lora"],
    ids=lambda value: value["mode"] if isinstance(value, dict) else value,
)
def test_a_live_model_s_adapters_are_merged_for_the_engine_alone(kind: str, mode: dict[str, Any]) -> None:
    model = adapted(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with Engine.load(model, **mode, **SETTINGS) as engine:
        kinds = {type(module).__module__ for module in engine._runner.bound.model.modules()}
        if kind != "saved":  # a head that is trained whole stays in peft's module
            assert not any(name.startswith("peft") for name in kinds)
        assert tokens(engine) == expected(model)
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
        shake(model)
        first = expected(model)
        for _ in range(2):
            assert tokens(engine) == first
        with model.disable_adapter():
            plain = expected(model)
            assert plain != first
            assert tokens(engine) == plain
        assert tokens(engine) == first
        stats = engine.stats()
        assert not stats.late_compiles
        assert kind == "saved" or not stats.fallbacks  # a switch there is a setting of a module that runs


def test_adapters_of_a_live_model_as_its_owner_switches_and_merges_them() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra lora")

    model = adapted("lora")
    model.add_adapter(
        "other", peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=LIVE["lora"][1]["target_modules"])
    )
    shake(model)
    with Engine.load(model, mode="eager", **SETTINGS) as engine:
        both = []
        for name in ("default", "other"):
            model.set_adapter(name)
            both.append(expected(model))
            assert tokens(engine) == both[-1]
        assert both[0] != both[1]
        model.merge_adapter()
        assert tokens(engine) == expected(model)
        model.unmerge_adapter()
        hook = model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
        with pytest.raises(hybridgen.EngineError, match="merge_adapters=False"):
            tokens(engine)
        hook.remove()
        assert tokens(engine) == both[1]
    with Engine.load(model, mode="eager", merge_adapters=False, **SETTINGS) as engine:
        assert any(type(module).__module__.startswith("peft") for module in engine._runner.bound.model.modules())
        assert tokens(engine) == both[1]


def test_generate_of_a_live_peft_model_runs_on_an_attached_engine() -> None:
    model = adapted("lora")
    wanted = expected(model)
    ids = torch.tensor([PROMPT])
    with hybridgen.attach(model, mode="eager", **SETTINGS) as attached:
        made = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
        assert made[0, len(PROMPT) :].tolist() == wanted
        assert attached.engine.stats().tokens["generated"] == 10
    assert expected(model) == wanted


def test_a_merged_copy_is_the_float32_sum_cast_once() -> None:
    model = adapted("rslora").to(torch.bfloat16)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole = layer.base_layer.weight.float() + layer.scaling["default"] * (b.float() @ a.float())
    with Engine.load(model, mode="eager", **SETTINGS) as engine:
        mine = engine._runner.bound.model.model.layers[1].mlp.up_proj.weight
        assert torch.equal(mine, whole.bfloat16())
