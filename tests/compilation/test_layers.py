"""The compiled layer: how many graphs, for which calls, and what is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import shared_graphs
import torch
from runners import make_runner

from hybridgen.compilation.layers import check_backend, mark_tokens_dynamic
from hybridgen.errors import ConfigError
from hybridgen.execution import ModelRunner
from hybridgen.execution.plan import PrefillChunk
from hybridgen.execution.warm_up import compile_layers, shown_sizes
from hybridgen.graphs.key import GraphKey
from hybridgen.models.visibility import Visibility
from hybridgen.sampling import SamplerPlan


def make(name: str, **changes: int) -> ModelRunner:
    """Traced by Dynamo, which is all that decides about graphs here; what they are made of is for test_families.py."""
    return make_runner(name, compile_backend="eager", **changes)


def run_prefill(runner: ModelRunner, count: int) -> None:
    runner.steps.stage_prefill([PrefillChunk(0, [5] * count, 0, count, 0, True)], count, 1)
    runner.steps.run(GraphKey.prefill(count, 1, SamplerPlan()))


def test_graphs_do_not_grow_with_depth() -> None:
    """Four layers, below, have as many."""
    shared_graphs.forget()
    runner = make("llama", num_hidden_layers=12)
    compile_layers(runner)
    assert runner.compiled.compiles == 3
    runner.disable_compilation()
    runner.bound.release()


@pytest.mark.parametrize(("max_batch", "budget", "graphs"), [(1, 64, 2), (2, 64, 3), (4, 2, 3)])
def test_the_smallest_settings_compile_too(max_batch: int, budget: int, graphs: int) -> None:
    shared_graphs.forget()
    runner = make("llama", max_batch=max_batch, token_budget=budget)
    compile_layers(runner)
    assert runner.compiled.compiles == graphs
    length = min(budget, 20)
    with torch.compiler.set_stance("fail_on_recompile"), torch.inference_mode():
        for count in range(1, length + 1):
            run_prefill(runner, count)
    assert runner.compiled.late_compiles == 0
    runner.disable_compilation()
    runner.bound.release()


@pytest.mark.parametrize(
    ("device", "max_batch", "budget", "sizes"),
    [
        ("cuda", 256, 8192, (4099, 251)),
        ("cuda", 8, 600, (521, 7)),
        ("cuda", 1, 1, (2, 2)),
        ("cpu", 256, 8192, (7, 3)),
    ],
)
def test_cuda_is_shown_sizes_that_kernels_are_to_be_fast_at(
    device: str, max_batch: int, budget: int, sizes: tuple[int, int]
) -> None:
    runner = SimpleNamespace(device=torch.device(device), max_batch=max_batch, max_tokens=budget)
    assert shown_sizes(cast(ModelRunner, runner)) == sizes


def test_a_cached_graph_for_fewer_tokens_does_not_cut_the_range() -> None:
    """Inductor's cache has the range of what it keeps as a guard, not in its key."""
    for budget in (32, 96):
        runner = make_runner("llama", compile_backend="inductor", token_budget=budget, max_batch=1)
        compile_layers(runner)
        assert runner.compiled.compiles == 2, budget
        assert runner.compiled.strict
        runner.disable_compilation()
        runner.bound.release()


def test_removing_restores_the_layers() -> None:
    runner = make("llama")
    compile_layers(runner)
    layers = runner.bound.layers
    assert all(layer._compiled_call_impl is not None for layer in layers)
    compile_layers(runner)  # as after a check of kept code that failed
    runner.disable_compilation()
    assert all(layer._compiled_call_impl is None for layer in layers)
    runner.disable_compilation()
    runner.bound.release()


def test_an_unknown_backend_is_named() -> None:
    check_backend("inductor")
    with pytest.raises(ConfigError, match="compile_backend='nope'"):
        check_backend("nope")


@pytest.mark.parametrize("how", ["hook", "hook inside", "forward"])
def test_a_layer_with_hooks_or_its_own_forward_stays_eager(how: str) -> None:
    runner = make("llama")
    reasons: list[str] = []
    runner.compiled._fall_back = reasons.append
    layer, calls = runner.bound.layers[1], []
    if how == "hook":
        layer.register_forward_hook(lambda *_: calls.append(1))
    elif how == "hook inside":
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    else:
        original = layer.forward
        layer.forward = lambda *a, **k: calls.append(1) or original(*a, **k)
    compile_layers(runner)
    assert len(calls) == 3
    assert len(reasons) == 1
    assert "hooks or a replaced forward" in reasons[0]
    runner.disable_compilation()
    runner.bound.release()


def test_a_previous_compiled_call_is_put_back() -> None:
    runner = make("llama")
    layer = runner.bound.layers[0]
    layer.compile(backend="eager")
    mine = layer._compiled_call_impl
    compile_layers(runner)
    assert layer._compiled_call_impl is not mine
    runner.disable_compilation()
    assert layer._compiled_call_impl is mine
    runner.bound.release()


def test_beyond_the_recompile_limit_a_layer_runs_eagerly() -> None:
    runner = make("llama")
    reasons: list[str] = []
    runner.compiled._fall_back = reasons.append
    compile_layers(runner)
    binding = runner.bound.sites[0].module._hybridgen

    def run_with_windows() -> None:
        with torch.inference_mode():
            for window in range(1, 12):  # each is a constant of the graph
                binding.sees = Visibility(window=window)
                run_prefill(runner, 4)

    with pytest.warns(RuntimeWarning, match="after warm-up"):
        run_with_windows()
    assert reasons
    assert "recompile limit" in reasons[0]
    runner.disable_compilation()
    runner.bound.release()


def test_only_the_token_dimension_is_marked() -> None:
    hidden, table, scalar = torch.zeros(1, 7, 7), torch.zeros(7, 3), torch.zeros(())
    pair = (torch.zeros(1, 7, 4), {"ids": torch.zeros(7)})
    factor = torch.zeros(1, 1, 7, 1)
    mark_tokens_dynamic([hidden, table, scalar, pair, factor], 7, 64)
    assert hidden._dynamo_dynamic_indices == {1}
    assert pair[0]._dynamo_dynamic_indices == {1}
    assert pair[1]["ids"]._dynamo_dynamic_indices == {0}
    assert factor._dynamo_dynamic_indices == {2}
    assert not hasattr(table, "_dynamo_dynamic_indices")
    assert not hasattr(scalar, "_dynamo_dynamic_indices")
