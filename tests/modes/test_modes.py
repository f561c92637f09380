"""What each mode generates and is called; buckets, padding, and what a step sends."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import shared_graphs
import torch
from mode_cases import (
    KINDS,
    PROMPTS,
    SETTINGS,
    Faulty,
    check_logprobs,
    loaded,
    mixed,
    settle,
    tokens_of,
    use,
)

import hybridgen
from hybridgen import Completion, Engine, SamplingParams
from hybridgen.execution import ring
from hybridgen.execution.staging import StagedBlock
from hybridgen.kernels.step import metadata
from hybridgen.models.attention import Phase


def test_auto_on_a_cpu_is_eager(path: Path) -> None:
    with loaded(path, "auto") as engine:
        engine.generate(PROMPTS[:2], max_new_tokens=3)
        stats = engine.stats()
    assert stats.mode == "eager"
    assert stats.steps == {
        ("prefill", "layers, eager", "mode eager"): 1,
        ("decode", "layers, eager", "mode eager"): 2,
    }
    assert (stats.graphs.graphs, stats.graphs.hits, stats.graphs.misses) == ((), 0, {})


@pytest.mark.parametrize("mode", ["eager", "jit", "graph", "hybrid"])
def test_every_mode_gives_the_same_tokens_and_says_what_it_is(
    path: Path, expected: list[Completion], mode: str
) -> None:
    shared_graphs.forget()
    with loaded(path, mode) as engine:
        outs = engine.generate(PROMPTS, mixed(len(PROMPTS)))
        stats = engine.stats()
    assert tokens_of(outs) == tokens_of(expected)
    check_logprobs(outs, expected)
    assert stats.mode == mode
    assert stats.late_compiles == 0
    assert not stats.fallbacks
    assert (stats.compiled > 0) == (mode in ("jit", "hybrid"))
    assert bool(stats.graphs.graphs) == (mode in ("graph", "hybrid"))
    kinds = {kind for _, kind, _ in stats.steps}
    plain = {"jit": "layers, compiled", "eager": "layers, eager"}
    assert "layers, stand-in" in kinds if mode in ("graph", "hybrid") else kinds == {plain[mode]}
    assert not any("cuda" in kind for kind in kinds)


@pytest.mark.parametrize("mode", ["eager", "jit", "graph", "hybrid"])
@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.norm"])
def test_hooks_are_called_at_every_step(mode: str, where: str) -> None:
    model, calls = families.build("llama"), []
    settings = SETTINGS | {"compile_backend": "eager"}  # hooks are Dynamo's affair, and this takes half as long
    with Engine.load(model, mode="eager", device="cpu", **settings) as engine:
        plain = engine.generate(PROMPTS[0], max_new_tokens=4)
    model.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Engine.load(model, mode=mode, device="cpu", **settings) as engine:
            calls.clear()
            out = engine.generate(PROMPTS[0], max_new_tokens=4)
            stats = engine.stats()
    assert len(calls) == 4
    assert tokens_of([out]) == tokens_of([plain])
    reasons = set(stats.fallbacks)
    assert any("a replay does not call" in reason for reason in reasons) == (mode in ("graph", "hybrid"))
    assert any("it runs eagerly" in reason for reason in reasons) == (mode in ("jit", "hybrid") and "layers" in where)
    assert {str(each.message) for each in caught if each.category is RuntimeWarning} == reasons
    assert not stats.graphs.hits


def test_completions_name_the_stand_in_and_the_bucket(path: Path) -> None:
    with loaded(path) as engine:
        outs = engine.generate(PROMPTS[:3], max_new_tokens=4)  # 46 tokens: above the largest bucket
        for out in outs:
            found = {(step.phase, step.kind, step.reason): step.count for step in out.steps}
            assert found == {
                ("prefill", "layers, eager", "above the largest bucket, 32"): 1,
                ("decode", "layers, stand-in", "padded to bucket 4"): 3,
            }
        (out,) = engine.generate(PROMPTS[2:3], max_new_tokens=4)
        found = {(step.phase, step.kind, step.reason): step.count for step in out.steps}
        assert found == {
            ("prefill", "layers, stand-in", "padded to bucket 4"): 1,
            ("decode", "layers, stand-in", "bucket 1"): 3,
        }
        stats = engine.stats().graphs
        assert (stats.hits, stats.padded_hits, stats.lazy_captures, stats.evictions) == (7, 4, 0, 0)
        assert stats.misses == {"above the largest bucket, 32": 1}
        values = json.loads(json.dumps(engine.stats().as_dict()))["graphs"]
        assert values["misses"] == stats.misses
        rates = {phase: counts["hit_rate"] for phase, counts in values["phases"].items()}
        assert rates == {"prefill": 1 / 2, "decode": 1.0}
        assert stats.hit_rate == 7 / 8
        assert {row.owner for row in stats.graphs} == {"stand-in"}


@pytest.mark.parametrize("graphs", ["trees", "both"])
def test_trees_need_cuda(path: Path, graphs: str) -> None:
    settings = SETTINGS | {"compile_backend": "inductor", "device": "cpu", "graphs": graphs}
    with pytest.raises(hybridgen.DeviceError, match=f'graphs="{graphs}" needs CUDA'):
        Engine.load(path, mode="hybrid", **settings)
    with Engine.load(path, mode="auto", **settings) as engine:
        assert engine.stats().mode == "eager"


@pytest.mark.parametrize(
    ("fields", "most"), [({}, 48), ({"max_context": 40}, 48), ({"max_context": 40, "max_batch": 1}, 40)]
)
def test_prefill_buckets_above_what_a_call_takes(path: Path, fields: dict[str, Any], most: int) -> None:
    settings = SETTINGS | fields
    with pytest.raises(hybridgen.ConfigError, match=f"prefill_buckets holds {most + 1}, above the {most} tokens"):
        Engine.load(path, mode="graph", prefill_buckets=[4, most + 1], **settings)
    with Engine.load(path, mode="graph", prefill_buckets=[most], decode_buckets=[], **settings) as engine:
        assert {row.tokens for row in engine.stats().graphs.graphs} == {most}


def test_large_prefill_buckets_give_the_same_tokens(path: Path) -> None:
    """Many prompts a call, those that are cut at its end, pages that are shared, and padding longer than a context."""
    prompts = families.prompts_of([60] * 15 + [3])
    prompts.append([*prompts[0][:40], 7, 9, 11])
    fields: dict[str, Any] = {"token_budget": 800, "max_context": 80, "decode_buckets": ()}
    wanted = mixed(len(prompts), 4)
    with loaded(path, "eager", **fields) as engine:
        expected = [tokens_of(engine.generate(prompts, wanted)) for _ in range(2)]
    with loaded(path, prefill_buckets=(8, 800), **fields) as engine:
        assert [tokens_of(engine.generate(prompts, wanted)) for _ in range(2)] == expected
        stats = engine.stats()
        large = next(row for row in stats.graphs.graphs if row.tokens == 800)
        assert (large.sampling, large.rows) == ("outside", 17)
        assert large.hits >= 2
        reasons = {reason for phase, _, reason in stats.steps if phase == "prefill"}
    assert {"bucket 800, sampler outside", "padded to bucket 800, sampler outside"} <= reasons


@pytest.mark.parametrize(
    ("decode", "prefill"), [((), ()), ((), (16,)), ((3,), ()), ((17,), (48,)), ((1, 17), (1,)), (None, None)]
)
def test_a_users_buckets(path: Path, expected: list[Completion], decode: Any, prefill: Any) -> None:
    with loaded(path, decode_buckets=decode, prefill_buckets=prefill) as engine:
        settings = engine._runner.graphs.settings
        assert settings.decode == ((1, 2, 4, 8, 16, 17) if decode is None else decode)
        assert settings.prefill == ((16, 32, 48) if prefill is None else prefill)
        outs = engine.generate(PROMPTS, mixed(len(PROMPTS)))
        phases = {row.phase for row in engine.stats().graphs.graphs}
    assert tokens_of(outs) == tokens_of(expected)
    assert phases == {phase for phase, sizes in (("decode", decode), ("prefill", prefill)) if sizes != ()}


def test_fewer_graphs_than_buckets(path: Path, expected: list[Completion]) -> None:
    with loaded(path, max_graphs=3) as engine:
        assert len(engine.stats().graphs.graphs) == 3
        for _ in range(3):
            assert tokens_of(engine.generate(PROMPTS, mixed(len(PROMPTS)))) == tokens_of(expected)
        stats = engine.stats().graphs
    assert len(stats.graphs) == 3
    assert stats.evictions == stats.lazy_captures > 0


# ------------------------------------------------------------------ prefill


@pytest.mark.parametrize("lazily", [False, True])
def test_prompts_of_every_length(path: Path, lazily: bool) -> None:
    """Alone, and several in a call; those above the budget of 48 end in a chunk of any size."""
    prompts = families.prompts_of(tuple(range(1, 70)), seed=3)
    params = [SamplingParams(max_new_tokens=2, seed=i, **KINDS[i % 6]) for i in range(len(prompts))]
    with loaded(path, "eager") as engine:
        expected = tokens_of(engine.generate(prompts, params))
    fields = {"capture_at_start": False, "capture_after": 1} if lazily else {}
    with loaded(path, **fields) as engine:
        for _ in range(2):
            alone = [engine.generate(prompt, one).token_ids for prompt, one in zip(prompts, params, strict=True)]
            assert alone == expected
            if lazily:
                settle(engine)
        for _ in range(2):
            assert tokens_of(engine.generate(prompts, params)) == expected
            for start, count in ((0, 5), (1, 3), (3, 4), (2, 8)):  # short ones, several of which fit a bucket
                part = slice(start, start + count)
                assert tokens_of(engine.generate(prompts[part], params[part])) == expected[part]
            settle(engine)
        stats = engine.stats()
    buckets = {reason for phase, kind, reason in stats.steps if (phase, kind) == ("prefill", "layers, stand-in")}
    assert {f"bucket {size}" for size in (4, 8, 16, 32)} <= {reason.split(",")[0] for reason in buckets}
    assert {f"padded to bucket {size}" for size in (4, 8, 16, 32)} <= {reason.split(",")[0] for reason in buckets}
    if lazily:
        assert {row.rows for row in stats.graphs.graphs if row.phase == "prefill"} >= {1, 4, 8}
    assert not stats.fallbacks


# ------------------------------------------------------------------ padding


def poison(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Phase]:
    """Before each step, garbage wherever only padding or nobody may read.

    What protects: a step's first node resets the padding slot and overwrites the inputs up to its size; padding rows
    read the position that they have just written to the dummy page; whatever is staged is staged up to the bucket.
    """
    runner = engine._runner
    steps, launch = runner.steps, runner._launch
    poisoned: list[Phase] = []
    far = 2**31 - 5  # in every integer type, and far out of every range

    def poisoned_launch(route: Any, *args: Any) -> Any:
        key = route.key
        decodes = key.phase is Phase.DECODE
        with torch.inference_mode():
            runner.state.table[:, -1] = far * 100
            for state in runner.states:
                for pages in state.pages:
                    pages[0] = torch.nan
            for field in (*steps._decode.values(), *steps._prefill.values()):
                field.fill_(far)
            for block, used in ((steps._decode_block, decodes), (steps._prefill_block, not decodes)):
                for arrays in block._arrays:
                    for array in arrays.values():
                        array[:] = far
                for name, field in block.device.items():
                    if name == "starts":
                        continue  # read whole: its end is repeated
                    size = key.tokens if name in ("slots", "ids", "positions", "rope") else key.rows
                    if used:
                        field[size:] = far
            steps.logits.fill_(torch.nan)
            if runner.sampler.output_counts is not None:
                runner.sampler.output_counts[-1] = far
                runner.sampler.prompt_seen[-1] = True
        poisoned.append(key.phase)
        return launch(route, *args)

    monkeypatch.setattr(runner, "_launch", poisoned_launch)
    return poisoned


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("graph", {}),
        ("graph", {"validate": True}),
        ("graph", {"sample_in_graph": False}),
        ("graph", {"double_buffer": False, "metadata_copy": False}),
        ("hybrid", {}),
    ],
    ids=str,
)
def test_garbage_where_only_padding_may_read(
    path: Path, expected: list[Completion], mode: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(path, mode, decode_buckets=(2, 16), prefill_buckets=(16, 32), capture_after=1, **fields) as engine:
        poisoned = poison(engine, monkeypatch)
        for part in (slice(0, 8), slice(0, 3), slice(4, 5), slice(0, 8)):
            outs = engine.generate(PROMPTS[part], mixed(8)[part])
            assert tokens_of(outs) == tokens_of(expected[part])
            check_logprobs(outs, expected[part])
            settle(engine)
        stats = engine.stats()
    assert set(poisoned) == set(Phase)
    assert stats.graphs.padded_hits > 30
    assert not stats.fallbacks


def test_padding_rows_leave_the_padding_slot_alone(path: Path) -> None:
    with loaded(path) as engine:
        engine.generate(PROMPTS[:3], max_new_tokens=9)
        table = engine._runner.state.table
        assert table[:, -1].tolist() == [0, 0, 0]
        assert engine._runner.state.block_table.tensor[-1].unique().tolist() == [0]


# ------------------------------------------------------------------ times


@pytest.mark.parametrize(("seconds", "padded"), [(0.9, True), (1.1, False)])
def test_measured_times_decide_about_padding(
    path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, padded: bool
) -> None:
    use(monkeypatch, Faulty(seconds=lambda key: seconds))
    with loaded(path, decode_buckets=(8,), max_padding_ratio=None, lazy_capture=False) as engine:
        outs = engine.generate(PROMPTS[:3], max_new_tokens=5)
        reasons = {step.reason for out in outs for step in out.steps if step.phase == "decode"}
        stats = engine.stats().graphs
    if padded:
        assert reasons == {"padded to bucket 8"}
        assert stats.padded_hits == 4
    else:
        assert reasons == {"without a graph is faster (measured) than padded to bucket 8"}
        assert stats.misses["without a graph is faster (measured) than padded to bucket 8"] == 4


# ------------------------------------------------------------------ what a step sends


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_steady_batch_sends_nothing(path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(path, mode) as engine:
        streams = [engine.stream(prompt, max_new_tokens=80) for prompt in PROMPTS[:3]]
        for stream in streams:
            next(stream)
        loop, runner = engine._loop, engine._runner
        for _ in range(3):
            loop.step()
        sent: list[int] = []
        order: list[str] = []
        send, copy, forward, advance = StagedBlock.send, metadata.reference, runner.bound.forward, ring.advance
        monkeypatch.setattr(StagedBlock, "send", lambda block: sent.append(1) or send(block))
        monkeypatch.setattr(runner.router, "route", lambda key: pytest.fail("looked up"))
        monkeypatch.setattr(metadata, "reference", lambda *args: order.append("copy") or copy(*args))
        monkeypatch.setattr(runner.bound, "forward", lambda *args: order.append("forward") or forward(*args))
        monkeypatch.setattr(ring, "advance", lambda *args: order.append("advance") or advance(*args))
        steps = sum(engine.stats().steps.values())
        for _ in range(50):
            loop.step()
        assert sum(engine.stats().steps.values()) == steps + 50
        assert sent == []
        assert order == ["copy", "forward", "advance"] * 50
        monkeypatch.undo()
        for stream in streams:
            stream.close()
