"""Steps with one op between projections and attention, and for which modules that is right."""

from __future__ import annotations

from itertools import count
from typing import Any

import families
import pytest
import torch
from runners import make_runner, prefill_logits
from torch import nn

from hybridgen.execution import ModelRunner
from hybridgen.execution.following import begin_call
from hybridgen.execution.warm_up import compile_layers
from hybridgen.graphs.key import GraphKey
from hybridgen.kernels.attention import rotary
from hybridgen.models import rotating
from hybridgen.models.rotating import RotatingAttention, use_one_op, use_own_rotation

CONTEXT = 64


@pytest.mark.parametrize(
    ("name", "proved", "sites"),
    [
        ("llama", 4, 4),
        ("qwen3", 4, 4),
        ("gemma2", 4, 4),
        ("gemma3_text", 4, 4),
        ("stablelm", 4, 4),  # rotates a part of each head
        ("smollm3", 3, 4),  # a layer does not rotate
        ("glm", 0, 4),  # rotates neighbours
        ("olmo2", 0, 4),  # normalises all heads together
        ("gpt_oss", 4, 4),  # has sinks
        ("phi3", 0, 4),
        ("lfm2", 0, 1),
        ("llama4_text", 0, 2),
    ],
)
def test_which_modules_are_proved(name: str, proved: int, sites: int, runners: list[ModelRunner]) -> None:
    runner = make_runner(name)
    runners.append(runner)
    own = prefill_logits(runner)
    assert len(runner.bound.sites) == sites
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == proved
    assert sum(isinstance(site.module, RotatingAttention) for site in runner.bound.sites) == proved
    torch.testing.assert_close(prefill_logits(runner), own, rtol=1e-5, atol=1e-5)
    with runner.bound.original_attention(), torch.inference_mode():  # it attends by itself, whatever the last step was
        ids = torch.arange(9)[None]
        expected = runner.bound.model(input_ids=ids, use_cache=False).logits
        use_own_rotation(runner.bound)
        torch.testing.assert_close(runner.bound.model(input_ids=ids, use_cache=False).logits, expected)
    assert not any(isinstance(site.module, RotatingAttention) for site in runner.bound.sites)
    assert not any("_hybridgen_rotation" in vars(site.module) for site in runner.bound.sites)


