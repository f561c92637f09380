"""Models that other packages wrapped: taken, or refused with the way to give what is inside."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from torch import nn

from hybridgen.config import EngineConfig
from hybridgen.engine import Engine
from hybridgen.errors import ConfigError, UnsupportedModelError
from hybridgen.loading import Checkpoint

PROMPT = families.prompts_of((9,))[0]
SETTINGS: dict[str, Any] = {"max_batch": 2, "max_context": 32, "compile_backend": "eager", "device": "cpu"}


class LowRank(nn.Module):
    """A projection with an adapter, as PEFT puts one in its place."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(2, base_layer.in_features, generator=generator) * 0.3)
        self.b = nn.Parameter(torch.randn(base_layer.out_features, 2, generator=generator) * 0.3)
        self.scaling = {"default": 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.a.T @ self.b.T * self.scaling["default"]


class PeftModel(nn.Module):
    """What is read of PEFT's class of this name."""

    def __init__(self, model: Any, **config: Any) -> None:
        super().__init__()
        self.base_model = model
        self.active_peft_config = SimpleNamespace(**({"peft_type": "LORA", "is_prompt_learning": False} | config))

    def get_base_model(self) -> Any:
        return self.base_model


def adapted() -> Any:
    model = families.build("llama", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
    return model


@pytest.mark.parametrize("mode", ["eager", "jit", "graph", "hybrid"])
def test_a_peft_model_runs_with_its_adapter(mode: str) -> None:
    plain, model = families.build("llama", num_hidden_layers=2), adapted()
    expected = families.reference(model, PROMPT, 6)[0]
    assert expected != families.reference(plain, PROMPT, 6)[0]
    with Engine.load(PeftModel(model), mode=mode, **SETTINGS) as engine:
        assert list(engine.generate(PROMPT, max_new_tokens=6, temperature=0).token_ids) == expected
        for layer in model.model.layers:  # settings in a dictionary, as PEFT has its scaling
            layer.self_attn.q_proj.scaling["default"] = -2.0
        expected = families.reference(model, PROMPT, 6)[0]
        for _ in range(2):
            assert list(engine.generate(PROMPT, max_new_tokens=6, temperature=0).token_ids) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "PROMPT_TUNING", "is_prompt_learning": True}, "PROMPT_TUNING works outside"),
        ({"peft_type": SimpleNamespace(value="XLORA")}, "XLORA works outside"),
        ({"alora_invocation_tokens": [3]}, "in the middle of a prompt"),
    ],
)
def test_adapters_that_are_not_in_the_layers_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint.open(PeftModel(families.build("llama"), **config), EngineConfig())


def test_other_wrappers_say_what_to_give() -> None:
    model = families.build("llama", num_hidden_layers=1)
    wrappers = {"_orig_mod": torch.compile(model, backend="eager"), "module": nn.DataParallel(model)}
    for attribute, wrapper in wrappers.items():
        with pytest.raises(ConfigError, match=f"around a LlamaForCausalLM; give that: model.{attribute}"):
            Checkpoint.open(wrapper, EngineConfig())
