"""Fewer graphs than sizes: which one goes, and batches that grow and shrink meanwhile."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from mode_cases import (
    KINDS,
    PROMPTS,
    Faulty,
    check_logprobs,
    loaded,
    mixed,
    tokens_of,
    use,
)

from hybridgen import Completion, Engine, SamplingParams
from hybridgen.engine.requests import Request


def every_order(sizes: tuple[int, ...], length: int) -> list[int]:
    """The shortest sequence that has all orders of `length` sizes somewhere in it (de Bruijn).

    From the Lyndon words in order, as in Fredricksen and Maiorana (1978).
    """
    indices: list[int] = []
    word = [-1]
    while word:
        word[-1] += 1
        if length % len(word) == 0:
            indices += word
        word = [word[i % len(word)] for i in range(length)]
        while word and word[-1] == len(sizes) - 1:
            word.pop()
    return [sizes[index] for index in indices + indices[: length - 1]]


@pytest.mark.parametrize("room", [2, 3])
def test_every_order_of_eviction(path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All orders of four uses of four buckets, captured as soon as wanted, next to an obvious model of an LRU."""
    recorder = use(monkeypatch, Faulty())
    sizes = (1, 2, 4, 8)
    prompts, params = families.prompts_of((3,) * 8), SamplingParams(max_new_tokens=2)
    with loaded(path, "eager") as engine:
        expected = tokens_of(engine.generate(prompts, params))
    fields = {"max_graphs": room, "capture_after": 1, "capture_at_start": False, "max_padding_ratio": 0}
    with loaded(path, decode_buckets=sizes, prefill_buckets=(), **fields) as engine:
        held: list[int] = []
        hits = misses = evictions = 0
        store = engine._runner.graphs
        sequence = every_order(sizes, 4)
        assert len(set(zip(*(sequence[i:] for i in range(4)), strict=False))) == 4**4
        for size in sequence:
            store._patience.clear()  # else each eviction doubles the uses that it takes to come back
            if size in held:
                held.remove(size)
                hits += 1
            else:
                misses += 1
                if len(held) == room:
                    held.pop(0)
                    evictions += 1
            held.append(size)
            assert tokens_of(engine.generate(prompts[:size], params)) == expected[:size]
            assert sorted(row.tokens for row in engine.stats().graphs.graphs) == sorted(held)
        stats = engine.stats().graphs
    assert (stats.hits, stats.evictions, stats.lazy_captures) == (hits, evictions, misses)
    # Prefill has no buckets here, so each of its steps is a miss too.
    assert sum(stats.misses.values()) == misses + hits + misses
    assert len(recorder.recorded) - evictions == len(held)
    assert len(recorder.released) == len(recorder.recorded)  # the last of them at the end


def test_over_its_memory_a_graph_goes(path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[Completion]) -> None:
    use(monkeypatch, Faulty(size=2**20))
    with loaded(path, max_graph_memory="4MiB") as engine:
        assert engine.stats().graphs.bytes == 4 * 2**20
        for _ in range(3):
            assert tokens_of(engine.generate(PROMPTS, mixed(len(PROMPTS)))) == tokens_of(expected)
        stats = engine.stats().graphs
    assert (len(stats.graphs), stats.bytes) == (4, 4 * 2**20)
    assert stats.evictions > 4


# ------------------------------------------------------------------ batches that grow and shrink


