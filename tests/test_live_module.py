"""A live module stays its owner's while engines have it, and each call sees what the owner made of it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

import hybridgen
from hybridgen.engine import Engine
from hybridgen.errors import UnsupportedModelError
from hybridgen.fused import reference
from hybridgen.models.decoder import describe

PROMPTS = families.prompts_of((3, 9))
MODES = ("eager", "jit", "graph", "hybrid")
RECORDING = ("graph", "hybrid")
SETTINGS: dict[str, Any] = {"max_batch": 2, "max_context": 32, "kv_memory": "4MiB", "device": "cpu", "run_ahead": 1}
"""As on CUDA: a call that is alone looks at the module once its first step is launched."""


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(**changes: Any) -> Any:
    return families.build("llama", num_hidden_layers=2, **changes)


def load(model: Any, mode: str, **fields: Any) -> Engine:
    return Engine.load(model, mode=mode, **SETTINGS | {"compile_backend": "eager"} | fields)


def tokens(engine: Engine, **fields: Any) -> list[list[int]]:
    sampling = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True} | fields
    return [list(out.token_ids) for out in engine.generate(PROMPTS, **sampling)]


def expected(model: Any) -> list[list[int]]:
    """What transformers generates."""
    return [tokens for tokens, _ in families.references(model, PROMPTS, 6)]


def everything(model: Any) -> dict[str, Any]:
    """Each attribute of each module, containers as they are inside, and the config."""
    found: dict[str, Any] = {"config": repr(vars(model.config))}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            inside = list(value.items()) if isinstance(value, dict) else value
            found[f"{name}.{attribute}"] = (type(module), inside)
    return found


def recorded(engine: Engine) -> int:
    return engine.stats().graphs.hits


def test_nothing_of_the_module_is_changed(mode: str) -> None:
    model = families.build("gemma2", num_hidden_layers=2).train()
    model.model.layers[1].eval()
    model.model.layers[0].compile(backend="eager")
    before = everything(model)
    with load(model, mode) as engine:
        assert everything(model) == before
        tokens(engine)
        assert everything(model) == before
    assert everything(model) == before


def test_the_owner_works_with_it_while_an_engine_lives(mode: str, tmp_path: Path) -> None:
    ids = torch.tensor(PROMPTS[1:])
    model, other = build().train(), build().train()
    for each in (model, other):
        each.gradient_checkpointing_enable()
    with load(model, mode) as engine:
        found = tokens(engine)
        for each in (model, other):
            each(input_ids=ids, labels=ids).loss.backward()
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs)
        assert found == tokens(engine) == expected(copy.deepcopy(model).eval())
        model.save_pretrained(tmp_path)
        assert expected(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")) == found
        assert expected(model.eval()) == found
        calls: list[int] = []
        handle = model.model.norm.register_full_backward_hook(lambda *_: calls.append(1))
        assert tokens(engine) == found
        model(input_ids=ids, labels=ids).loss.backward()
        assert calls == [1]
        handle.remove()
        assert not engine.stats().fallbacks


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(-2, 2, 64))


def through_data(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(-3)


def loaded_state(model: Any) -> None:
    model.load_state_dict({name: tensor.flip(0) for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("edit", [in_place, through_data, loaded_state])
def test_weights_that_are_written_are_seen_by_the_next_call(mode: str, edit: Any) -> None:
    model = build()
    with load(model, mode) as engine:
        before = tokens(engine)
        edit(model)
        after = tokens(engine)
        assert after == expected(model) != before
        stats = engine.stats()
        assert not stats.fallbacks
        assert stats.late_compiles == 0


def other_data(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data * torch.linspace(-2, 2, 64)


def other_parameter(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))


def moved_there_and_back(model: Any) -> None:
    model.double().float()
    model.model.norm.weight.data.mul_(torch.linspace(-2, 2, 64))


@pytest.mark.parametrize("edit", [other_data, other_parameter, moved_there_and_back])
def test_tensors_that_are_replaced_are_seen_and_recorded_anew(mode: str, edit: Any) -> None:
    model = build()
    with warnings.catch_warnings(record=True), load(model, mode) as engine:
        before = tokens(engine)
        edit(model)
        for _ in range(3):
            assert tokens(engine) == expected(model) != before
        hits = recorded(engine)
        stats = engine.stats()
        counted = {"the model's tensors lie elsewhere; what was recorded is dropped and recorded again": 1}
        assert stats.fallbacks == (counted if mode in RECORDING else {})
        tokens(engine)
        assert (recorded(engine) > hits) == (mode in RECORDING)
        assert stats.late_compiles == 0


def test_without_lazy_capture_it_is_recorded_at_once() -> None:
    model = build()
    with warnings.catch_warnings(record=True), load(model, "graph", lazy_capture=False) as engine:
        graphs = {(row.phase, row.tokens, row.rows, row.sampling) for row in engine.stats().graphs.graphs}
        handle = model.model.norm.register_forward_hook(lambda *_: None)
        other_data(model)
        assert tokens(engine) == expected(model)
        assert not engine.stats().graphs.graphs
        handle.remove()
        assert tokens(engine) == expected(model)
        assert {(row.phase, row.tokens, row.rows, row.sampling) for row in engine.stats().graphs.graphs} == graphs


def test_another_kind_of_tensor_is_refused_until_it_is_put_back(mode: str) -> None:
    model = build()
    with load(model, mode) as engine:
        before = tokens(engine)
        model.lm_head.half()
        for _ in range(2):
            with pytest.raises(hybridgen.EngineError, match=r"lm_head.weight is torch.float16 \[257, 64\] on cpu now"):
                tokens(engine)
        model.lm_head.float()
        with warnings.catch_warnings(record=True):
            assert tokens(engine) == expected(model)
        assert before


@pytest.mark.parametrize(
    ("where", "early"),
    [("model.layers.1", True), ("model.layers.1.mlp.up_proj", False), ("model.norm", True), ("", False)],
)
def test_steering_by_a_hook(mode: str, where: str, early: bool) -> None:
    """A replaced output counts from the next call on; without the hook, steps run as they did."""
    model = build()
    plain = expected(model)
    seen: list[Any] = []

    def steer(module: Any, args: Any, output: Any) -> Any:
        seen.append(module)
        if where:
            return output * torch.linspace(-2, 2, output.shape[-1])
        output.logits = output.logits.flip(-1)
        return output

    def register() -> Any:
        return model.get_submodule(where).register_forward_hook(steer)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = register() if early else None
        with load(model, mode) as engine:
            assert not seen
            if handle is None:
                assert tokens(engine) == plain
                handle = register()
            for _ in range(2):
                steered = tokens(engine)
                kinds = {type(module) for module in seen}
                assert kinds == {type(model.get_submodule(where))}
                assert model.get_submodule(where) not in seen
                assert steered == expected(model) != plain
                seen.clear()
            assert recorded(engine) == 0 or not early
            before = recorded(engine)
            handle.remove()
            assert tokens(engine) == plain
            stats = engine.stats()
            assert (recorded(engine) > before) == (mode in RECORDING)
            assert not seen
            assert stats.late_compiles == 0
    reasons = []
    if mode in RECORDING:
        reasons.append(f"a {type(model.get_submodule(where)).__name__} has hooks, which a replay does not call")
    if mode in ("jit", "hybrid") and "layers" in where:
        reasons.append("a LlamaDecoderLayer has hooks or a replaced forward; it runs eagerly")
    assert len(stats.fallbacks) == len(reasons)
    assert all(any(found.startswith(reason) for found in stats.fallbacks) for reason in reasons)
    assert set(stats.fallbacks.values()) <= {1}
    told = [str(each.message) for each in caught if each.category is RuntimeWarning]
    assert sorted(told) == sorted(stats.fallbacks)


def test_a_pre_hook_and_a_hook_on_all_modules(mode: str) -> None:
    model = build()
    plain = expected(model)
    with warnings.catch_warnings(record=True), load(model, mode) as engine:
        tokens(engine)
        layer = model.model.layers[1]
        with_kwargs = layer.register_forward_pre_hook(lambda m, a, k: ((a[0] * -1, *a[1:]), k), with_kwargs=True)
        assert tokens(engine) == expected(model) != plain
        with_kwargs.remove()

        def scale(module: Any, args: Any, output: Any) -> Any:
            return output * -2 if isinstance(module, torch.nn.Linear) and output.shape[-1] == 96 else None

        everywhere = torch.nn.modules.module.register_module_forward_hook(scale)
        try:
            assert tokens(engine) == expected(model) != plain
        finally:
            everywhere.remove()
        assert tokens(engine) == plain
        assert engine.stats().late_compiles == 0


def test_a_replaced_forward(mode: str) -> None:
    model = build()
    plain = expected(model)
    mlp = model.model.layers[1].mlp
    with warnings.catch_warnings(record=True), load(model, mode) as engine:
        assert tokens(engine) == plain
        original = mlp.forward
        mlp.forward = lambda x: original(x) * -2
        for _ in range(2):
            assert tokens(engine) == expected(model) != plain
        del mlp.forward
        for _ in range(2):
            assert tokens(engine) == plain


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("lfm2", "model.layers.0.conv"),
        ("mamba2", "backbone.layers.0.mixer"),
        ("llama4_text", "model.layers.0.self_attn"),
    ],
)
def test_a_replaced_forward_of_what_runs_with_the_engines_states_is_refused(family: str, place: str) -> None:
    """Its own would number tokens by the call, or keep states where no request looks."""
    model = families.build(family, **({"attn_temperature_tuning": True} if family == "llama4_text" else {}))
    module = model.get_submodule(place)
    original = module.forward
    with load(model, "eager") as engine:
        plain = tokens(engine)
        module.forward = lambda *args, **kwargs: original(*args, **kwargs)
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match=rf"{place} was replaced"):
                tokens(engine)
        with pytest.raises(UnsupportedModelError, match=rf"{place} was replaced"):
            load(model, "eager")
        del module.forward
        assert tokens(engine) == plain


def test_two_engines_share_one_module_and_its_weights() -> None:
    model = build()
    engines = [load(model, mode) for mode in ("eager", "hybrid")]
    try:
        assert all(tokens(engine) == expected(model) for engine in engines)
        in_place(model)
        engines.pop().close()
        assert all(tokens(engine) == expected(model) for engine in engines)
    finally:
        for engine in engines:
            engine.close()


def test_no_weight_is_copied(mode: str) -> None:
    """All tensors of the twin lie where the owner's do, and what a weight is as large as exists once."""
    model = build(hidden_size=72)  # a size that nothing else has
    with load(model, mode) as engine:
        tokens(engine)
        places = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        bound = engine._runner.bound.model  # type: ignore[union-attr]
        found = [value for module in bound.modules() for value in vars(module).values()]
        tensors = [value for value in found if isinstance(value, torch.Tensor)]
        tensors += [*bound.parameters(), *bound.buffers()]
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == places


