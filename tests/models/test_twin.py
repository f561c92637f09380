"""A twin shares the tensors and nothing else, and follows what its owner does."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from typing import Any

import families
import pytest
import torch
from torch import nn

from hybridgen.errors import EngineError
from hybridgen.models.projections import fuse_projections
from hybridgen.models.twin import Twin, twin

IDS = torch.tensor([[5, 6, 7, 8]])


def followed(model: Any) -> Twin[Any]:
    """A twin that knows how the model is now."""
    found = Twin(model)
    found.settle()
    found.follow()
    return found


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_parameters_are_shared_and_modules_are_not(family: str) -> None:
    model = families.build(family).train()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    other = twin(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert [name for name, _ in model.named_modules()] == [name for name, _ in other.named_modules()]
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    for ours, theirs in (
        (dict(model.named_parameters(remove_duplicate=False)), dict(other.named_parameters(remove_duplicate=False))),
        (dict(model.named_buffers(remove_duplicate=False)), dict(other.named_buffers(remove_duplicate=False))),
    ):
        assert ours.keys() == theirs.keys()
        assert all(ours[name] is theirs[name] for name in ours)
    assert other.config is not model.config
    assert not any(module.training for module in other.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_joined_weights_are_shared_too() -> None:
    model = twin(families.build("llama"))
    fuse_projections(model)
    other = twin(model)
    ours, theirs = model.model.layers[0].self_attn.q_proj, other.model.layers[0].self_attn.q_proj
    assert ours.fused_weight is theirs.fused_weight
    assert ours.fused_slots[0] is not theirs.fused_slots[0]
    assert theirs.fused_slots[0] is other.model.layers[0].self_attn.k_proj.fused_slot
    assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


class Holder(nn.Module):
    """Refers to modules in every way that is no child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.again = self.inner
        self.listed = [self.inner, 3]
        self.pair = types.SimpleNamespace
        self.method = self.inner.forward
        self.partial = functools.partial(nn.Module.__call__, self.inner)
        self.weak = weakref.ref(self.inner)
        inner, counts = self.inner, []
        self.counts = counts

        def closure(x: torch.Tensor) -> torch.Tensor:
            counts.append(1)
            return inner(x)

        self.closure = closure
        self.inner.forward = functools.partial(type(self.inner).forward, self.inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.closure(self.method(self.partial(x)))


def test_what_refers_to_a_module_refers_to_the_twins() -> None:
    model = Holder()
    other = twin(model)
    inner = other.inner
    assert inner is not model.inner
    assert other.again is inner
    assert other.listed[0] is inner
    assert other.method.__self__ is inner
    assert other.partial.args == (inner,)
    assert other.weak() is inner
    assert inner.forward.args == (inner,)
    assert other.closure.__closure__ is not None
    assert model.listed[0] is model.inner
    assert model.closure.__closure__[1].cell_contents is model.inner
    x = torch.randn(2, 4)
    assert torch.equal(other(x), model(x))
    assert model.counts == [1, 1]  # what else is closed over is shared


def test_what_torch_compile_returned_is_run_as_the_module_in_it() -> None:
    model = families.build("llama", num_hidden_layers=1)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
        other = twin(model)
        assert type(other.model.layers[0].mlp).__name__ == "LlamaMLP"
        assert torch.equal(other(input_ids=IDS).logits, expected)


def test_training_leaves_nothing_to_follow() -> None:
    model = families.build("qwen3_moe").train()
    found = followed(model)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for _ in range(2):
        model(input_ids=IDS, labels=IDS, output_router_logits=True, output_hidden_states=True).loss.backward()
        torch.optim.AdamW(model.parameters()).step()
        model.zero_grad()
        assert found.follow() == ((), (), ())
    model.eval()
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert found.follow() == ((), (), ())


def replace_data(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data * 2


def replace_parameter(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach() * 2)


def change_setting(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def replace_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2, mlp)


@pytest.mark.parametrize("change", [replace_data, replace_parameter, change_setting, replace_forward])
def test_what_is_followed(change: Any) -> None:
    model = families.build("llama")
    found = followed(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        change(model)
        changes = found.follow()
        assert len(changes.moved) + len(changes.settings) == 1
        expected = model(input_ids=IDS).logits
        assert not torch.equal(before, expected)
        assert torch.equal(found.model(input_ids=IDS).logits, expected)
    assert found.follow() == ((), (), ())


def half(model: Any) -> None:
    model.half()


def other_layer(model: Any) -> None:
    model.model.layers[0] = model.model.layers[1]


def resized(model: Any) -> None:
    model.resize_token_embeddings(300)


def freed(model: Any) -> None:
    model.model.norm.weight.untyped_storage().resize_(0)


def new_parameter(model: Any) -> None:
    model.model.norm.bias = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("change", [half, other_layer, resized, freed, new_parameter])
def test_what_is_refused(change: Any) -> None:
    model = families.build("llama")
    found = followed(model)
    change(model)
    for _ in range(2):
        with pytest.raises(EngineError, match="load a new one"):
            found.follow()


def write_values(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def replace_data_of_a_tensor_that_lives_on(model: Any) -> torch.Tensor:
    before = model.model.norm.weight.data
    model.model.norm.weight.data = before * 2
    return before


def free_all(model: Any) -> None:
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    ("change", "keeps"),
    [
        (lambda model: None, True),
        (write_values, True),
        (replace_parameter, True),  # the old one is still the twin's
        (replace_data_of_a_tensor_that_lives_on, True),
        (change_setting, True),
        (replace_data, False),
        (half, False),
        (free_all, False),
    ],
)
def test_whether_what_was_recorded_may_run_before_a_look(change: Any, keeps: bool) -> None:
    model = families.build("llama")
    found = Twin(model)
    found.settle()
    assert not found.keeps_memory()  # nobody has looked yet
    found.follow()
    for _ in range(2):
        gc.collect()
        assert found.keeps_memory()
    lives_on = change(model)
    gc.collect()
    assert found.keeps_memory() is keeps
    del lives_on


def test_what_was_seen_before_an_error_is_told_after_it() -> None:
    model = families.build("llama")
    found = followed(model)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.clone()
    weight = model.lm_head.weight.data
    model.lm_head.weight.data = weight.half()
    with pytest.raises(EngineError, match=r"lm_head.weight is torch.float16 \[257, 64\] on cpu"):
        found.follow()
    model.lm_head.weight.data = weight
    assert found.follow().moved == ("model.embed_tokens.weight",)


def test_hooks_that_were_taken_out_for_a_while_are_called_again() -> None:
    model = families.build("llama")
    found = followed(model)
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, out: out * 2)
    assert found.follow().hooked == (norm,)
    hooks, norm._forward_hooks = norm._forward_hooks, type(norm._forward_hooks)()
    assert found.follow().hooked == ()
    assert found.follow().hooked == ()
    norm._forward_hooks = hooks  # torch makes no new handle
    assert found.follow().hooked == (norm,)
    with torch.no_grad():
        assert torch.equal(found.model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_hooks_are_called_from_the_next_look_on_and_can_remove_themselves() -> None:
    model = families.build("llama")
    found, calls = followed(model), []

    def once(module: nn.Module, *_: Any) -> None:
        calls.append(module)
        handle.remove()

    handle = model.model.norm.register_forward_hook(once)
    found.model(input_ids=IDS)
    assert not calls
    assert found.follow().hooked == (model.model.norm,)
    found.model(input_ids=IDS)
    found.model(input_ids=IDS)
    assert calls == [found.model.model.norm]
    assert found.follow().hooked == ()
