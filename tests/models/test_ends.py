"""Rotary tables and the last norm in decode: looked up and by one operator, where that is the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import shared_graphs
import torch
from runners import make_runner
from torch import nn

import hybridgen
from hybridgen.engine.builder import Builder
from hybridgen.execution import ModelRunner
from hybridgen.models import ends
from hybridgen.models.attention import Phase
from hybridgen.models.ends import EndModule, use_own_ends, use_short_ends

SETTINGS: dict[str, Any] = {
    "max_batch": 2, "page_size": 16, "kv_memory": "4MiB", "max_context": 128, "dtype": "float32",
    "compile_backend": "eager", "compile_cache": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama", 2),
        ("gpt_oss", 2),
        ("gemma2", 2),
        ("gpt2", 0),  # has neither
        ("stablelm", 1),  # a LayerNorm
        ("gemma3_text", 1),  # two rotary tables
    ],
)
def test_which_ends_are_changed(name: str, found: int, runners: list[ModelRunner]) -> None:
    runner = make_runner(name)
    runners.append(runner)
    modules = list(runner.bound.model.modules())
    before = [(type(module), dict(vars(module))) for module in modules]
    assert use_short_ends(runner.bound, runner.steps.metadata, 64) == found
    assert sum(isinstance(module, EndModule) for module in modules) == found
    has_table = any(isinstance(vars(each).get("_hybridgen"), ends.RotaryBinding) for each in runner.bound.around)
    assert ("rotary table" in runner.steps.tensors()) == has_table  # or trees copy it in each step
    use_own_ends(runner.bound)
    assert "rotary table" not in runner.steps.tensors()
    assert [(type(module), dict(vars(module))) for module in modules] == before


def _changed_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon).clamp(max=0.9)


def _changed_table(own: Any) -> Any:
    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return tuple(each * position_ids.max() for each in own(self, x, position_ids))

    return forward


def test_ends_that_do_something_else(runners: list[ModelRunner], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner("llama")
    runners.append(runner)
    decoder: Any = runner.bound.model.get_decoder()
    rotary = type(decoder.rotary_emb)
    monkeypatch.setattr(type(decoder.norm), "forward", _changed_norm)
    monkeypatch.setattr(rotary, "forward", _changed_table(rotary.forward))
    assert use_short_ends(runner.bound, runner.steps.metadata, 64) == 0


def test_a_table_of_other_frequencies_is_not_used(runners: list[ModelRunner]) -> None:
    runner = make_runner("llama")
    runners.append(runner)
    rotary: Any = runner.bound.model.get_decoder().rotary_emb
    use_short_ends(runner.bound, runner.steps.metadata, 64)
    assert isinstance(rotary, EndModule)
    rotary.inv_freq.mul_(2)
    ends.allow_short_ends(runner.bound, lambda _: True)
    assert not isinstance(rotary, EndModule)


_OTHERS = ("qwen3_5_text", "minicpm3", "glm4_moe", "exaone4", "phi3", "smollm3")


@pytest.mark.parametrize(
    "name", ["llama", "gpt_oss", *(pytest.param(each, marks=pytest.mark.slow) for each in _OTHERS)]
)
def test_tokens_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = families.write(name, tmp_path, **(families.ALIKE if name == "gpt_oss" else {"num_hidden_layers": 2}))
    prompts = families.prompts_of((7, 19))
    shared_graphs.forget()
    expected, looked_up = [], []
    own = ends._rotary

    for on in (False, True):
        monkeypatch.setattr(Builder, "_rotates_in_one_op", lambda self, on=on: on)
        monkeypatch.setattr(ends, "_rotary", lambda kind: looked_up.append(kind) or own(kind))
        with hybridgen.Engine.load(path, mode="jit", **SETTINGS) as engine:
            outs = engine.generate(prompts, max_new_tokens=20, ignore_eos=True, temperature=0)
            expected.append([list(out.token_ids) for out in outs])
            assert not engine.stats().fallbacks
            assert not engine.stats().late_compiles
    assert expected[0] == expected[1]
    assert looked_up


class _Rotary(nn.Module):
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> str:
        return "own"


def test_only_one_row_of_positions_is_looked_up() -> None:
    """Qwen3.5 hands over three positions of each token."""
    module: Any = _Rotary()
    step: Any = SimpleNamespace(phase=Phase.DECODE)
    table = torch.arange(24.0).view(6, 4)
    module._hybridgen = ends.RotaryBinding(step, table, None)
    module.__class__ = ends._rotary(_Rotary)
    x, positions = torch.zeros(1), torch.tensor([[4, 0, 5]])
    cos, sin = module(x, positions)
    assert torch.equal(torch.cat((cos, sin), -1), table[positions])
    assert module(x, positions.expand(2, 3)) == "own"
    assert module(x, positions.expand(3, 1, 3)) == "own"
    step.phase = Phase.PREFILL
    assert module(x, positions) == "own"