class Traffic:
    """Random arrivals over 250 steps in two waves, so that the batch grows to 17 and empties."""

    STEPS = 250

    def __init__(self, seed: int) -> None:
        source = random.Random(seed)
        self.arrivals: dict[int, list[tuple[list[int], SamplingParams]]] = {}
        self.count = 0
        for step in range(self.STEPS):
            rate = (0.3, 0.6, 1.2, 2.0, 0.3, *[0.0] * 5)[step % 125 * 10 // 125]
            for _ in range(int(rate + source.random())):
                length = source.choice((1, 2, 3, 5, 8, 13, 21, 34, 55, 70))
                prompt = [source.randrange(3, families.VOCAB) for _ in range(length)]
                new = source.choice((1, 2, 4, 9, 15, 26, 40))
                kind = dict(source.choice(KINDS))
                kind["min_new_tokens"] = min(kind.get("min_new_tokens", 0), new)
                params = SamplingParams(max_new_tokens=new, seed=self.count, **kind)
                self.arrivals.setdefault(step, []).append((prompt, params))
                self.count += 1

    def run(self, engine: Engine) -> tuple[list[Completion], set[int]]:
        """Every completion, and the sizes of decode batches that occurred."""
        loop, runner = engine.open_loop(), engine._runner
        requests: list[Request] = []
        sizes: set[int] = set()
        decode = runner.decode

        def seen(slots: tuple[int, ...]) -> Any:
            sizes.add(len(slots))
            return decode(slots)

        runner.decode = seen
        for step in range(self.STEPS):
            for prompt, params in self.arrivals.get(step, ()):
                new = engine.make_requests([prompt], params, {})
                loop.submit(new)
                requests += new
            loop.step()
            if not loop.scheduler.busy:
                engine.idle()
        while any(request.completion is None for request in requests):
            loop.step()
        engine.idle()  # reads what run-ahead has left in flight
        return [request.completion for request in requests], sizes


@pytest.fixture(scope="module")
def traffic(path: Path) -> dict[int, tuple[Traffic, list[Completion]]]:
    """By seed: the traffic, and what mode eager makes of it."""
    found = {}
    for seed in (1, 2, 3):
        with loaded(path, "eager") as engine:
            load = Traffic(seed)
            expected, sizes = load.run(engine)
            assert sizes == set(range(1, 18))
            found[seed] = load, expected
    return found


@pytest.mark.parametrize(
    ("mode", "seed", "fields"),
    [
        pytest.param("graph", 1, {}, marks=pytest.mark.slow),
        pytest.param("graph", 2, {"run_ahead": 1, "max_graphs": 4, "capture_after": 1}, marks=pytest.mark.slow),
        ("graph", 3, {"metadata_copy": False, "double_buffer": False, "capture_at_start": False, "capture_after": 1}),
        pytest.param("graph", 1, {"run_ahead": 1, "validate": True, "max_graphs": 12}, marks=pytest.mark.slow),
        pytest.param(
            "graph", 2, {"run_ahead": 1, "check_addresses": True, "decode_buckets": (3, 17)}, marks=pytest.mark.slow
        ),
        pytest.param(
            "graph", 3, {"run_ahead": 1, "sample_in_graph": False, "double_buffer": False}, marks=pytest.mark.slow
        ),
        ("graph", 1, {"sample_in_graph": False, "validate": True, "check_addresses": True, "max_graphs": 3}),
        ("graph", 2, {"max_padding_ratio": None, "lazy_capture": False}),
        ("hybrid", 1, {"run_ahead": 1, "max_graphs": 5, "capture_after": 1, "validate": True}),
        pytest.param("hybrid", 3, {"metadata_copy": False, "capture_after": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_batch_that_grows_and_shrinks(
    path: Path, traffic: dict[int, Any], mode: str, seed: int, fields: dict[str, Any]
) -> None:
    load, expected = traffic[seed]
    with loaded(path, mode, **fields) as engine, torch.compiler.set_stance("fail_on_recompile"):
        outs, sizes = load.run(engine)
        stats = engine.stats()
    assert sizes == set(range(1, 18))
    assert tokens_of(outs) == tokens_of(expected)
    assert [out.finish_reason for out in outs] == [out.finish_reason for out in expected]
    check_logprobs(outs, expected)
    assert stats.requests["submitted"] == load.count
    assert stats.late_compiles == 0
    assert not stats.fallbacks
    assert not stats.graphs.failures
    # Without a ratio the measured times decide, and on a CPU they are noise.
    measured = fields.get("max_padding_ratio", 1) is None
    assert stats.graphs.hits > (20 if fields.get("max_graphs") or measured else 100)
    if fields.get("max_padding_ratio", 1) is not None:
        assert stats.graphs.padded_hits > 10
    if "max_graphs" in fields:
        assert stats.graphs.evictions > 3 or stats.graphs.lazy_captures == 0
    if fields.get("capture_after") == 1:
        assert stats.graphs.lazy_captures > 3
    assert stats.graphs.hits + sum(stats.graphs.misses.values()) == sum(stats.steps.values())
