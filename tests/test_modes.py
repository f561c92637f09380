"""Modes graph and hybrid on a CPU: the tokens of mode eager, whatever is padded, evicted, captured or broken.

A stand-in takes the place of graphs: a replay calls the recorded step. Buckets, padding, static buffers, the store and
its decisions are those of CUDA.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import hybridgen
from hybridgen import Completion, Engine, FinishReason, SamplingParams
from hybridgen.core import GraphEvent
from hybridgen.engine.requests import Request
from hybridgen.execution import ring
from hybridgen.execution.staging import StagedBlock
from hybridgen.graphs import Recorded, StandInRecorder
from hybridgen.graphs import setup as plan
from hybridgen.graphs.key import GraphKey
from hybridgen.kernels.step import metadata
from hybridgen.models.attention import Phase

SETTINGS: dict[str, Any] = {
    "max_batch": 17,
    "page_size": 16,
    "token_budget": 48,
    "kv_memory": "16MiB",
    "max_context": 256,
    "compile_backend": "aot_eager",
}
# Padded whatever the stand-in's times say.
PADS: dict[str, Any] = {"max_padding_ratio": 64, "decode_buckets": (1, 2, 4, 8, 17), "prefill_buckets": (4, 8, 16, 32)}
PROMPTS = families.prompts_of((5, 40, 1, 17, 33, 12, 64, 2))
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"logprobs": 0},
    {"temperature": 0.8, "top_k": 20, "logprobs": 3},
    {"temperature": 1.1, "top_p": 0.8, "min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7},
    {"temperature": 1.0, "repetition_penalty": 0.8, "logit_bias": {5: 4.0, 9: float("-inf")}},
    {"min_new_tokens": 3, "stop_token_ids": [3, 4, 5, 6, 7, 8], "temperature": 1.5},
]


def mixed(count: int, new_tokens: int = 12) -> list[SamplingParams]:
    """Requests of every kind."""
    return [
        SamplingParams(max_new_tokens=new_tokens, seed=i, ignore_eos=True, **KINDS[i % len(KINDS)])
        for i in range(count)
    ]


@contextmanager
def loaded(path: Path, mode: str = "graph", **fields: Any) -> Iterator[Engine]:
    """An engine; at the end nothing is in use."""
    with Engine.load(path, mode=mode, **SETTINGS | (PADS if mode in ("graph", "hybrid") else {}) | fields) as engine:
        yield engine
        if not engine.closed:
            stats = engine.stats()
            assert (stats.free_pages, stats.running, stats.waiting) == (stats.pages, 0, 0)
            assert len(engine._loop.scheduler._free_slots) == engine.config.max_batch


def tokens_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    assert [str(c.error) for c in completions if c.error is not None] == []
    return [completion.token_ids for completion in completions]


def check_logprobs(ours: list[Completion], theirs: list[Completion]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.logprobs or (), other.logprobs or (), strict=True):
            assert a.token_id == b.token_id
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
            assert [value for _, value in a.top] == pytest.approx([value for _, value in b.top], abs=1e-4)


@contextmanager
def warned(match: str) -> Iterator[list[warnings.WarningMessage]]:
    """The runtime warnings that come meanwhile: at least one, and all of this kind."""
    found: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [warning for warning in caught if warning.category is RuntimeWarning]
    assert found
    assert [str(warning.message) for warning in found if not re.search(match, str(warning.message))] == []


def settle(engine: Engine) -> None:
    """Record everything that is wanted."""
    while engine._runner.graphs.pending:
        engine.idle()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("modes"))


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Completion]:
    """Mode eager: requests of every kind at once."""
    with loaded(path, "eager") as engine:
        return engine.generate(PROMPTS, mixed(len(PROMPTS)))


class Faulty(StandInRecorder):
    """The stand-in, with replays and recordings of the test's own."""

    def __init__(
        self,
        *,
        record: Callable[[GraphKey], None] = lambda key: None,
        replay: Callable[[GraphKey, Callable[[], None]], None] = lambda key, step: step(),
        seconds: Callable[[GraphKey], float] = lambda key: 0.0,
        size: int = 0,
    ) -> None:
        """`record` is called before a step is recorded, `replay` instead of it being replayed."""
        self._before = record
        self._replay = replay
        self._seconds = seconds
        self._size = size
        self.recorded: list[GraphKey] = []
        self.released: list[GraphKey] = []

    def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
        self._before(key)
        recorded = super().record(key, step, known)
        self.recorded.append(key)

        def replay() -> None:
            assert key not in self.released or self.recorded.count(key) > self.released.count(key)
            self._replay(key, step)

        return replace(
            recorded,
            replay=replay,
            release=lambda: self.released.append(key),
            seconds=self._seconds(key),
            plain_seconds=1.0,
            bytes=self._size,
        )


