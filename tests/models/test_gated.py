"""MLPs whose gate and up are one op in prefill, and for which modules that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import families
import pytest
import torch
from runners import free_runner, make_runner, prefill_logits
from torch import Tensor

from hybridgen.execution import ModelRunner
from hybridgen.execution.following import begin_call
from hybridgen.execution.warm_up import compile_layers
from hybridgen.graphs.key import GraphKey
from hybridgen.models import gated
from hybridgen.models.gated import GatedMlp, use_gated_op, use_own_gate
from hybridgen.models.measured import Measured
from hybridgen.models.projections import fuse_projections
from hybridgen.models.twin import Changes

TRIAL = gated._problem
"""The module's own; most tests replace it."""


@pytest.fixture
def runner_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModelRunner]]:
    """Makes runners on models whose projections are joined."""
    build = families.build
    made: list[ModelRunner] = []

    def joined(name: str, **changes: int) -> Any:
        model = build(name, **changes)
        fuse_projections(model)
        return model

    def make(name: str, **options: Any) -> ModelRunner:
        made.append(make_runner(name, **options))
        return made[-1]

    monkeypatch.setattr(families, "build", joined)
    yield make
    for runner in made:
        free_runner(runner)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has the kernel, with the reference in its place."""
    monkeypatch.setattr(gated, "has_kernel", lambda weight: True)
    monkeypatch.setattr(gated, "_problem", lambda *_: None)


@pytest.fixture
def rows_of_op(serving: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the op."""
    found: list[int] = []
    own = gated.gated_rows

    def counted(rows: Tensor, weight: Tensor) -> Tensor:
        found.append(rows.shape[0])
        return own(rows, weight)

    monkeypatch.setattr(gated, "gated_rows", counted)
    return found


def _use(runner: ModelRunner) -> int:
    return use_gated_op(runner.bound, runner.steps.metadata, 4096, pytest.fail).modules


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama", 4),
        ("qwen3", 4),
        ("mistral", 4),
        ("gemma2", 0),  # gates by GELU
        ("phi3", 0),  # has gate and up in one projection of its own
        ("gpt_oss", 0),
    ],
)
def test_which_modules_are_proved(
    name: str, found: int, runner_of: Callable[..., ModelRunner], rows_of_op: list[int]
) -> None:
    runner = runner_of(name)
    own = prefill_logits(runner)
    kinds = [type(module) for module in runner.bound.model.modules()]
    assert _use(runner) == found
    assert sum(isinstance(module, GatedMlp) for module in runner.bound.model.modules()) == found
    rows_of_op.clear()
    torch.testing.assert_close(prefill_logits(runner), own, rtol=1e-5, atol=1e-5)
    assert rows_of_op == [29] * found
    use_own_gate(runner.bound)
    assert [type(module) for module in runner.bound.model.modules()] == kinds
    assert not any(
        "_hybridgen" in vars(module) for module in runner.bound.model.modules() if hasattr(module, "up_proj")
    )


def test_decode_runs_the_modules_own_forward(runner_of: Callable[..., ModelRunner], rows_of_op: list[int]) -> None:
    runner = runner_of("llama")
    assert _use(runner) == 4
    prefill_logits(runner)
    rows_of_op.clear()
    runner.state.table[:, :2] = torch.tensor([[7, 9], [20, 9], [1, 1]])
    runner.steps.stage_decode((1, 0))
    with torch.inference_mode():
        runner.steps.run(GraphKey.decode(2, None))
    assert rows_of_op == []


def test_it_compiles_as_one_graph(runner_of: Callable[..., ModelRunner], serving: None) -> None:
    expected = prefill_logits(runner_of("llama"))
    runner = runner_of("llama", compile_backend="aot_eager")
    assert _use(runner) == 4
    compile_layers(runner)
    torch.testing.assert_close(prefill_logits(runner), expected, rtol=1e-5, atol=1e-5)
    prefill_logits(runner, (5, 3))
    assert runner.compiled is not None
    assert runner.compiled.compiles == 3  # prefill, decode of one row and of several
    assert runner.compiled.late_compiles == 0


