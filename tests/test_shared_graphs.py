"""What engines of tests hand on to each other: only what fits, and nothing of the engine that it is from."""

from __future__ import annotations

from typing import Any

import pytest
import shared_graphs
import torch
from runners import free_runner, make_runner

from hybridgen.execution import ModelRunner
from hybridgen.execution.plan import PrefillChunk
from hybridgen.execution.warm_up import compile_layers
from hybridgen.graphs.key import GraphKey


def make(**changes: Any) -> ModelRunner:
    runner = make_runner(compile_backend="eager", **{"num_hidden_layers": 1} | changes)
    compile_layers(runner)
    return runner


def logits(runner: ModelRunner) -> torch.Tensor:
    runner.steps.keep_logits()
    with torch.inference_mode():
        runner.steps.stage_prefill([PrefillChunk(0, [5, 6, 7], 0, 3, 0, True)], 3, 1)
        runner.steps.run(GraphKey.prefill(3, 1, None))
    return runner.steps.logits[:1].clone()


def test_an_engine_of_the_same_kind_takes_them_and_has_weights_of_its_own() -> None:
    shared_graphs.forget()
    first = make()
    assert first.compiled.compiles == 3
    while_it_is_open = make()
    assert while_it_is_open.compiled.compiles == 3
    found = logits(first)
    for runner in (first, while_it_is_open):
        free_runner(runner)
    second = make()
    assert second.compiled.compiles == 0
    torch.testing.assert_close(logits(second), found)
    with torch.no_grad():
        second.bound.layers[0].mlp.down_proj.weight.mul_(2)
    changed = logits(second)
    assert not torch.allclose(changed, found)
    assert second.compiled.late_compiles == 0
    second.disable_compilation()
    torch.testing.assert_close(logits(second), changed)
    free_runner(second)


@pytest.mark.parametrize("changes", [{"max_batch": 9}, {"token_budget": 96}, {"intermediate_size": 48}])
def test_another_kind_compiles_its_own(changes: dict[str, int]) -> None:
    shared_graphs.forget()
    free_runner(make())
    runner = make(**changes)
    assert runner.compiled.compiles == 3
    free_runner(runner)


def test_a_lower_budget_takes_what_there_is() -> None:
    shared_graphs.forget()
    free_runner(make())
    runner = make(token_budget=32)
    assert runner.compiled.compiles == 0
    free_runner(runner)


def test_another_depth_takes_what_there_is() -> None:
    shared_graphs.forget()
    free_runner(make())
    runner = make(num_hidden_layers=2)
    assert runner.compiled.compiles == 0
    free_runner(runner)


def test_what_computes_something_else_with_the_same_sizes_compiles_its_own() -> None:
    shared_graphs.forget()
    free_runner(make())
    runner = make(hidden_act="gelu")
    assert runner.compiled.compiles == 3
    free_runner(runner)


def test_what_was_compiled_late_is_not_handed_on() -> None:
    shared_graphs.forget()
    runner = make()
    runner.compiled.late_compiles = 1
    free_runner(runner)
    runner = make()
    assert runner.compiled.compiles == 3
    free_runner(runner)