def use(monkeypatch: pytest.MonkeyPatch, recorder: Faulty) -> Faulty:
    monkeypatch.setattr(plan, "StandInRecorder", lambda: recorder)
    return recorder


# ------------------------------------------------------------------ what runs, and how it is named


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
    with Engine.load(model, mode=mode, device="cpu", **settings) as engine:
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
    ("fields", "most"), [({}, 48), ({"max_context": 40}, 40), ({"token_budget": 1024, "max_context": None}, 512)]
)
def test_prefill_buckets_above_what_a_call_takes(path: Path, fields: dict[str, Any], most: int) -> None:
    settings = SETTINGS | fields
    with pytest.raises(hybridgen.ConfigError, match=f"prefill_buckets holds {most + 1}, above the {most} tokens"):
        Engine.load(path, mode="graph", prefill_buckets=[4, most + 1], **settings)
    with Engine.load(path, mode="graph", prefill_buckets=[most], decode_buckets=[], **settings) as engine:
        assert {row.tokens for row in engine.stats().graphs.graphs} == {most}


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


# ------------------------------------------------------------------ eviction


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
        for order in itertools.product(sizes, repeat=4):
            store._patience.clear()  # else each eviction doubles the uses that it takes to come back
            for size in order:
                if size in held:
                    held.remove(size)
                    hits += 1
                else:
                    misses += 1
                    if len(held) == room:
                        held.pop(0)
                        evictions += 1
                held.append(size)
                store._patience.clear()
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
    """Random arrivals over 500 steps in waves, so that the batch grows to 17 and now and then empties."""

    STEPS = 500

    def __init__(self, seed: int) -> None:
        source = random.Random(seed)
        self.arrivals: dict[int, list[tuple[list[int], SamplingParams]]] = {}
        self.count = 0
        for step in range(self.STEPS):
            rate = (0.3, 0.6, 1.0, 1.5, 0.3, *[0.0] * 5)[step % 125 * 10 // 125]
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
        ("graph", 1, {}),
        ("graph", 2, {"run_ahead": 1, "max_graphs": 4, "capture_after": 1}),
        ("graph", 3, {"metadata_copy": False, "double_buffer": False, "capture_at_start": False, "capture_after": 1}),
        ("graph", 1, {"run_ahead": 1, "validate": True, "max_graphs": 12}),
        ("graph", 2, {"run_ahead": 1, "check_addresses": True, "decode_buckets": (3, 17)}),
        ("graph", 3, {"run_ahead": 1, "sample_in_graph": False, "double_buffer": False}),
        ("graph", 1, {"sample_in_graph": False, "validate": True, "check_addresses": True, "max_graphs": 3}),
        ("graph", 2, {"max_padding_ratio": None, "lazy_capture": False}),
        ("hybrid", 1, {"run_ahead": 1, "max_graphs": 5, "capture_after": 1, "validate": True}),
        ("hybrid", 3, {"metadata_copy": False, "capture_after": 2}),
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
    assert stats.graphs.hits > (40 if fields.get("max_graphs") or measured else 200)
    if fields.get("max_padding_ratio", 1) is not None:
        assert stats.graphs.padded_hits > 20
    if "max_graphs" in fields:
        assert stats.graphs.evictions > 3 or stats.graphs.lazy_captures == 0
    if fields.get("capture_after") == 1:
        assert stats.graphs.lazy_captures > 3
    assert stats.graphs.hits + sum(stats.graphs.misses.values()) == sum(stats.steps.values())


# ------------------------------------------------------------------ faults


BROKEN = [(Phase.DECODE, size) for size in (1, 2, 4, 8, 17)] + [(Phase.PREFILL, size) for size in (4, 8, 16, 32)]


@pytest.mark.parametrize(("phase", "size"), BROKEN)
def test_out_of_memory_in_the_capture_of_a_bucket(
    path: Path, expected: list[Completion], phase: Phase, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(key: GraphKey) -> None:
        if (key.phase, key.tokens) == (phase, size):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    recorder = use(monkeypatch, Faulty(record=record))
    name = f"the {phase} graph of {size} "
    with (
        warned(f"the capture of {name}") as caught,
        loaded(path, capture_after=1) as engine,
    ):
        failed = len(engine.stats().graphs.failures)
        assert failed >= 1
        for _ in range(2):
            assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
            assert tokens_of(engine.generate(PROMPTS[2:3], mixed(8)[2:3])) == tokens_of(expected[2:3])
        settle(engine)
        stats = engine.stats()
    for why in stats.graphs.failures.values():
        assert why == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert all(reason.startswith(f"the capture of {name}") for reason in stats.fallbacks)
    assert sum(stats.fallbacks.values()) == len(stats.graphs.failures)  # each tried once
    assert len(caught) == len(stats.fallbacks)  # one of each reason
    assert {(key.phase, key.tokens) for key in recorder.recorded} == set(BROKEN) - {(phase, size)}


def test_a_recorder_that_always_raises(path: Path, expected: list[Completion], monkeypatch: pytest.MonkeyPatch) -> None:
    def record(key: GraphKey) -> None:
        raise RuntimeError("no graphs today")

    use(monkeypatch, Faulty(record=record))
    with warned("no graphs today"), loaded(path, capture_after=1) as engine:
        for _ in range(2):
            assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
        stats = engine.stats()
    assert stats.graphs.graphs == ()
    assert stats.graphs.hits == 0
    assert {kind for _, kind, _ in stats.steps} == {"layers, eager"}
    assert "bucket 8 failed, see GraphStats.failures" in stats.graphs.misses
    assert set(stats.fallbacks.values()) <= set(range(1, 9))


def wrong(engine_of: list[Engine]) -> Callable[[GraphKey, Callable[[], None]], None]:
    """A replay whose logits are off."""

    def replay(key: GraphKey, step: Callable[[], None]) -> None:
        bound = engine_of[0]._runner.bound if engine_of else None
        if bound is None or key.phase is not Phase.DECODE:
            step()
            return
        forward = bound.forward
        try:
            bound.forward = lambda *args: forward(*args).roll(1, -1)
            step()
        finally:
            del bound.forward

    return replay


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("validate", [False, True])
def test_a_graph_that_gives_other_values(
    path: Path, expected: list[Completion], validate: bool, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validated, it is dropped before its values are anybody's; without that they are wrong, so the fault is real."""
    engines: list[Engine] = []
    events: list[GraphEvent] = []
    recorder = use(monkeypatch, Faulty(replay=wrong(engines)))
    fields = {"validate": validate, "sample_in_graph": not outside, "on_graph_event": events.append}
    with loaded(path, **fields) as engine:
        engines.append(engine)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outs = engine.generate(PROMPTS, mixed(8))
        stats = engine.stats()
    if not validate:
        assert tokens_of(outs) != tokens_of(expected)
        assert not stats.graphs.failures
        return
    assert tokens_of(outs) == tokens_of(expected)
    check_logprobs(outs, expected)
    failed = [event for event in events if event.kind == "failed"]
    assert {event.phase for event in failed} == {"decode"}
    assert {event.message for event in failed} == {"its first replay gave other values than the step without it"}
    assert len(failed) == len(stats.graphs.failures) == len(recorder.released[: len(failed)]) > 0
    assert stats.steps["decode", "layers, eager", "its graph was found wrong"] == len(failed)
    reasons = [reason for reason in stats.fallbacks if "is not used any more" in reason]
    assert sum(stats.fallbacks[reason] for reason in reasons) == len(failed)
    assert len([w for w in caught if "is not used any more" in str(w.message)]) == len(reasons)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_right_graph_passes_its_validation(path: Path, expected: list[Completion], run_ahead: int) -> None:
    with loaded(path, validate=True, run_ahead=run_ahead) as engine:
        before = len(engine.stats().graphs.graphs)
        for _ in range(2):
            assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
        stats = engine.stats()
        assert not stats.graphs.failures
        assert not stats.fallbacks
        assert len(stats.graphs.graphs) >= before


@pytest.mark.parametrize("sample_in_graph", [True, False])
@pytest.mark.parametrize("which", ["sampling reals", "counter", "keys of layer 0", "model.norm.weight"])
def test_a_tensor_that_moved(path: Path, which: str, sample_in_graph: bool) -> None:
    params = SamplingParams(max_new_tokens=6)
    with loaded(path, "eager") as engine:
        expected = engine.generate(PROMPTS, params)
    with loaded(path, check_addresses=True, sample_in_graph=sample_in_graph) as engine:
        assert tokens_of(engine.generate(PROMPTS, params)) == tokens_of(expected)
        runner = engine._runner
        if which == "sampling reals":
            runner.sampler.reals = runner.sampler.reals.clone()
        elif which == "counter":
            runner.ring.counter = runner.ring.counter.clone()
        elif which == "keys of layer 0":
            state = runner.states[0]
            state._pages = state.pages._replace(keys=state.pages.keys.clone())
        else:
            weight = runner.bound.model.get_parameter(which)
            weight.data = weight.data.clone()
        with pytest.warns(RuntimeWarning, match=f"not used any more: moved since the capture: {which}"):
            outs = engine.generate(PROMPTS, params)
        assert tokens_of(outs) == tokens_of(expected)
        stats = engine.stats()
    assert set(stats.graphs.failures.values()) == {f"moved since the capture: {which}"}
    assert sum(stats.fallbacks.values()) == len(stats.graphs.failures)
    assert {step.reason for out in outs for step in out.steps} >= {"a tensor of its graph moved"}


def test_a_listener_that_raises(path: Path, expected: list[Completion]) -> None:
    def listen(event: GraphEvent) -> None:
        raise ValueError("mine")

    with (
        warned("on_graph_event raised ValueError: mine") as caught,
        loaded(path, on_graph_event=listen, max_graphs=3, capture_after=1) as engine,
    ):
        assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
        stats = engine.stats()
    assert len(caught) == 1
    captured = 3 + stats.graphs.lazy_captures
    assert stats.fallbacks == {"on_graph_event raised ValueError: mine": captured + stats.graphs.evictions}


class Fails:
    """A function that raises at its nth call instead of doing its work."""

    def __init__(self, function: Callable[..., Any], nth: int, error: BaseException) -> None:
        self._function = function
        self._nth = nth
        self._error = error
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls != self._nth:
            return self._function(*args)
        raise self._error


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("nth", [1, 2, 5, 9])
@pytest.mark.parametrize("where", ["replay", "copy", "advance"])
@pytest.mark.parametrize("error", [RuntimeError("injected"), torch.OutOfMemoryError("injected")], ids=["any", "memory"])
def test_a_step_that_fails_once_in_the_middle(
    path: Path, where: str, nth: int, run_ahead: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step runs again for one request after the other, so that nobody loses a token."""
    params = [SamplingParams(max_new_tokens=8, seed=i, **KINDS[i % 5]) for i in range(8)]  # 5 to 7: test_defects
    with loaded(path, "eager") as engine:
        expected = engine.generate(PROMPTS, params)
    with loaded(path, run_ahead=run_ahead) as engine:
        runner = engine._runner
        if where == "replay":
            failing = Fails(lambda step: step(), nth, error)
            original = runner._launch

            def launch(route: Any, *args: Any) -> Any:
                return original(replace(route, run=lambda: failing(route.run)), *args)

            monkeypatch.setattr(runner, "_launch", launch)
        elif where == "copy":
            failing = Fails(metadata.reference, nth, error)
            monkeypatch.setattr(metadata, "reference", failing)
        else:
            failing = Fails(ring.advance, nth, error)
            monkeypatch.setattr(ring, "advance", failing)
        outs = engine.generate(PROMPTS, params)
        assert failing.calls > nth
        # A call for several requests is isolated; one for a single request fails it.
        lost = [out for out in outs if out.error is not None]
        assert len(lost) <= 1
        for out, good in zip(outs, expected, strict=True):
            if out.error is None:
                assert out.token_ids == good.token_ids
            else:
                assert out.token_ids == good.token_ids[: len(out.token_ids)]
                assert "injected" in str(out.error)
        check_logprobs(
            [o for o in outs if not o.error], [e for o, e in zip(outs, expected, strict=True) if not o.error]
        )
        again = engine.generate(PROMPTS, params)
        assert tokens_of(again) == tokens_of(expected)


@pytest.mark.parametrize("sample_in_graph", [True, False])
def test_what_only_another_thread_can_replay_runs_without(
    path: Path, expected: list[Completion], sample_in_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(Faulty):
        def record(self, key: GraphKey, step: Callable[[], None], known: tuple[float, float] | None) -> Recorded:
            return replace(super().record(key, step, known), thread=-1)

    use(monkeypatch, Elsewhere(replay=lambda key, step: pytest.fail("replayed")))
    with (
        warned("replay on the thread that recorded them") as caught,
        loaded(path, sample_in_graph=sample_in_graph, lazy_capture=False) as engine,
    ):
        assert tokens_of(engine.generate(PROMPTS, mixed(8))) == tokens_of(expected)
        stats = engine.stats()
    assert len(caught) == 1
    assert stats.graphs.hits == 0
    (fallbacks,) = stats.fallbacks.values()
    assert stats.graphs.misses["its cudagraph tree belongs to another thread"] == fallbacks > 0
    assert sum(stats.graphs.misses.values()) == sum(stats.steps.values())


def test_a_lost_device_in_a_replay_ends_the_engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def replay(key: GraphKey, step: Callable[[], None]) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        step()

    use(monkeypatch, Faulty(replay=replay))
    with Engine.load(path, mode="graph", **SETTINGS | PADS) as engine:
        outs = engine.generate(PROMPTS, max_new_tokens=8)
        assert {out.finish_reason for out in outs} == {FinishReason.ERROR}
        assert all("illegal memory access" in str(out.error) for out in outs)
        assert engine.closed


# ------------------------------------------------------------------ while idle


def test_recorded_only_while_nothing_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []

    def record(key: GraphKey) -> None:
        loop = engines[0]._loop
        assert not loop.scheduler.busy
        assert not loop._in_flight

    recorder = use(monkeypatch, Faulty(record=record))
    with loaded(path, capture_at_start=False, capture_after=3, run_ahead=1) as engine:
        engines.append(engine)
        assert engine._runner.graphs.recordings == ()
        long, short = engine.stream(PROMPTS[0], max_new_tokens=30), engine.stream(PROMPTS[3], max_new_tokens=6)
        next(long)
        list(short)  # ends while the other runs
        assert engine._runner.graphs.pending
        assert engine.idle() is False
        assert recorder.recorded == []
        list(long)  # ends while nothing runs: one graph
        assert len(recorder.recorded) == 1
        assert engine.idle() is False
        assert len(recorder.recorded) == 2
        stats = engine.stats().graphs
    assert (stats.lazy_captures, len(stats.graphs)) == (2, 2)
    assert {key.tokens for key in recorder.recorded} == {1, 2}


@pytest.mark.parametrize("after", [2, 4])
def test_recorded_after_so_many_steps(path: Path, after: int) -> None:
    with loaded(path, capture_at_start=False, capture_after=after, prefill_buckets=()) as engine:
        engine.generate(PROMPTS[0], max_new_tokens=after)  # a prefill, and one decode step fewer
        assert engine.stats().graphs.graphs == ()
        engine.generate(PROMPTS[0], max_new_tokens=2)
        assert [(row.tokens, row.lazy) for row in engine.stats().graphs.graphs] == [(1, True)]
        out = engine.generate(PROMPTS[0], max_new_tokens=4)
        assert engine.stats().graphs.hits == 3
        assert {step.reason for step in out.steps if step.phase == "decode"} == {"bucket 1"}


def test_lazy_capture_off(path: Path) -> None:
    with loaded(path, max_graphs=1, lazy_capture=False, capture_after=1) as engine:
        first = {recording.key for recording in engine._runner.graphs.recordings}
        engine.generate(PROMPTS[:4], max_new_tokens=9)
        assert engine.idle() is False
        assert {recording.key for recording in engine._runner.graphs.recordings} == first
    with (
        pytest.raises(hybridgen.ConfigError, match="records nothing"),
        loaded(path, capture_at_start=False, lazy_capture=False),
    ):
        pass


def test_a_listener_cannot_start_a_step_in_a_capture(path: Path, expected: list[Completion]) -> None:
    engines: list[Engine] = []
    raised: list[Exception] = []

    def listen(event: GraphEvent) -> None:
        if engines:
            try:
                engines[0].generate(PROMPTS[0], max_new_tokens=2)
            except hybridgen.EngineError as error:
                raised.append(error)

    with loaded(path, capture_at_start=False, capture_after=1, on_graph_event=listen) as engine:
        engines.append(engine)
        for _ in range(3):
            outs = engine.generate(PROMPTS, mixed(8))
            assert tokens_of(outs) == tokens_of(expected)
    assert raised
    assert "from inside a step" in str(raised[0])


def test_an_interrupt_while_idle_costs_no_result(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(path) as engine:
        expected = engine.generate(PROMPTS[:2], max_new_tokens=6)

        def interrupted() -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(engine._runner, "capture_pending", interrupted)
        with pytest.raises(hybridgen.Interrupted) as caught:
            engine.generate(PROMPTS[:2], max_new_tokens=6)
        assert tokens_of(caught.value.completions) == tokens_of(expected)
        monkeypatch.undo()
        assert tokens_of(engine.generate(PROMPTS[:2], max_new_tokens=6)) == tokens_of(expected)


@pytest.mark.parametrize("where", ["between", "capture"])
def test_what_is_interrupted_does_not_shift_later_tokens(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """An interrupt between a step's launch and its note on the host, or in the warm-up of a capture."""
    with loaded(path, capture_at_start=False, capture_after=1) as engine:
        expected = engine.generate(PROMPTS[0], max_new_tokens=6).token_ids
        with monkeypatch.context() as patch:
            if where == "between":
                patch.setattr(engine._runner.ring, "launched", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            else:
                patch.setattr(engine._runner.graphs, "timings", None)  # fails after the step ran for nobody
            with pytest.raises((hybridgen.Interrupted, AttributeError)):
                engine.generate(PROMPTS[0], max_new_tokens=6)
                engine.idle()
                raise AttributeError
        assert engine.generate(PROMPTS[0], max_new_tokens=6).token_ids == expected


def test_log_probabilities_of_more_tokens_than_there_are(tmp_path: Path) -> None:
    tiny = families.write("llama", tmp_path, vocab_size=40)
    with loaded(tiny) as engine:
        out = engine.generate([5, 6, 7], max_new_tokens=3, logprobs=64)
    assert all(sorted(token for token, _ in entry.top) == list(range(40)) for entry in out.logprobs)


def test_an_engine_that_is_closed_frees_its_weights(path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        engine = Engine.load(path, mode="graph", **SETTINGS)
        engine.generate(PROMPTS[0], max_new_tokens=3)
        weights = weakref.ref(engine._runner.bound.model.lm_head.weight)
        engine.close()
        del engine
        assert weights() is None
    finally:
        gc.enable()


def test_an_error_while_idle_costs_no_result(
    path: Path, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(path, capture_after=1) as engine:
        monkeypatch.setattr(engine._runner, "capture_pending", lambda: 1 / 0)
        with pytest.warns(RuntimeWarning, match="recording while idle failed: ZeroDivisionError"):
            outs = engine.generate(PROMPTS, mixed(8))
        assert tokens_of(outs) == tokens_of(expected)


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