def test_sinks_and_tables_of_half_the_width(runners: list[ModelRunner], monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-OSS, whose sinks have to be the ones that it hands to attention."""
    runner = make_runner("gpt_oss")
    runners.append(runner)
    for site in runner.bound.sites:
        nn.init.normal_(site.module.sinks)  # type: ignore[arg-type]
    own = prefill_logits(runner)
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == 4
    assert all(site.module._hybridgen_rotation.half for site in runner.bound.sites)  # type: ignore[union-attr]
    torch.testing.assert_close(prefill_logits(runner), own, rtol=1e-5, atol=1e-5)
    use_own_rotation(runner.bound)
    forward = type(runner.bound.sites[0].module).forward

    def other_sinks(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, self.sinks = self.sinks, nn.Parameter(self.sinks + 1)
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.sinks = before

    monkeypatch.setattr(type(runner.bound.sites[0].module), "forward", other_sinks)
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == 0


def _wrong(q: torch.Tensor, *others: Any) -> torch.Tensor:
    return rotary.rotate_and_write(q, *others) * 1.05


def _not_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: Any, sin: Any, norms: Any, places: Any) -> Any:
    return rotary.turned(q, cos, sin, norms.q_weight, norms.q_eps, norms.shift, norms.half)


def _failing(*arguments: Any) -> torch.Tensor:
    raise RuntimeError("no kernel")


def _changing() -> Any:
    calls = count()
    return lambda *arguments: rotary.rotate_and_write(*arguments) + 1e-6 * next(calls)


@pytest.mark.parametrize("op", [_wrong, _not_written, _failing, _changing()], ids=["wrong", "left", "fails", "changes"])
def test_an_op_that_is_wrong_with_tables_of_half_the_width(
    op: Any, runners: list[ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is found before it is used, and counted."""
    monkeypatch.setattr(rotating, "rotate_and_write", op)
    runner = make_runner("gpt_oss")
    runners.append(runner)
    told: list[str] = []
    assert use_one_op(runner.bound, CONTEXT, told.append) == 0
    assert told == ["heads are rotated by the model's own code: our kernel gives other results, or fails"]
    assert not any("_hybridgen_rotation" in vars(site.module) for site in runner.bound.sites)


def _of_output(change: Any) -> Any:
    def forward(own: Any, self: nn.Module, **kwargs: Any) -> Any:
        out, weights = own(self, **kwargs)
        return change(out), weights

    return forward


def _of_queries(change: Any) -> Any:
    def forward(own: Any, self: Any, **kwargs: Any) -> Any:
        project = self.q_proj
        self.q_proj = nn.Sequential(project, change)
        try:
            return own(self, **kwargs)
        finally:
            self.q_proj = project

    return forward


@pytest.mark.parametrize(
    "forward",
    [
        _of_output(lambda out: out * 1.01),
        _of_output(lambda out: out + 1e-3),
        _of_queries(nn.Hardtanh(-30.0, 30.0)),  # which only large numbers show
        lambda own, self, **kwargs: own(self, **{**kwargs, "hidden_states": kwargs["hidden_states"] + 1e-3}),
        lambda own, self, **kwargs: own(self, **{**kwargs, "position_embeddings": kwargs["position_embeddings"][::-1]}),
    ],
)
def test_a_module_that_does_something_else_is_left_alone(
    forward: Any, runners: list[ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner("llama")
    runners.append(runner)
    kind = type(runner.bound.sites[0].module)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, **kwargs: forward(own, self, **kwargs))
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == 0


def test_late_positions_are_looked_at_too(runners: list[ModelRunner], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner("llama")
    runners.append(runner)
    kind = type(runner.bound.sites[0].module)
    own = kind.forward

    def forward(self: nn.Module, **kwargs: Any) -> Any:
        late = (kwargs["position_ids"] >= CONTEXT - 2)[..., None]
        return own(self, **{**kwargs, "hidden_states": kwargs["hidden_states"] * torch.where(late, 2.0, 1.0)})

    monkeypatch.setattr(kind, "forward", forward)
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == 0
    assert use_one_op(runner.bound, CONTEXT - 2, pytest.fail) == 4


def test_hooks_keep_a_module_as_it_is(runners: list[ModelRunner]) -> None:
    runner = make_runner("llama")
    runners.append(runner)
    runner.bound.sites[1].module.k_proj.register_forward_hook(lambda *_: None)
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == 3


def test_what_a_models_code_raises_keeps_all_as_they_are(
    runners: list[ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner("llama")
    runners.append(runner)

    def raising(*_: Any) -> None:
        raise RuntimeError("not on this device")

    monkeypatch.setattr(rotating, "turned", raising)
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == 0


@pytest.mark.parametrize("name", ["qwen3", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_it_compiles_as_one_graph_for_each_kind_of_layer(name: str, runners: list[ModelRunner]) -> None:
    plain = make_runner(name)
    runners.append(plain)
    expected = prefill_logits(plain)
    runner = make_runner(name, compile_backend="aot_eager")
    runners.append(runner)
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == len(runner.bound.sites)
    compile_layers(runner)
    found = prefill_logits(runner)
    assert runner.compiled is not None
    assert runner.compiled.compiles == 3 * families.layer_kinds(name)
    assert prefill_logits(runner, (5, 3)).shape == expected.shape
    assert runner.compiled.late_compiles == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
@pytest.mark.parametrize("slots", [(0,), (1, 0)])
def test_decode_goes_by_the_op_too(name: str, slots: tuple[int, ...], runners: list[ModelRunner]) -> None:
    found = []
    for op in (False, True):
        runner = make_runner(name)
        runners.append(runner)
        if op:
            assert use_one_op(runner.bound, CONTEXT, pytest.fail) == 4
        prefill_logits(runner)
        runner.state.table[:, :2] = torch.tensor([[7, 9], [20, 9], [1, 1]])
        runner.steps.stage_decode(slots)
        with torch.inference_mode():
            for _ in range(2):  # the second reads what the first wrote
                runner.steps.run(GraphKey.decode(len(slots), None))
                runner.state.table[1, :2] += 1
        assert runner.steps.logits is not None
        found.append(runner.steps.logits[: len(slots)].clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_nobody_is_left_out_who_listens_to_a_norm(runners: list[ModelRunner]) -> None:
    live: Any = families.build("qwen3")
    runner = make_runner(live=live)
    runners.append(runner)
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == 4
    module: Any = runner.bound.sites[0].module
    seen: list[int] = []
    handle = live.model.layers[0].self_attn.q_norm.register_forward_hook(lambda *_: seen.append(1))
    begin_call(runner)
    own = prefill_logits(runner)
    assert seen
    handle.remove()
    begin_call(runner)
    assert isinstance(module, RotatingAttention)
    seen.clear()
    torch.testing.assert_close(prefill_logits(runner), own, rtol=1e-5, atol=1e-5)
    assert not seen


def test_an_owners_other_attributes_end_it(runners: list[ModelRunner]) -> None:
    live: Any = families.build("llama")
    runner = make_runner(live=live)
    runners.append(runner)
    assert use_one_op(runner.bound, CONTEXT, pytest.fail) == 4
    before = prefill_logits(runner)
    for layer in live.model.layers:
        layer.self_attn.scaling *= 3
    begin_call(runner)
    assert not any(isinstance(site.module, RotatingAttention) for site in runner.bound.sites)
    assert not torch.allclose(prefill_logits(runner), before)