@pytest.mark.parametrize("change", [lambda out: out * 1.01, lambda out: out[..., :-1], lambda out: (out, None)])
def test_a_module_that_does_something_else_is_left_alone(
    change: Any, runner_of: Callable[..., ModelRunner], serving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of("llama")
    kind = type(runner.bound.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: change(own(self, x)))
    assert _use(runner) == 0


def test_hooks_keep_a_module_as_it_is(runner_of: Callable[..., ModelRunner], serving: None) -> None:
    runner = runner_of("llama")
    runner.bound.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    assert _use(runner) == 3


def test_who_listens_later_is_called(runner_of: Callable[..., ModelRunner], rows_of_op: list[int]) -> None:
    runner = runner_of("llama")
    begin_call(runner)
    assert _use(runner) == 4
    heard: list[int] = []
    handle = runner.bound.layers[1].mlp.up_proj.register_forward_hook(lambda *_: heard.append(1))
    runner.following.own_hooks = Changes((), (), (runner.bound.layers[1].mlp.up_proj,))
    begin_call(runner)
    prefill_logits(runner)
    assert heard
    handle.remove()
    runner.following.own_hooks = Changes((), (), ())
    begin_call(runner)
    rows_of_op.clear()
    prefill_logits(runner)
    assert rows_of_op == [29] * 4


def test_what_the_trial_finds_wrong_is_counted_once(
    runner_of: Callable[..., ModelRunner], serving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of("llama")
    monkeypatch.setattr(gated, "_problem", TRIAL)
    monkeypatch.setattr(gated, "by_cublas", lambda rows, weight: 1.1 * gated.gated_rows(rows, weight))
    told: list[str] = []
    assert use_gated_op(runner.bound, runner.steps.metadata, 4096, told.append) == (0, ())
    assert len(told) == 1
    assert told[0].startswith("gate and up of prefill are left to cuBLAS: ")
    assert "other ones" in told[0]


def test_what_the_trial_finds_slower_is_a_choice_and_no_fallback(
    runner_of: Callable[..., ModelRunner], serving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of("llama")
    monkeypatch.setattr(gated, "_problem", TRIAL)
    monkeypatch.setattr(gated, "by_cublas", gated.gated_rows)
    monkeypatch.setattr(gated, "event_seconds", lambda call, repeats: [2e-6])
    measured = Measured()
    used = use_gated_op(runner.bound, runner.steps.metadata, 4096, pytest.fail, measured)
    assert used == (0, ("4096 rows take our kernel 2 us, and cuBLAS 2",))
    assert measured.is_new
    # The next start of the cache's entry chooses the same, whatever a clock says then.
    monkeypatch.setattr(gated, "event_seconds", lambda call, repeats: pytest.fail("timed again"))
    again = Measured(measured.known)
    assert use_gated_op(runner.bound, runner.steps.metadata, 4096, pytest.fail, again) == used
    assert not again.is_new
    faster = Measured(dict.fromkeys(again.known, ""))
    assert use_gated_op(runner.bound, runner.steps.metadata, 4096, pytest.fail, faster).modules > 0


def test_an_engine_of_small_prefills_tries_nothing(runner_of: Callable[..., ModelRunner], serving: None) -> None:
    runner = runner_of("llama")
    assert use_gated_op(runner.bound, runner.steps.metadata, gated.LEAST_ROWS - 1, pytest.fail) == (0, ())


def test_a_cpu_has_no_kernel(runner_of: Callable[..., ModelRunner]) -> None:
    assert _use(runner_of("llama")) == 0


def test_a_kernel_that_is_wrong_or_raises_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 16)
    monkeypatch.setattr(gated, "LEAST_ROWS", 3)
    monkeypatch.setattr(gated, "by_cublas", gated.gated_rows)
    monkeypatch.setattr(gated, "event_seconds", lambda call, repeats: [1.0])
    assert "and cuBLAS" in str(gated._problem(weight, 8, Measured()))
    monkeypatch.setattr(gated, "by_cublas", lambda rows, weight: 1.1 * gated.gated_rows(rows, weight))
    assert "other ones" in str(gated._problem(weight, 8, Measured()))
    monkeypatch.setattr(gated, "by_cublas", lambda rows, weight: float("nan") * gated.gated_rows(rows, weight))
    assert "other ones" in str(gated._problem(weight, 8, Measured()))
    monkeypatch.delattr(gated, "by_cublas")
    assert "failed" in str(gated._problem(weight, 8, Measured()))