def test_a_window_of_long_prompts_and_a_dynamic_rope_that_the_owner_uses_too() -> None:
    """The owner's rotary module rewrites its buffers; the engine has one of its own."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build(max_position_embeddings=16, rope_parameters=rope)
    with load(model, "graph") as engine:
        before = tokens(engine)
        long = torch.tensor(families.prompts_of((24,)))
        with torch.no_grad():
            model(input_ids=long)
        assert tokens(engine) == before == expected(model)
        assert not engine.stats().fallbacks


def test_fused_kernels_that_are_made_anew_are_checked_against_layers_that_are_not_compiled() -> None:
    """The check listens to each layer; compiled layers call none of its hooks, and a model would seem to have none."""
    model = families.build("phi3", num_hidden_layers=2)
    checked: list[str] = []

    def check() -> None:
        bound = runner.bound
        with bound.original_attention(), torch.inference_mode():
            reference.check(bound.model, describe(bound.model, bound.sites, bound.weights, SETTINGS["max_context"]))
        checked.append("the same")

    with load(model, "jit") as engine:
        runner = engine._runner
        before = tokens(engine)
        runner.use_fused(Fused())
        runner.following.fuse_again = check
        with torch.no_grad():
            other_data(model)
        with pytest.warns(RuntimeWarning, match="the fused kernels are made anew"):
            after = tokens(engine)
        assert checked == ["the same"]
        assert after == expected(model)
        assert engine.stats().late_compiles == 0
    assert before != after


class Fused:
    """What a runner asks of fused kernels, with none."""

    chain = rows = None
    executors = ()
    equal_bits = False

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass
