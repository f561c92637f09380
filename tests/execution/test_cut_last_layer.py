"""Long prefills, whose last layer goes on from its keys and values with the prompts' last tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from runners import free_runner, make_runner
from torch.profiler import ProfilerActivity, profile

from hybridgen.compilation import layers
from hybridgen.engine.warm_start import Starter, Startup
from hybridgen.execution import ModelRunner, warm_up
from hybridgen.execution.executors import Cuts
from hybridgen.execution.plan import Admission, PrefillChunk
from hybridgen.execution.warm_up import compile_layers, cut_last_layer
from hybridgen.graphs.key import GraphKey
from hybridgen.models.binding import key_value_pages
from hybridgen.params import SamplingParams
from hybridgen.sampling import resolve
from hybridgen.telemetry.statistics import Counters

ALL = Cuts(1, 1)
BUDGET = 1100
LENGTHS = (23, 1, 40, 17)
"""Of prompts, of which the last does not end."""


def make(name: str = "llama", backend: str = "aot_eager", **more: Any) -> ModelRunner:
    """With `aot_eager` what nothing needs is left out; other tests are content with graphs of Dynamo."""
    runner = make_runner(name, max_batch=5, token_budget=BUDGET, pages=20, compile_backend=backend, **more)
    compile_layers(runner)
    return runner


@pytest.fixture(scope="module")
def runner() -> Iterator[ModelRunner]:
    runner = make()
    assert cut_last_layer(runner) is None
    yield runner
    free_runner(runner)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def prefill(runner: ModelRunner, cuts: Cuts | None, *, padding: int = 0, rows: int = 3) -> torch.Tensor:
    """Logits of three prompts that end in a call with one that does not."""
    prompts = families.prompts_of(LENGTHS)
    params = resolve(SamplingParams(temperature=0.0), None, (), families.VOCAB)
    admissions = [Admission(i, [3 * i + 1, 3 * i + 2, 3 * i + 3], params, ids) for i, ids in enumerate(prompts)]
    runner.admit(*admissions)
    chunks = [PrefillChunk(i, ids, 0, len(ids), 0, i < 3) for i, ids in enumerate(prompts)]
    for pages in key_value_pages(runner.states):
        pages.keys.zero_(), pages.values.zero_()
    runner.steps.keep_logits()
    runner.steps.logits.fill_(torch.nan)
    runner.layers.cuts = cuts
    key = GraphKey.prefill(sum(LENGTHS) + padding, rows, None)
    runner.steps.stage_prefill(chunks, key.tokens, key.rows)
    runner.steps.run(key)
    runner.layers.cuts = Cuts()
    return runner.steps.logits[:3].clone()


def test_the_start_tries_it(runner: ModelRunner) -> None:
    assert runner.layers.cuts == Cuts()
    assert runner.compiled.compiles == 4
    assert runner.compiled.late_compiles == 0


@pytest.mark.parametrize(("padding", "rows"), [(0, 3), (30, 5)])
def test_logits_and_cache_are_those_of_whole_layers(runner: ModelRunner, padding: int, rows: int) -> None:
    whole = prefill(runner, None, padding=padding, rows=rows)
    cache = [[part[1:].clone() for part in pages] for pages in key_value_pages(runner.states)]
    cut = prefill(runner, ALL, padding=padding, rows=rows)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)
    for before, pages in zip(cache, key_value_pages(runner.states), strict=True):
        for one, other in zip(before, pages, strict=True):
            torch.testing.assert_close(other[1:], one, rtol=1e-4, atol=1e-4)
    assert runner.compiled.late_compiles == 0


def test_a_call_in_which_no_prompt_ends_writes_its_keys(runner: ModelRunner) -> None:
    ids = families.prompts_of((40,))[0]
    found = []
    for cuts in (None, ALL):
        runner.layers.cuts = cuts
        key_value_pages(runner.states)[-1].keys.zero_()
        runner.steps.stage_prefill([PrefillChunk(0, ids, 0, 60, 0, False)], 40, 0)
        runner.steps.run(GraphKey.prefill(40, 0, None))
        found.append(key_value_pages(runner.states)[-1].keys[1:].clone())
    runner.layers.cuts = Cuts()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert found[0].any()


def test_the_last_layer_computes_less(runner: ModelRunner) -> None:
    counted = []
    for cuts in (None, ALL):
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
            prefill(runner, cuts)
        counted.append(sum(event.flops for event in profiled.events() if event.name == "aten::mm"))
    # 4 layers; of the last, q, k and v stay.
    assert counted[1] < 0.85 * counted[0]


def test_short_calls_and_those_of_many_ends_run_whole(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    cuts = type(runner.layers)._cuts
    monkeypatch.setattr(type(runner.layers), "_cuts", lambda *args: seen.append(cuts(*args)) or seen[-1])
    for limits in (Cuts(82, 1), Cuts(81, 1), Cuts(1, 28), Cuts(1, 27)):
        prefill(runner, limits)
    assert seen == [False, True, False, True]


def test_who_listens_sees_all_tokens(runner: ModelRunner) -> None:
    sizes: list[int] = []
    norm = runner.bound.final_norm
    hook = norm.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[1]))
    prefill(runner, ALL)
    hook.remove()
    prefill(runner, ALL)
    assert sizes == [sum(LENGTHS)]
    last = runner.bound.layers[-1]
    hook = last.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[1]))
    runner.compiled.route()
    prefill(runner, ALL)
    hook.remove()
    runner.compiled.route()
    assert sizes == [sum(LENGTHS)] * 2


def test_scores_and_hidden_states_are_of_all_tokens(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "taken", lambda *args: pytest.fail("the last layer was cut"))
    runner.layers.cuts = ALL
    ids = families.prompts_of((20,))[0]
    runner.steps.keep_logits()
    runner.steps.stage_prefill([PrefillChunk(0, ids, 0, 20, 0, True)], 20, 1)
    runner.steps.run_told(GraphKey.prefill(20, 1, None), None)
    runner.layers.cuts = Cuts()


def test_a_layer_that_comes_out_otherwise_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make(backend="eager", num_hidden_layers=2)
    taken = layers.taken

    def wrong(values: Any, places: torch.Tensor, tokens: int) -> Any:
        return taken(values, places - (places > 0).to(places.dtype), tokens)

    monkeypatch.setattr(layers, "taken", wrong)
    why = cut_last_layer(runner)
    assert "logits that differ" in str(why)
    assert runner.layers.cuts is None
    monkeypatch.setattr(layers, "taken", lambda *args: 1 / 0)
    counters = Counters()
    starter = Starter(SimpleNamespace(notes=[]), Startup(0.0, 0.0), counters)
    with pytest.warns(RuntimeWarning, match="for all tokens: ZeroDivisionError"):
        starter.compile(runner, cuts=True)
    assert sum(counters.fallbacks.values()) == 1
    assert runner.layers.cuts is None
    monkeypatch.setattr(layers, "taken", taken)
    with torch.no_grad():
        runner.bound.model.lm_head.weight.fill_(torch.nan)
    assert "not finite" in str(cut_last_layer(runner))
    free_runner(runner)


@pytest.mark.parametrize("name", ["lfm2", "deepseek_v2"])
def test_models_that_keep_something_else_run_whole(name: str) -> None:
    runner = make_runner(name, max_batch=2, token_budget=BUDGET, compile_backend="eager")
    assert not runner.bound.can_end
    assert cut_last_layer(runner) is not None
    assert runner.layers.cuts is None
    free_runner(runner)


@pytest.mark.parametrize(
    "name", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma2"))]
)
def test_other_kinds_of_layers(name: str) -> None:
    runner = make(name, "eager", **(families.ALIKE if name == "gpt_oss" else {}))
    assert cut_last_layer(runner) is None
    whole = prefill(runner, None)
    torch.testing.assert_close(prefill(runner, ALL), whole, rtol=1e-3, atol=1e-3)
    assert runner.compiled.late_compiles == 0
    free_runner(runner)


def test_an_engine_for_short_prompts_does_not_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up.numerics, "compare_cut", lambda runner: pytest.fail("tried"))
    runner = make_runner("llama", token_budget=64, compile_backend="eager", num_hidden_layers=2)
    compile_layers(runner)
    assert cut_last_layer(runner) is not None
    free_runner(runner)
